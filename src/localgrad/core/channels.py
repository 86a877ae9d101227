"""Find the dimension of features that holds channels."""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO

import torch
from torch import Tensor, nn

from localgrad.core.meta import to_meta
from localgrad.core.tables import hooks_after, hooks_before

_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)
_LAST = (nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.MultiheadAttention)


def channel_dim_of(features: Tensor, before: Sequence[nn.Module], after: Sequence[nn.Module]) -> int | None:
    """The dimension of a unit's output that holds channels, 1 or the last; None if it cannot be determined.

    Weights fix the number of channels, but seldom a length or a height. So each of the two dimensions is doubled: the
    channels are in the one that the next layers, up to the first weights, refuse in another size. If they refuse both
    (a linear layer on a flattened map, a layer that mixes positions) or neither, the nearest layer with channels in a
    known dimension decides: first of the layers that follow, then of those before.

    Args:
        features: the unit's output for a batch; only shape and dtype matter.
        before: modules of the units up to this one, which is the last.
        after: modules of the units that follow.
    """
    last = features.ndim - 1
    if last == 1:
        return 1
    weighted = [any(parameter.ndim > 1 for parameter in module.parameters()) for module in after]
    following = nn.Sequential(*after[: weighted.index(True) + 1 if True in weighted else None])
    probe = to_meta(following).eval()
    for layer in probe.modules():
        hooks_after(layer).clear()
        hooks_before(layer).clear()
    fixed = [dim for dim in (1, last) if not _takes(probe, features, dim)]
    if len(fixed) == 1:
        return fixed[0]
    earlier = (layer for module in reversed(before) for layer in reversed([*module.modules()]))
    for layer in (*following.modules(), *earlier):
        if isinstance(layer, _FIRST) or (isinstance(layer, nn.LayerNorm) and type(layer).__name__.endswith("2d")):
            return 1
        if isinstance(layer, _LAST):
            return last
        if isinstance(layer, nn.Linear):
            dims = [dim for dim in (1, last) if features.shape[dim] == layer.in_features]
            if len(dims) == 1:
                return dims[0]
    return None


def usual_channel_dim(ndim: int) -> int:
    """The usual channel dimension of features with `ndim` dimensions: 1 for maps, the last for tokens and vectors."""
    return 1 if ndim > 3 else ndim - 1


def _takes(module: nn.Module, features: Tensor, dim: int) -> bool:
    """Whether a module on the meta device runs on features of twice the size along a dimension."""
    size = [*features.shape]
    size[dim] *= 2
    with redirect_stderr(StringIO()), warnings.catch_warnings():  # traced modules print the line that failed
        warnings.simplefilter("ignore")
        try:
            module(torch.empty(size, dtype=features.dtype, device="meta"))
        except Exception:  # of any class: the module refuses this size
            return False
    return True
