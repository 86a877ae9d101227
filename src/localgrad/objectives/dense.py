"""Local objective for targets with one class per pixel or token."""

# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Criterion, Site
from localgrad.errors import LocalGradError
from localgrad.objectives.decoder import decoder
from localgrad.objectives.infopro import reconstruction_loss
from localgrad.objectives.layout import AsMap, check_num_classes, conv_norm_relu
from localgrad.objectives.targets import HeadCriterion
from localgrad.objectives.tokens import check_shift, shifted


class Dense(nn.Module):
    """A loss of the scores of each pixel or token; see `dense`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        site: Site,
        num_classes: int,
        criterion: Criterion,
        width: int | None,
        shift: bool,
        ignore_index: int,
        reconstruction: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.criterion, self.shift, self.ignore_index = criterion, shift, ignore_index
        self.reconstruction = reconstruction
        self._checked = False
        image = len(site.inputs) == 4
        if len(site.features) == 2 or (len(site.features) == 5):
            raise LocalGradError(
                f"dense cannot sit on features {tuple(site.features)} (block {site.index}): it takes maps "
                "(N, C, H, W) or tokens (N, L, D); localgrad.classifier takes vectors"
            )
        if reconstruction and (not image or site.inputs[1] != len(mean)):
            raise LocalGradError(
                f"reconstruction is {reconstruction} with {len(mean)} channel means and inputs {tuple(site.inputs)}: "
                "it reconstructs images (N, C, H, W); give mean and std of each channel, or reconstruction=0"
            )
        self.as_map = AsMap(site, "dense") if image or len(site.features) == 4 else None
        self.decoder = None
        if self.as_map is None:
            channels = site.features[site.channel_dim]
            self.channel_dim = site.channel_dim
            self.classifier = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, num_classes))
        else:
            channels = self.as_map.channels
            width = width or max(channels // 2, 32)
            self.classifier = nn.Sequential(*conv_norm_relu(channels, width, 3), nn.Conv2d(width, num_classes, 1))
            if reconstruction:
                size = (site.inputs[2], site.inputs[3])
                self.decoder = decoder(channels, self.as_map.size, size, site.inputs[1])
        initialise(self)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def predict(self, features: Tensor) -> Tensor:
        """Features to scores: `(N, num_classes, h, w)` at the size of the map, or `(N, L, num_classes)` for tokens."""
        if self.as_map is not None:
            return self.classifier(self.as_map(features))
        return self.classifier(features if self.channel_dim != 1 else features.transpose(1, 2))

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """Features, targets and inputs to a scalar loss in float32.

        Targets are `(N, H, W)` classes (or what the criterion takes, of size `(..., H, W)`) for maps, and `(N, L)` for
        tokens.
        """
        scores = self.predict(features).float()
        if self.as_map is None:
            return self._token_loss(scores, targets, inputs)
        if targets.ndim < 3:
            raise LocalGradError(
                f"dense got targets {tuple(targets.shape)} for maps {tuple(scores.shape)}: give one class a pixel, "
                "(N, H, W); localgrad.dgl takes one class an image"
            )
        size = (targets.shape[-2], targets.shape[-1])
        if scores.shape[2:] != size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        total = self.criterion(scores, targets)
        if self.decoder is not None:
            assert self.as_map is not None
            images = inputs.float() * self.std + self.mean
            total = total + self.reconstruction * reconstruction_loss(self.decoder(self.as_map(features)), images)
        return total

    def _token_loss(self, scores: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        if targets.shape[:2] != scores.shape[:2]:
            raise LocalGradError(
                f"dense got targets {tuple(targets.shape)} for scores {tuple(scores.shape)}: give one class for each "
                f"of {tuple(scores.shape[:2])}"
            )
        if targets.ndim == 2 and not targets.is_floating_point():
            if not self._checked:
                check_shift(targets, inputs, self.shift, self.ignore_index, "dense")
                self._checked = True
            targets = shifted(targets, self.ignore_index) if self.shift else targets
        return self.criterion(scores.flatten(0, 1), targets.flatten(0, 1))


class CrossEntropy(nn.Module):
    """Cross-entropy with class weights and an ignored class; the loss is 0, not nan, if all targets are ignored."""

    weight: Tensor | None

    def __init__(self, weight: Sequence[float] | Tensor | None, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight, dtype=torch.float32))

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Scores `(N, C, ...)` and classes `(N, ...)` to the mean loss, weighted by class."""
        weight = None if self.weight is None else self.weight.to(scores.dtype)
        total = F.cross_entropy(scores, targets, weight, ignore_index=self.ignore_index, reduction="sum")
        counted = targets != self.ignore_index
        if weight is None:
            return total / counted.sum().clamp(min=1)
        mass = weight[targets.masked_fill(~counted, 0)] * counted
        return total / mass.sum().clamp(min=torch.finfo(scores.dtype).tiny)


