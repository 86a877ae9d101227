"""InfoPro: the weighted sum of a reconstruction loss of the image and a task loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Criterion, Site
from localgrad.errors import CannotSitError, SettingsError
from localgrad.objectives import fast
from localgrad.objectives.decoder import decoder
from localgrad.objectives.layout import (
    AsMap,
    MeanOverSpace,
    check_choice,
    check_num_classes,
    conv_norm_relu,
    full_precision,
)
from localgrad.objectives.targets import HeadCriterion, check_classes, left_out

TaskLoss = Literal["cross_entropy", "contrast"]


TaskHead = Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f", "imagenet"]


HEADS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f", "imagenet")


TEMPERATURE = 0.07


LARGE_MAP = 32
"""On maps higher or wider than this a head's first convolution has stride 2 also at 64 channels or more; our choice."""


class InfoPro(nn.Module):
    """Weighted sum of a reconstruction and a task loss; see `infopro`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        site: Site,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        weights: tuple[float, float],
        loss: TaskLoss,
        head: TaskHead,
        feature_dim: int,
        criterion: Criterion | None,
    ) -> None:
        super().__init__()
        if len(site.inputs) != 4 or site.inputs[1] != len(mean) or len(site.features) == 2:
            raise CannotSitError(
                f"infopro cannot sit on features {tuple(site.features)} of inputs {tuple(site.inputs)} with "
                f"{len(mean)} channel means (block {site.index}): it reconstructs images of as many channels "
                "from maps or tokens; cut before the features are pooled to a vector, or use dgl or classifier"
            )
        self.reconstruction, self.task = weights
        self.loss: TaskLoss = loss
        self.criterion = HeadCriterion(criterion, site, num_classes)
        as_map = AsMap(site, "infopro")
        size = (site.inputs[2], site.inputs[3])
        width = num_classes if loss == "cross_entropy" else feature_dim
        self.as_map = as_map
        self.decoder = self.classifier = None  # a part whose weight in the loss is 0 is not built
        if self.reconstruction:
            self.decoder = decoder(as_map.channels, as_map.size, size, site.inputs[1])
        if self.task:
            self.classifier = nn.Sequential(*_head(head, as_map.channels, as_map.size, feature_dim, width))
        initialise(self)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def predict(self, features: Tensor) -> Tensor | None:
        """Features to class scores `(N, num_classes)`; None if the task loss is contrastive or has weight 0."""
        if self.classifier is None or self.loss != "cross_entropy":
            return None
        return self.classifier(self.as_map(features))

    def forward(self, features: Tensor, targets: Any, inputs: Tensor) -> Tensor:
        """Features, targets of the criterion (classes `(N,)`) and normalised images `(N, 3, H, W)` to a scalar loss."""
        features = self.as_map(features)
        total = features.new_zeros((), dtype=torch.float32)
        if self.decoder is not None:
            images = inputs.float() * self.std + self.mean
            total = total + self.reconstruction * reconstruction_loss(self.decoder(features), images)
        if self.classifier is not None:
            outputs = self.classifier(features)
            if self.loss == "cross_entropy":
                total = total + self.task * self.criterion(outputs, targets)
            else:
                total = total + self.task * supervised_contrast(outputs, targets, self.criterion.ignore_index)
        return total


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Mean of `-t log s(x) - (1 - t) log(1 - s(x))` over all logits x and pixels t, s the logistic function."""
    loss = fast.binary_cross_entropy if fast.is_on_cpu(logits) else F.binary_cross_entropy_with_logits
    with full_precision(logits):
        return loss(logits.float(), images)


