"""Training a config in a run folder."""
