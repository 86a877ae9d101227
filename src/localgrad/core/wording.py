"""Messages of PyTorch that are recognised by their text, because it has no error class, code or value for them."""

import torch.distributed as dist

CAPTURABLE = "This instance was constructed with capturable=True"
"""Beginning of the warning of an Adam with `capturable=True` whose step is not (or not yet) part of a CUDA graph."""


def is_peer_failure(error: Exception) -> bool:
    """Whether an error of torch.distributed means that another rank died; gloo raises a RuntimeError naming gloo."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