def supervised_contrast(embeddings: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Supervised contrastive loss, one view, temperature 0.07, in float32.

    With `z_i` the embeddings divided by their norm and P(i) the other samples of i's class,
    `L = 1/N sum_i -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t))`.
    A sample that is the only one of its class contributes 0 and counts in the mean. Samples without a label
    (`ignore_index`, or any class below 0) are left out of the sums and of N.

    Args:
        embeddings: `(N, D)`.
        targets: classes `(N,)`.
        ignore_index: the class of samples that have no label.

    Source: Khosla et al. 2020 (https://arxiv.org/abs/2004.11362), equation 2; as used by Wang et al. 2021
    (https://arxiv.org/abs/2101.10832).
    """
    check_classes(targets, 'infopro(loss="contrast")')
    ignored = left_out(targets, ignore_index)
    with full_precision(embeddings):
        unit = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)
        itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        scores = unit @ unit.T / TEMPERATURE
        scores = scores.masked_fill(itself | ignored, torch.finfo(scores.dtype).min)
        log_probability = scores - scores.logsumexp(1, keepdim=True)
        positive = (targets[:, None] == targets[None, :]) & ~itself & ~ignored
        per_sample = log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
        labelled = (~ignored).sum().clamp(min=1)
        return -per_sample.mean() * (len(targets) / labelled)


def _head(name: TaskHead, channels: int, size: tuple[int, int], feature_dim: int, out_features: int) -> list[nn.Module]:
    """The task head `XcYf` of X convolutions and Y linear layers, or the released ImageNet head.

    The first convolution doubles the channels and has stride 2. From 64 channels on it keeps the channels, and has
    stride 2 only if the map is higher or wider than 32.
    """
    pool = [MeanOverSpace()]
    if name == "imagenet":
        widths = [(channels // 4, 1, 1), (256, 3, 2), (512, 3, 2), (2048, 1, 1)]
        layers: list[nn.Module] = []
        for width, kernel, stride in widths:
            layers += conv_norm_relu(channels, width, kernel, stride)
            channels = width
        return [*layers, *pool, nn.Linear(channels, out_features)]
    num_convs, num_linears = int(name[0]), int(name[2])
    layers = []
    for position in range(num_convs):
        grow = position == 0 and channels < 64
        shrink = position == 0 and (grow or max(size) > LARGE_MAP)
        width = 2 * channels if grow else channels
        layers += conv_norm_relu(channels, width, 3, 2 if shrink else 1)
        channels = width
    linears: list[nn.Module] = []
    for _ in range(num_linears - 1):
        linears += [nn.Linear(channels, feature_dim), nn.ReLU(inplace=True)]
        channels = feature_dim
    return [*layers, *pool, *linears, nn.Linear(channels, out_features)]


def infopro(
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    reconstruction: Sequence[float] = (5.0, 0.0),
    task: Sequence[float] = (0.5, 0.5),
    loss: TaskLoss = "cross_entropy",
    head: TaskHead = "1c2f",
    feature_dim: int = 128,
    criterion: Criterion | None = None,
) -> Callable[[Site], nn.Module]:
    """InfoPro: `L_j = lambda_j R(h) + mu_j T(h)`, information propagation by a reconstruction loss and a task loss.

    R is the binary cross-entropy between the image in [0, 1] and its reconstruction by a small decoder, computed from
    logits. T is the criterion (cross-entropy in the paper) of class scores, or the supervised contrastive loss
    (`supervised_contrast`) of `feature_dim` outputs.
    Two given weights are interpolated from the first local block to the last: `lambda_j = first (1 - r) + last r` with
    `r = j / (K - 2)`, and r = 0 for K = 2. K - 1 given weights are those of the local blocks in order. Tokens are laid
    on the grid of patches.

    Args:
        num_classes: number of classes, at least 2.
        mean: mean of each channel by which the inputs were normalised, in units of [0, 1].
        std: standard deviation of each channel by which the inputs were normalised, in units of [0, 1].
        reconstruction: weights lambda of R, at the first and the last local block or at each; not negative.
        task: weights mu of T, at the first and the last local block or at each; not negative.
        loss: `"cross_entropy"` for the criterion, or `"contrast"`.
        head: `"0c1f"`, `"0c2f"`, `"1c1f"`, `"1c2f"`, `"1c3f"`, `"2c2f"`: numbers of 3x3 convolutions (c) and linear
            layers (f), or `"imagenet"`, four convolutions up to 2048 channels.
        feature_dim: width of the hidden linear layers and of the contrastive embedding.
        criterion: loss of the head's scores `(N, num_classes)` and the targets. By default it is the model's criterion,
            which is cross-entropy unless `split` gets another.

    Returns:
        A function of a site that builds the module. The module's parts `.decoder` and `.classifier` are None if their
        weight is 0.

    Raises:
        SettingsError: an argument is out of range; when built, there are weights for another number of blocks, or both
            weights of a block are 0.
        CannotSitError: when built, the features are a vector, or the inputs are no images of `len(mean)` channels.

    Source: Wang et al. 2021, Revisiting Locally Supervised Learning (https://arxiv.org/abs/2101.10832), equation 8, and
    released code, `networks/auxiliary_nets.py`. The default weights are those of the MAN code, except for the last
    weight of the task, which is 0 there and would leave the last local block without a loss. The MAN code computes r
    from the index of the stage instead of the block.
    """
    check_num_classes(num_classes)
    check_choice("loss", loss, ("cross_entropy", "contrast"))
    check_choice("head", head, HEADS)
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        raise SettingsError(f"mean is {mean!r} and std {std!r}: give a sequence of numbers, one a channel") from None
    if len(mean) != len(std) or not mean or not all(0 < s < math.inf for s in std) or not all(map(math.isfinite, mean)):
        raise SettingsError(
            f"mean is {mean} and std {std}: give one of each a channel, std above 0, in units of [0, 1]"
        )
    for name, given in (("reconstruction", reconstruction), ("task", task)):
        if not isinstance(given, tuple | list) or not given or not all(0 <= weight < math.inf for weight in given):
            raise SettingsError(
                f"{name} is {given}: give its weight at the first and the last local block, (5.0, 0.0), or at each, "
                "not negative"
            )
    if feature_dim < 1:
        raise SettingsError(f"feature_dim is {feature_dim}: it must be at least 1; try 128")

    def build(site: Site) -> nn.Module:
        weights = _weight("reconstruction", reconstruction, site), _weight("task", task, site)
        if not any(weights):
            raise SettingsError(
                f"reconstruction {reconstruction}, task {task} give block {site.index} of {site.num_blocks} no loss: "
                "give one of them a last weight above 0, such as task=(0.5, 0.5)"
            )
        return InfoPro(site, num_classes, mean, std, weights, loss, head, feature_dim, criterion)

    return build


def _weight(name: str, given: Sequence[float], site: Site) -> float:
    num_local = site.num_blocks - 1
    if len(given) == num_local:
        return given[site.index]
    if len(given) != 2:
        raise SettingsError(
            f"{name} has {len(given)} weights and there are {num_local} local blocks: give one for each, or two, for "
            "the first and the last, as `plan` takes them, which tries other numbers of blocks"
        )
    ratio = site.index / (num_local - 1) if num_local > 1 else 0.0
    return given[0] * (1 - ratio) + given[1] * ratio
