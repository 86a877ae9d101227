"""Messages between ranks in block-parallel training: tensors of a batch, whose layout the receiver knows beforehand."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.core.trees import leaves
from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype of a tensor `(N, ...)`, without its number of samples N."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """The layout of a tensor `(N, ...)`."""
        return cls(tuple(tensor.shape[1:]), (tensor[0].numel(), *tensor.stride()[1:]), tensor.dtype)

    def empty(self, size: int, device: torch.device) -> Tensor:
        """An uninitialised tensor of this layout for `size` samples."""
        return torch.empty_strided((size, *self.shape), self.strides, dtype=self.dtype, device=device)


def dense(tensor: Tensor) -> Tensor:
    """The tensor if it is contiguous or in channels last, else a contiguous copy."""
    formats = (torch.contiguous_format, *([torch.channels_last] if tensor.dim() == 4 else []))
    if any(tensor.is_contiguous(memory_format=form) for form in formats):
        return tensor
    return tensor.contiguous()


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view of the memory of a dense tensor, to be sent or received in any memory format."""
    return tensor.as_strided((tensor.numel(),), (1,))


def check_targets(targets: Any, size: int) -> None:
    """Refuse targets that hold anything but None and tensors of `size` samples, in any nesting."""
    wrong = [
        leaf
        for leaf in leaves(targets)
        if leaf is not None and not (isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size)
    ]
    if wrong:
        given = f"a tensor {tuple(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else f"a {type(wrong[0]).__name__}"
        raise LocalGradError(
            f"targets hold {given} with a batch of {size} samples: ranks exchange tensors (N, ...) and None alone; "
            "give what is the same for all batches to the objective"
        )


def wait(work: dist.Work | None) -> None:
    """Wait for a send or receive; torch.distributed returns None if this rank takes no part in it."""
    if work is not None:
        work.wait()
