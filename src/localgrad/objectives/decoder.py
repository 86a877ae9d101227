"""The decoders of InfoPro: features back to logits of the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.objectives.layout import conv_norm_relu

MAX_DIRECT_CHANNELS = 64


WIDTH = 12


WORTHWHILE = 3.0


def decoder(channels: int, size: tuple[int, int], image: tuple[int, int], image_channels: int) -> nn.Module:
    """A module from features `(N, channels, *size)` to logits `(N, image_channels, *image)`.

    Up to 64 channels: upsample to the image's size, 3x3 to 12, 3x3 to 3 (the released CIFAR decoder). More channels:
    one convolution a doubling of the size, four at most, whose first then upsamples further: 1x1 to a quarter of the
    channels (192 at most), then 64 (1x1), 32, 12 and 3 (3x3), which is the released ImageNet decoder at 512 x 28 x 28
    and 1024 x 14 x 14.
    """
    if channels <= MAX_DIRECT_CHANNELS:
        return DirectDecoder(channels, size, image, image_channels)
    doublings = max(1, (max(image[0] // size[0], 1)).bit_length() - 1)
    widths = [min(channels // 4, 192), *{1: [], 2: [12], 3: [32, 12]}.get(doublings, [64, 32, 12])]
    doublings = len(widths)
    layers: list[nn.Module] = []
    for step, width in enumerate(widths, 1):
        kernel = 1 if step == 1 or width == 64 else 3
        bigger = (image[0] >> (doublings - step), image[1] >> (doublings - step))
        layers += [*conv_norm_relu(channels, width, kernel, bias=True), nn.UpsamplingBilinear2d(bigger)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, image_channels, 3, padding=1))


class DirectDecoder(nn.Module):
    """Upsample to the image, 3x3 to 12 channels, batch norm, ReLU, 3x3 to the image's channels."""

    def __init__(self, channels: int, size: tuple[int, int], image: tuple[int, int], image_channels: int) -> None:
        super().__init__()
        self.first = UpsampledConv(channels, WIDTH, size, image)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.last = nn.Conv2d(WIDTH, image_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, h, w)` to logits `(N, image_channels, H, W)`."""
        hidden = self.first(features)
        if features.is_contiguous(memory_format=torch.channels_last):
            # so few channels are normalised about three times faster map by map, on a processor
            if not (hidden.is_cuda or hidden.is_contiguous()):
                hidden = in_layout(hidden, torch.contiguous_format)
            hidden = in_layout(self.norm(hidden), torch.channels_last)
        else:
            hidden = self.norm(hidden)
        return self.last(F.relu(hidden, inplace=True))


def in_layout(maps: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy of maps `(N, C, H, W)` in a memory format, whose gradient has the format that the maps had."""
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


class UpsampledConv(nn.Conv2d):
    """A 3x3 convolution of maps that are first upsampled bilinearly (corners aligned) to `output`.

    Both steps are linear, so they may trade places: one 1x1 convolution at the low resolution for all nine taps, then
    the interpolation of each, shifted, as two products with matrices of one row a pixel. That needs no upsampled copy
    of the features, and where it takes a third of the multiplications or less it is how the convolution is computed,
    unless `convolve_first` says otherwise.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        output: tuple[int, int],
        convolve_first: bool | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        (low_height, low_width), (height, width) = size, output
        self.output = output
        self.unchanged = size == output
        after = height * width * in_channels * out_channels * 9
        before = low_height * low_width * in_channels * out_channels * 9
        before += (low_height * 3 * low_width * 3 + height * 3 * low_height) * width * out_channels
        self.convolve_first = not self.unchanged and before * WORTHWHILE <= after
        if convolve_first is not None:
            self.convolve_first = convolve_first
        if self.convolve_first:
            self.register_buffer("rows", _shifted_interpolation(low_height, height), persistent=False)
            self.register_buffer("columns", _shifted_interpolation(low_width, width).T.clone(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """`(N, in_channels, *size)` to `(N, out_channels, *output)`."""
        if self.unchanged:
            return super().forward(input)
        if not self.convolve_first:
            return super().forward(F.interpolate(input, size=self.output, mode="bilinear", align_corners=True))
        weight = self.weight.permute(2, 0, 3, 1).reshape(-1, self.in_channels, 1, 1)
        taps = F.conv2d(input, weight).unflatten(1, (3, self.out_channels, 3))
        taps = taps.permute(0, 2, 1, 4, 3, 5).flatten(4)  # (N, out_channels, 3, h, 3 w)
        maps = self.rows @ (taps @ self.columns).flatten(2, 3)
        assert self.bias is not None
        return maps + self.bias.to(maps.dtype)[:, None, None]


def _shifted_interpolation(size: int, output: int) -> Tensor:
    """Matrix `(output, 3 size)` from three vectors to the sum of their interpolations, shifted by -1, 0 and 1 pixels.

    What comes from beyond the border is 0, as in a convolution with padding.
    """
    weights = F.interpolate(torch.eye(size)[None], size=output, mode="linear", align_corners=True)[0].T
    padded = F.pad(weights, (0, 0, 1, 1))
    return torch.cat([padded[shift : shift + output] for shift in range(3)], dim=1)
