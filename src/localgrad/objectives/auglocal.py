"""AugLocal: local heads shaped like units sampled from the rest of the network."""

# pyright: reportUnnecessaryIsInstance=false

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.copies import copied
from localgrad.core.initialise import initialise
from localgrad.core.modules import named_modules
from localgrad.core.site import Criterion, Site
from localgrad.errors import CannotSitError, SettingsError
from localgrad.objectives.classifier import Classifier
from localgrad.objectives.layout import check_num_classes
from localgrad.objectives.targets import HeadCriterion


class AugLocal(nn.Module):
    """A criterion on the scores of a head of new units, shaped like later units of the network; see `auglocal`."""

    reads_inputs = False

    def __init__(
        self, site: Site, num_classes: int, depth: int, pyramid: float, criterion: Criterion | None, pool: int
    ) -> None:
        super().__init__()
        self.criterion = HeadCriterion(criterion, site, num_classes)
        later = site.following[:-1]  # the last unit is the model's own head
        local_depth = depth_at(site.index, site.num_blocks, depth, pyramid)
        picks = picked(site.index, len(later), local_depth)
        units = [unit for start, stop in zip([0, *picks], picks, strict=False) for unit in _fresh(site, start, stop)]
        end = replace(site, features=later[-1].features, channel_dim=later[-1].channel_dim) if picks else site
        first = [nn.AvgPool2d(pool, ceil_mode=True)] * (pool > 1)
        self.classifier = nn.Sequential(*first, *units, *_output(end, num_classes, len(picks)))
        initialise(self)
        # the head's first unit may work in place, which must not change the next block's features
        self._clones = bool(picks) and pool == 1 and site.following[0].writes_input

    def predict(self, features: Tensor) -> Tensor:
        """Features to class scores `(N, num_classes)`."""
        return self.classifier(features.clone() if self._clones else features)

    def forward(self, features: Tensor, targets: Any, inputs: Tensor) -> Tensor:
        """Features, targets of the criterion (classes `(N,)`) and inputs (unused) to a scalar loss."""
        return self.criterion(self.predict(features), targets)


def depth_at(index: int, num_blocks: int, depth: int, pyramid: float) -> int:
    """Number of units in a block's head: `max(1, round(d (1 - c r) + c r))`, with r from 0 to 1 over the local blocks.

    Args:
        index: index of the block, from 0 to K - 2.
        num_blocks: K.
        depth: d, the number of units at the first block.
        pyramid: c; the number falls to `d - c (d - 1)` at the last local block.
    """
    share = index / (num_blocks - 2) if num_blocks > 2 else 0.0
    return max(1, round(depth * (1 - pyramid * share) + pyramid * share))


def picked(index: int, count: int, depth: int) -> list[int]:
    """Positions of the sampled units, 1 for the first after the cut: `round(l + count / depth * i) - l`, i = 1..depth.

    Args:
        index: l, the index of the layer before the cut. It matters only because halves are rounded to even numbers.
        count: number of units after the cut that can be sampled. The last of them always is.
        depth: number of units to sample; all units if there are fewer.
    """
    if depth >= count:
        return list(range(1, count + 1))
    return [round(index + count / depth * step) - index for step in range(1, depth + 1)]


def _fresh(site: Site, start: int, stop: int) -> list[nn.Module]:
    """New units, drawn anew, from the features after `start` units behind the cut to the features after `stop` units.

    If none of the units in between changes the shape of the features, this is one copy of the sampled unit, the last of
    them. Otherwise it is one copy of the last unit that changes the shape, if it has the class of the sampled unit and
    can take the other number of channels. If not, it is a copy of each unit that changes the shape, and of the sampled
    unit.
    """
    way, chosen = site.following[start:stop], site.following[stop - 1]
    shapes = [site.features, *(unit.features for unit in site.following)]
    changing = [start + i for i, unit in enumerate(way) if shapes[start + i][1:] != unit.features[1:]]
    if not changing:
        return [copied([chosen], "random")]
    last = changing[-1]
    if type(site.following[last].module) is type(chosen.module):
        unit = copied([site.following[last]], "random")
        if len(changing) == 1 or _widened(unit, shapes[last], shapes[start][site.channel_dim]):
            return [unit]
    positions = changing if last == stop - 1 else [*changing, stop - 1]
    return [copied([site.following[position]], "random") for position in positions]


