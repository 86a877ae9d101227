"""Texts of PyTorch that are read because it gives no class, code or value for what they say."""

import torch.distributed as dist

CAPTURABLE = "This instance was constructed with capturable=True"
"""How the warning of Adam begins whose `capturable` step is not (or not yet) part of a CUDA graph."""


def is_peer_failure(error: Exception) -> bool:
    """Whether torch.distributed says that another rank is gone; gloo raises a bare RuntimeError, which names it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
