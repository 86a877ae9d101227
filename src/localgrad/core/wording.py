"""What PyTorch tells by words alone: for these it has no class, no code and no value, so their texts are read here."""

import torch.distributed as dist

CAPTURABLE = "This instance was constructed with capturable=True"
"""How the warning of Adam begins whose `capturable` step is not (or not yet) part of a CUDA graph."""


def is_peer_failure(error: Exception) -> bool:
    """Whether torch.distributed says that another rank is gone; gloo raises a bare RuntimeError, which names it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
