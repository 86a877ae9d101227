"""Version counters of tensors: PyTorch counts in-place changes in a private attribute."""

from collections.abc import Iterable

from torch import Tensor


def version(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor and of all views of it."""
    return tensor._version


def versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The version counter of each tensor."""
    return tuple(version(tensor) for tensor in tensors)
