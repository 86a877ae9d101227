"""The core: units, cuts, blocks, momentum and the local step, on torch alone."""
