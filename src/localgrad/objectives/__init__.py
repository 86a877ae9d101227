"""Local objectives, one file a method: each factory returns a function of a `Site` that builds an `nn.Module`."""
