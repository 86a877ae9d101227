"""Which dimension of features holds channels."""

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
    """The dimension of a unit's output that holds channels, 1 or the last; None where nothing tells.

    Weights fix the number of channels, and seldom a length or a height: of the two dimensions it is the one that the
    next weights do not take in another size. Where they take neither (a linear layer on a flattened map, a layer that
    mixes positions), the nearest layer that has channels in a known place tells, first of what follows.

    Args:
        features: what the unit gives for a batch; its values do not matter.
        before: the units up to it, itself the last.
        after: the units that follow.
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
    """Where most features of so many dimensions have their channels: maps first, tokens and vectors last."""
    return 1 if ndim > 3 else ndim - 1


def _takes(module: nn.Module, features: Tensor, dim: int) -> bool:
    """Whether a module on `meta` runs on features of twice the size along a dimension."""
    size = [*features.shape]
    size[dim] *= 2
    with redirect_stderr(StringIO()), warnings.catch_warnings():  # traced modules print what they fail at
        warnings.simplefilter("ignore")
        try:
            module(torch.empty(size, dtype=features.dtype, device="meta"))
        except Exception:  # of whatever class: the module does not take it
            return False
    return True
