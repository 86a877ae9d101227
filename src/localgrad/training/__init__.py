"""Train a config in a run folder."""
