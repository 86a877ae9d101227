"""Local objectives, one file per method. Each factory returns a function of a `Site` that builds an `nn.Module`."""
