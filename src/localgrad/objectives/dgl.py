"""Decoupled greedy learning (DGL): the criterion on the scores of a small convolutional head."""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Criterion, Site
from localgrad.objectives.layout import AsMap, MeanOverSpace, check_choice, check_num_classes, conv_norm_relu
from localgrad.objectives.targets import HeadCriterion

Head = Literal["original", "compact", "wide", "light"]


class DGL(nn.Module):
    """A criterion on the scores of the head MLP-SR-aux; see `dgl`."""

    reads_inputs = False

    def __init__(self, site: Site, num_classes: int, head: Head, criterion: Criterion | None) -> None:
        super().__init__()
        self.criterion = HeadCriterion(criterion, site, num_classes)
        as_map = AsMap(site, "dgl")
        build = {"original": _original, "compact": _compact, "wide": _wide, "light": _light}[head]
        self.classifier = nn.Sequential(as_map, *build(as_map.channels, as_map.size, num_classes))
        initialise(self)

    def predict(self, features: Tensor) -> Tensor:
        """Features to class scores `(N, num_classes)`."""
        return self.classifier(features)

    def forward(self, features: Tensor, targets: Any, inputs: Tensor) -> Tensor:
        """Features, targets of the criterion (classes `(N,)`) and inputs (unused) to a scalar loss."""
        return self.criterion(self.predict(features), targets)


def _original(channels: int, size: tuple[int, int], num_classes: int) -> list[nn.Module]:
    quarter, _ = _pooled(size)
    convs = [layer for _ in range(3) for layer in conv_norm_relu(channels, channels, 1)]
    width = 4 * channels
    mlp = [layer for _ in range(3) for layer in _linear_norm_relu(width, width, bias=True)]
    return [
        nn.AdaptiveAvgPool2d(quarter),
        *convs,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        *mlp,
        nn.Linear(width, num_classes),
    ]


def _compact(channels: int, size: tuple[int, int], num_classes: int) -> list[nn.Module]:
    quarter, corner = _pooled(size)
    convs = [layer for _ in range(3) for layer in conv_norm_relu(channels, channels, 1)]
    width = corner[0] * corner[1] * channels
    mlp = [layer for _ in range(2) for layer in _linear_norm_relu(width, width, bias=False)]
    return [
        nn.AdaptiveAvgPool2d(quarter),
        *convs,
        nn.AdaptiveAvgPool2d(corner),
        nn.Flatten(),
        *mlp,
        nn.Linear(width, num_classes),
    ]


def _wide(channels: int, size: tuple[int, int], num_classes: int) -> list[nn.Module]:
    convs = [layer for c in (channels, 128, 128) for layer in conv_norm_relu(c, 128, 1)]
    mlp = [layer for width in (128, 512, 512) for layer in _linear_norm_relu(width, 512, bias=True)]
    return [
        nn.AdaptiveAvgPool2d(8),
        *convs,
        MeanOverSpace(),
        *mlp,
        nn.Linear(512, num_classes),
    ]


def _light(channels: int, size: tuple[int, int], num_classes: int) -> list[nn.Module]:
    width = max(channels // 4, 1)
    # on maps of one pixel all taps but the middle one see padding alone, and bf16 on a CPU leaves their gradients
    # undefined
    kernel, stride = (3, 2) if size != (1, 1) else (1, 1)
    convs = [*conv_norm_relu(channels, width, 1), *conv_norm_relu(width, width, kernel, stride)]
    return [*convs, MeanOverSpace(), nn.Linear(width, num_classes)]


def _pooled(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A quarter of the size, rounded up; and the same limited to 2x2."""
    quarter = (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    return quarter, (min(quarter[0], 2), min(quarter[1], 2))


def _linear_norm_relu(in_features: int, out_features: int, bias: bool) -> list[nn.Module]:
    return [
        nn.Linear(in_features, out_features, bias=bias),
        nn.BatchNorm1d(out_features),
        nn.ReLU(inplace=True),
    ]


def dgl(num_classes: int, head: Head = "compact", criterion: Criterion | None = None) -> Callable[[Site], nn.Module]:
    """Decoupled greedy learning: `L = criterion(head(h), y)`, cross-entropy in the paper, with the head MLP-SR-aux.

    The papers' heads average the map to a quarter of its size, apply three 1x1 convolutions (each with batch norm and
    ReLU), average to 2x2, and end in an MLP. For features `(N, C, H, W)`:

    - `"original"` (of the DGL paper): C channels; three linear layers 4C to 4C with bias and batch norm, then one to
      classes.
    - `"compact"` (of AugLocal, for its tables on CIFAR): C channels; two linear layers 4C to 4C (C to C
      where a quarter of the map is one pixel) without bias, with batch norm; 9,962 parameters at C = 16 and 10 classes.
    - `"wide"` (of MAN++): the map is averaged to 8x8 and later to 1x1; 128 channels, then three linear layers to 512
      features; 635,146 parameters at C = 16 and 10 classes.
    - `"light"` (from no paper; for wide features, where the MLPs above would outweigh the network): a 1x1 convolution
      to C/4 channels and a 3x3 convolution with stride 2 (1x1 on maps of one pixel), each with batch norm and ReLU, the
      mean over space, and one linear layer.

    Tokens `(N, L, D)` are laid on the grid of patches, without class tokens.

    Args:
        num_classes: width of the head: classes (2 or more under cross-entropy), labels, or values to predict.
        head: `"original"`, `"compact"`, `"wide"` or `"light"`, see above.
        criterion: loss of the head's scores `(N, num_classes)` and the targets. By default it is the model's criterion,
            which is cross-entropy unless `split` gets another.

    Returns:
        A function of a site that builds the module. The module's head is `.classifier`.

    Raises:
        SettingsError: `num_classes` is less than 1, or `head` is unknown.
        CannotSitError: when built, tokens form no grid, or `num_classes` is 1 under cross-entropy.

    Source: Belilovsky et al. 2020, Decoupled Greedy Learning of CNNs (https://arxiv.org/abs/1901.08164), section 4;
    released code, `auxiliary_nets_study/models.py`; Ma et al. 2024, AugLocal (https://arxiv.org/abs/2402.17318),
    released code, `networks/auxiliary_nets.py`.
    """
    check_num_classes(num_classes, at_least=1)
    check_choice("head", head, ("original", "compact", "wide", "light"))
    return lambda site: DGL(site, num_classes, head, criterion)