def dense(
    num_classes: int,
    *,
    criterion: Criterion | None = None,
    weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    width: int | None = None,
    shift: bool = False,
    reconstruction: float = 0.0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Callable[[Site], nn.Module]:
    """One class per pixel or token: `L = CE(resize(head(h)), y)`, with InfoPro's reconstruction loss added if wanted.

    For maps `(N, C, H, W)` the head is a 3x3 convolution to `width` channels with batch norm and ReLU, and a 1x1
    convolution to scores, which are resized bilinearly to the targets' size. Tokens `(N, L, D)` of images are laid on
    the grid of patches and get the same head. Other tokens pass a LayerNorm and a linear layer, which for a language
    model is an output layer of the block's own.

    With `reconstruction` above 0 the loss is `CE + reconstruction R(h)`. R is InfoPro's binary cross-entropy between
    the image in [0, 1] and its reconstruction from h by a small decoder (see `infopro`).

    Args:
        num_classes: width of the scores, at least 2 (1 with a `criterion`).
        criterion: a function of scores and targets, for several labels a pixel or for regression. It gets scores
            `(N, num_classes, H, W)` of maps; of tokens it gets scores `(N L, num_classes)` and targets whose first two
            dimensions are flattened. By default it is the cross-entropy with `weight` and `ignore_index`; if both are
            left at their defaults it is the model's criterion.
        weight: weight of each class in the cross-entropy.
        ignore_index: the class of pixels or tokens that do not count in the cross-entropy.
        width: channels of the head, for maps only; if None, half of the features' channels, at least 32.
        shift: whether token labels repeat the input tokens, so that each position predicts the next one; see `readout`.
        reconstruction: weight of R, 0 or more.
        mean: mean of each channel by which the images were normalised, in units of [0, 1]; for R.
        std: standard deviation of each channel by which the images were normalised, in units of [0, 1]; for R.

    Returns:
        A function of a site that builds the module. Its head is `.classifier`, its decoder `.decoder` or None.

    Raises:
        LocalGradError: an argument is out of range or has no effect; when built, the features are neither a map nor
            tokens, or `reconstruction` is given and the inputs are no images; on a batch, targets have another shape.

    Source: Wang et al. 2021 (https://arxiv.org/abs/2101.10832), released code for semantic segmentation.
    """
    if criterion is None:
        check_num_classes(num_classes)
    elif not callable(criterion) or weight is not None:
        raise LocalGradError(
            f"criterion is {criterion!r} and weight {weight!r}: give a function of scores and targets, which has the "
            "weights itself, as nn.CrossEntropyLoss(weight=...)"
        )
    if weight is not None and (len(weight) != num_classes or not all(0 <= float(w) < math.inf for w in weight)):
        raise LocalGradError(f"weight has {len(weight)} values for {num_classes} classes: give one each, 0 or more")
    if not 0 <= reconstruction < math.inf or len(mean) != len(std) or not all(0 < s < math.inf for s in std):
        raise LocalGradError(
            f"reconstruction is {reconstruction}, mean {tuple(mean)} and std {tuple(std)}: give a weight of 0 or more, "
            "and one mean and one std above 0 a channel, in units of [0, 1]"
        )
    if width is not None and (not isinstance(width, int) or width < 1):
        raise LocalGradError(f"width is {width!r}: it is a number of channels, 1 or more, or None")

    def build(site: Site) -> nn.Module:
        if criterion is None and weight is None and ignore_index == -100 and site.criterion is not F.cross_entropy:
            loss = HeadCriterion(None, site, num_classes)
            return Dense(site, num_classes, loss, width, shift, loss.ignore_index, reconstruction, mean, std)
        loss = criterion or CrossEntropy(weight, ignore_index)
        return Dense(site, num_classes, loss, width, shift, ignore_index, reconstruction, mean, std)

    return build
