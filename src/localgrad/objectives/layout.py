"""Features of any layout as maps, and checks of arguments, shared by the objectives."""

# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.site import Site
from localgrad.errors import CannotSitError, SettingsError

MAX_PREFIX_TOKENS = 8


class AsMap(nn.Module):
    """Bring features of any layout into a map `(N, C, H, W)`.

    - Maps with channels last are permuted.
    - Videos and volumes, `(N, C, T, H, W)` or `(N, T, H, W, C)`, are averaged over T.
    - A sequence `(N, C, L)` becomes a map of L x 1.
    - Tokens `(N, L, D)` of an image are laid on the grid of its patches, without class and register tokens; tokens of
      other inputs become a map of L x 1.
    - A vector `(N, D)` becomes a map of 1x1.

    Attributes:
        channels: channels C of the map.
        size: height and width (H, W) of the map.
        prefix_tokens: number of class and register tokens, which come before the patches.
    """

    def __init__(self, site: Site, objective: str) -> None:
        super().__init__()
        shape = site.features
        self.prefix_tokens, self.channel_dim, self.ndim = 0, site.channel_dim, len(shape)
        self.channels = shape[site.channel_dim]
        if len(shape) == 4:
            height, width = (shape[2], shape[3]) if site.channel_dim == 1 else (shape[1], shape[2])
        elif len(shape) == 5:
            height, width = (shape[3], shape[4]) if site.channel_dim == 1 else (shape[2], shape[3])
        elif len(shape) == 3 and site.channel_dim == 1:
            height, width = shape[2], 1
        elif len(shape) == 3:
            height, width = token_grid(shape[1], site, objective)
            self.prefix_tokens = shape[1] - height * width
        elif len(shape) == 2:
            height, width = 1, 1
        else:
            raise CannotSitError(
                f"{objective} cannot sit on features {tuple(shape)} (block {site.index}): it takes (N, C, H, W), "
                "(N, H, W, C), one dimension more, (N, C, L), (N, L, D) or (N, D); cut elsewhere"
            )
        self.size = (height, width)

    def forward(self, features: Tensor) -> Tensor:
        """Features of the site to `(N, C, H, W)`."""
        if self.ndim == 5:
            features = features.mean(2 if self.channel_dim == 1 else 1)
        if self.ndim > 3:
            return features if self.channel_dim == 1 else features.movedim(-1, 1)
        if self.ndim == 3 and self.channel_dim == 1:
            return features[..., None]
        if self.ndim == 3 and self.size[1] == 1 and not self.prefix_tokens:
            return features.transpose(1, 2)[..., None]  # of any length
        if self.ndim == 3:
            return cast(Tensor, features[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.size))
        return features[:, :, None, None]


class MeanOverSpace(nn.Module):
    """Mean over space: maps `(N, C, H, W)` to `(N, C)`.

    The gradient has the layout of the maps. The gradient of PyTorch's adaptive pooling to 1x1 is never channels last,
    which makes a ReLU before it more than twice as slow.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, maps.shape[2:]).flatten(1)


def token_grid(tokens: int, site: Site, objective: str) -> tuple[int, int]:
    """Height and width of the grid of patches, which has the image's proportions and at most 8 other tokens before it.

    For inputs that are no images `(N, C, H, W)` the grid has one column.

    Raises:
        CannotSitError: the tokens form no such grid.
    """
    if len(site.inputs) != 4:
        return tokens, 1
    height, width = site.inputs[2:]
    for prefix in range(min(MAX_PREFIX_TOKENS, tokens - 1) + 1):
        rows = math.isqrt((tokens - prefix) * height // width)
        if rows and (tokens - prefix) % rows == 0 and rows * width == (tokens - prefix) // rows * height:
            return rows, (tokens - prefix) // rows
    raise CannotSitError(
        f"{objective} cannot lay {tokens} tokens on a grid in the proportions of the {height}x{width} input "
        f"(block {site.index}): cut elsewhere, or use localgrad.classifier, which pools tokens"
    )


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Context: autocast is off, so that a loss is computed in the precision of its arguments; no-op on `meta`."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_num_classes(num_classes: int, at_least: int = 2) -> None:
    """Refuse a number of classes that is no integer, or less than `at_least`."""
    if not isinstance(num_classes, Integral) or num_classes < at_least:  # NumPy's integers too
        given = repr(num_classes) if isinstance(num_classes, int | float | str) else f"a {type(num_classes).__name__}"
        raise SettingsError(
            f"num_classes is {given}: a local head gives a whole number of scores, {at_least} or more; "
            "a factory is called first, as objective=localgrad.dgl(num_classes=10)"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise SettingsError(f"{name} is {value!r}: it is one of {', '.join(map(repr, choices))}")


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution that keeps the size of the map (or halves it with stride 2), batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
