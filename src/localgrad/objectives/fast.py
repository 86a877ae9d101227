"""Faster forms of some functions on a CPU, which the objectives use there.

Each is equal to its definition up to rounding (`tests/objectives/test_fast.py`). A tensor on the meta device stands for
one on the CPU.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTHWHILE = 3.0
"""`UpsampledConv` is used if it needs this many times fewer multiplications than the convolution after upsampling."""


_simulated: ContextVar[str | None] = ContextVar("simulated", default=None)


@contextmanager
def simulated_device(kind: str) -> Generator[None, None, None]:
    """Context: tensors without data stand for tensors on this type of device, and objectives use the forms for it."""
    token = _simulated.set(kind)
    try:
        yield
    finally:
        _simulated.reset(token)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU, or stands for one on the CPU (see `simulated_device`)."""
    return (_simulated.get() or tensor.device.type) in ("cpu", "meta")


def channel_deviation(maps: Tensor) -> Tensor:
    """Unbiased standard deviation of each channel over space, `(N, C, H, W)` to `(N, C)`: `maps.flatten(2).std(2)`."""
    flat = maps.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    length = cast(Tensor, cast(Any, torch.linalg).vector_norm(centred, dim=2))
    return length / math.sqrt(flat.shape[2] - 1)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`F.binary_cross_entropy_with_logits`, without log1p, which is slow."""
    return _BinaryCrossEntropy.apply(logits, targets)  # pyright: ignore[reportReturnType]


class _BinaryCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return (logits.clamp(min=0) - logits * targets - logits.abs().sigmoid_().log_()).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        return logits.sigmoid().sub_(targets).mul_(gradients[0] / logits.numel()), None


def norm_of_few_channels(norm: nn.Module, maps: Tensor, like: Tensor) -> Tensor:
    """Apply a batch norm of few channels in contiguous layout, which is three times as fast as in channels last.

    If `like` is in channels last, so is the output.
    """
    if not like.is_contiguous(memory_format=torch.channels_last):
        return norm(maps)
    if not maps.is_contiguous():
        maps = in_layout(maps, torch.contiguous_format)
    return in_layout(norm(maps), torch.channels_last)


def in_layout(maps: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy of maps `(N, C, H, W)` in another memory format; the gradient of `maps` keeps the format of `maps`."""
    return _InLayout.apply(maps, memory_format)  # pyright: ignore[reportReturnType]


class _InLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, memory_format: torch.memory_format) -> Tensor:
        last = maps.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if last else torch.contiguous_format
        return maps.clone(memory_format=memory_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].contiguous(memory_format=ctx.memory_format), None


class UpsampledConv(nn.Module):
    """`conv(upsample(maps))` for a 3x3 convolution, with the convolution computed at the low resolution.

    Both steps are linear, so their order may be exchanged. A 1x1 convolution at the low resolution computes all nine
    taps. Then each tap's result is interpolated and shifted by two matrix products. No upsampled copy of the features
    is needed.

    Attributes:
        is_worthwhile: whether this takes at most a third of the multiplications of the usual order.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], output: tuple[int, int]) -> None:
        super().__init__()
        self._conv = (conv,)  # a tuple is not registered: the weights are the convolution's own
        (low_height, low_width), (height, width) = size, output
        after = height * width * conv.in_channels * conv.out_channels * 9
        before = low_height * low_width * conv.in_channels * conv.out_channels * 9
        before += (low_height * 3 * low_width * 3 + height * 3 * low_height) * width * conv.out_channels
        self.is_worthwhile = size != output and before * WORTHWHILE <= after
        self.register_buffer("rows", _shifted_interpolation(low_height, height), persistent=False)
        self.register_buffer("columns", _shifted_interpolation(low_width, width).T.clone(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """`(N, in_channels, *size)` to `(N, out_channels, *output)`."""
        conv = self._conv[0]
        weight = conv.weight.permute(2, 0, 3, 1).reshape(-1, conv.in_channels, 1, 1)
        taps = cast(Tensor, F.conv2d(maps, weight).unflatten(1, (3, conv.out_channels, 3)))
        taps = taps.permute(0, 2, 1, 4, 3, 5).flatten(4)  # (N, out_channels, 3, h, 3 w)
        convolved = self.rows @ (taps @ self.columns).flatten(2, 3)
        assert conv.bias is not None
        return convolved + conv.bias.to(convolved.dtype)[:, None, None]


def _shifted_interpolation(size: int, output: int) -> Tensor:
    """Matrix `(output, 3 size)` that maps three vectors to the sum of their interpolations, shifted by -1, 0, 1 pixels.

    Values from beyond the border are 0, as in a convolution with zero padding.
    """
    weights = F.interpolate(torch.eye(size)[None], size=output, mode="linear", align_corners=True)[0].T
    padded = F.pad(weights, (0, 0, 1, 1))
    return torch.cat([padded[shift : shift + output] for shift in range(3)], dim=1)
