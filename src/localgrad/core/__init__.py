"""The core: units, cuts, blocks, momentum and the local step. It needs torch and NumPy alone."""
