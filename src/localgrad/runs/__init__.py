"""Run folders: the files of a run."""