def _widened(unit: nn.Module, features: torch.Size, channels: int) -> bool:
    """Replace the layers that read the unit's input by layers for `channels` channels; False if that is impossible."""
    readers: list[nn.Module] = []
    like = next(unit.parameters())
    entry = torch.zeros(features, dtype=like.dtype, device=like.device)

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given and given[0] is entry:
            readers.append(layer)

    leaves = [layer for layer in unit.modules() if not any(True for _ in layer.children())]
    handles = [layer.register_forward_pre_hook(note) for layer in leaves]
    with torch.no_grad():
        unit.eval()(entry)
    unit.train()
    for handle in handles:
        handle.remove()
    if not readers or not all(isinstance(layer, nn.Conv2d) and layer.groups == 1 for layer in readers):
        return False
    names = {layer: name for name, layer in named_modules(unit)}
    for layer in readers:
        assert isinstance(layer, nn.Conv2d)
        made = nn.Conv2d(
            channels,
            layer.out_channels,
            layer.kernel_size,  # pyright: ignore[reportArgumentType]
            layer.stride,  # pyright: ignore[reportArgumentType]
            layer.padding,  # pyright: ignore[reportArgumentType]
            layer.dilation,  # pyright: ignore[reportArgumentType]
            bias=layer.bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        unit.set_submodule(names[layer], made)
    return True


def _output(site: Site, num_classes: int, depth: int) -> list[nn.Module]:
    """The pooling and linear layer of `classifier`, with a batch norm before the linear layer if `depth` is 0 or 1."""
    *pool, linear = Classifier(site, num_classes, None).classifier
    if depth > 1 or isinstance(pool[0], nn.LayerNorm):
        return [*pool, linear]
    return [*pool, nn.BatchNorm1d(site.features[site.channel_dim]), linear]


def auglocal(
    num_classes: int, depth: int = 2, pyramid: float = 0.5, criterion: Criterion | None = None, pool: int = 1
) -> Callable[[Site], nn.Module]:
    """AugLocal: `L = criterion(W pool(a(h)) + b, y)`, with `a` a chain of new units, shaped like later units.

    The head of local block l (from 0, of K blocks) has `d_l = max(1, round(d (1 - c r) + c r))` units with
    `r = l / (K - 2)`: the depth falls linearly over the blocks. Of the n units after the cut, without the model's head,
    the head samples those at `round(l + n / d_l * i) - l`, i = 1..d_l (all units if n <= d_l; Python rounds halves to
    even). For each sampled unit the head gets a unit of the same class with its own weights, which leads from the
    channels before it in the head to the channels of the sampled unit.

    The stride follows from the change of shape inside the head, not from the sampled unit. If the shape has changed
    since the sampled unit before, the unit that changes it (the first of a stage) is copied instead. If it has changed
    twice, as from 16 to 64 channels, one unit makes the whole change, with the stride of the last change alone (as
    released). If no single unit can, there is one unit for each change (a ConvNeXt's downsampling layers, each stage of
    a VGG).

    The head ends with the mean over space and a linear layer, with a BatchNorm before the linear layer if the head has
    one unit or none (as released). Tokens are pooled as in `classifier`. The head is initialised like the network.

    The papers' K is nominal: "K" blocks with depth d are K - d blocks: all but the last have one layer each, and the
    last keeps d + 1 layers.

    With a momentum auxiliary network, the units after the copied one are sampled.

    Args:
        num_classes: width of the head: classes (2 or more under cross-entropy), labels, or values to predict.
        depth: d, the number of units at the first block.
        pyramid: c, from 0 (the same depth at each block) to 1 (one unit at the last local block).
        criterion: loss of the head's scores `(N, num_classes)` and the targets. By default it is the model's criterion,
            which is cross-entropy unless `split` gets another.
        pool: average maps `(N, C, H, W)` over squares of this side (in pixels) first, which divides the head's cost by
            the side's square. 1, as released, is no pooling.

    Returns:
        A function of a site that builds the module. The module's head is `.classifier`.

    Raises:
        SettingsError: `num_classes`, `depth` or `pool` is less than 1, or `pyramid` not from 0 to 1.
        CannotSitError: when built, the site has no following units, or no map to pool, or `num_classes` is 1 under
            cross-entropy.

    Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024
    (https://arxiv.org/abs/2402.17318), section 4; released code, `networks/resnet.py` and `networks/auxiliary_nets.py`.
    """
    check_num_classes(num_classes, at_least=1)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise SettingsError(f"depth is {depth!r}: a head has at least one unit, depth=1")
    if isinstance(pyramid, bool) or not isinstance(pyramid, int | float) or not 0 <= pyramid <= 1:
        raise SettingsError(f"pyramid is {pyramid!r}: it is from 0 (the same depth everywhere) to 1")

    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1:
        raise SettingsError(f"pool is {pool!r}: it is the side of a square of pixels, 1 for none, or 2")

    def build(site: Site) -> nn.Module:
        if not site.following:
            raise CannotSitError(
                f"auglocal samples the units after a cut, and the site of block {site.index} has none: "
                "build it with split, or give Site(..., following=units[end + 1:])"
            )
        if pool > 1 and (len(site.features) != 4 or site.channel_dim != 1):
            raise CannotSitError(f"pool is {pool} and features are {tuple(site.features)}: it takes (N, C, H, W)")
        return AugLocal(site, num_classes, depth, pyramid, criterion, pool)

    return build
