"""Barlow Twins: a loss that makes features of two views of an image agree, and decorrelates different features."""

# pyright: reportUnnecessaryIsInstance=false

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Site
from localgrad.errors import LocalGradError
from localgrad.objectives.layout import AsMap, MeanOverSpace, conv_norm_relu, full_precision


class Barlow(nn.Module):
    """The Barlow Twins loss between the two halves of a batch; see `barlow`."""

    reads_inputs = False

    def __init__(
        self, site: Site, width: int, projector: Sequence[int], redundancy: float, scale: float, noise: float
    ) -> None:
        super().__init__()
        self.redundancy, self.scale, self.noise = redundancy, scale, noise
        as_map = AsMap(site, "barlow")
        self.pooled = nn.Sequential(as_map, *conv_norm_relu(as_map.channels, width, 1), MeanOverSpace())
        layers: list[nn.Module] = []
        for before, after in pairwise((width, *projector)):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers[:-2])
        initialise(self)

    def forward(self, features: Tensor, targets: object = None, inputs: object = None) -> Tensor:
        """Features of two views stacked along N (targets and inputs unused) to a scalar loss in float32."""
        if len(features) % 2 or len(features) < 4:
            raise LocalGradError(
                f"barlow got {len(features)} samples: stack two views of at least two images along the first "
                "dimension, torch.cat([first, second])"
            )
        if self.noise and self.training:
            features = features + self.noise * features.detach().std() * torch.randn_like(features)
        # the norms see one view at a time, as in the released code
        first, second = (self.projector(self.pooled(view)) for view in features.chunk(2))
        return self.scale * barlow_loss(first, second, self.redundancy)


def barlow_loss(first: Tensor, second: Tensor, redundancy: float = 0.0051) -> Tensor:
    """`sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2`, C the correlation over the batch of two views' features.

    Args:
        first: features `(N, D)` of one view. Each is centred and divided by its standard deviation over the batch.
        second: features `(N, D)` of the other view, of the same images in the same order.
        redundancy: lambda, the weight of the off-diagonal terms.

    Source: Zbontar et al. 2021 (https://arxiv.org/abs/2103.03230), equation 1.
    """
    with full_precision(first):
        views = [view if view.dtype == torch.float64 else view.float() for view in (first, second)]
        one, two = ((v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt() for v in views)
        correlation = one.T @ two / len(one)
        diagonal = correlation.diagonal()
        rest = correlation.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + redundancy * rest


def barlow(
    width: int = 2048,
    projector: Sequence[int] = (8192, 8192, 8192),
    *,
    redundancy: float = 0.0051,
    scale: float = 0.024,
    noise: float = 0.0,
) -> Callable[[Site], nn.Module]:
    """Barlow Twins as a local loss without labels: `L = scale (sum_i (1 - C_ii)^2 + redundancy sum_{i!=j} C_ij^2)`.

    The batch is two views of N images, stacked: `inputs = torch.cat([first, second])`. C is the correlation over the
    images between the projections of the two views. The head is a 1x1 convolution to `width` channels with batch norm
    and ReLU, the mean over space, and a projector of linear layers with batch norm and ReLU between them. The head's
    norms see one view at a time; the model's norms see both views together. Targets are not read.

    The defaults are the released ones for ImageNet. For images of 32 pixels `barlow(512, (1024, 1024))` is enough.

    Args:
        width: channels of the 1x1 convolution.
        projector: widths of the projector's layers; the last is D.
        redundancy: weight of the off-diagonal terms, lambda in the paper.
        scale: factor of the loss.
        noise: while training, the head gets `h + noise std(h) e` with e standard normal and std over the whole tensor.
            The released code uses 0.25 and gives the noised features to the next block too. For that, end the block
            with a module of your own that adds the noise, and leave this at 0.

    Returns:
        A function of a site that builds the module. Its parts are `.pooled` and `.projector`. It has no class scores.

    Raises:
        LocalGradError: an argument is out of range; on a batch, the number of samples is odd or less than four.

    Source: Siddiqui et al., Blockwise Self-Supervised Learning at Scale, TMLR 2024 (https://arxiv.org/abs/2302.01647),
    released code, `model.py`; Zbontar et al. 2021 (https://arxiv.org/abs/2103.03230).
    """
    widths = (width, *projector)
    if len(widths) < 2 or not all(isinstance(size, int) and size > 0 for size in widths):
        raise LocalGradError(
            f"width is {width!r} and projector {projector!r}: give channels and one width a layer, (2048, 2048)"
        )
    for name, value in (("redundancy", redundancy), ("scale", scale), ("noise", noise)):
        if not 0 <= value < float("inf") or (name == "scale" and value == 0):
            raise LocalGradError(f"{name} is {value!r}: it is a finite number, not negative; scale is above 0")
    return lambda site: Barlow(site, width, tuple(projector), redundancy, scale, noise)
