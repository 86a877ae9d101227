"""MAN and MAN++: factories of momentum auxiliary networks, as in the papers and their released code."""

# pyright: reportUnnecessaryIsInstance=false

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from localgrad.core.copies import copied
from localgrad.core.momentum import Momentum, MomentumAuxiliary
from localgrad.core.units import Unit
from localgrad.errors import CannotSitError, SettingsError


def man(
    decay: float = 0.995,
    *,
    form: Literal["sum", "residual", "fused"] = "sum",
    bias: bool = True,
    ema: bool = True,
    initial: Literal["copy", "random"] = "copy",
    recompute: bool = False,
    depth: int = 1,
    bias_form: Literal["unit", "conv1x1"] = "unit",
    pool: int = 1,
) -> Momentum:
    """The momentum auxiliary network (MAN).

    `form="sum"`, the released code: `y = bias(h) + ema(h)`, two copies of the next block's first unit. `bias` is
    trained with the block. `ema` is not trained, but the gradient flows through it to h. It follows
    `ema <- m * ema + (1 - m) * unit` with the weights that the next unit had when the batch began.
    `y` feeds the local objective; the next block gets `h`.

    `form="residual"`: `y = bias(h) + ema(h) - h`. If a unit is `u(h) = h + f(h)`, the sum counts the residual path
    twice, `2 h + f + f'`; this form counts it once. It is for units that keep the shape of their features.

    `form="fused"`, after the paper's text: `y = unit(h) + b`, with one copy of the unit, which is trained by its
    gradient and then updated by the same average, and one learnable number `b` a channel, initially 0. The paper's text
    leaves the shape and the place of b open. Its second gradient update, after the average, is left out here.

    The rows of the paper's ablation are settings: `bias=False` (EMA only), `ema=False` (bias only: one more trained
    unit), `decay=0` (the next unit's weights used directly, one step old). The average covers trained parameters.
    Batch norms of each copy, the fused form's too, normalize by the mean and variance of their own input in the batch.
    They keep running statistics of their own: the average does not change them, and the copies do not change the next
    unit's. Both copies share the next unit's frozen parameters (LoRA's base weights) with it.

    Args:
        decay: m, from 0 to 1. The paper uses 0.995.
        form: `"sum"`, `"residual"` or `"fused"`, see above.
        bias: whether there is a trained copy. In the fused form: whether there is b; its copy is always trained.
        ema: whether there is a copy that follows the next unit by the average.
        initial: `"copy"` starts both copies from the next unit's values, `"random"` from independent draws (as in the
            released code), in each layer that has a reset method. A unit's own bare parameters, and weights that a
            parametrization computes (weight norm), stay copies.
        recompute: activation checkpointing of both branches: the backward pass computes them again. Running statistics
            are still updated once a step.
        depth: number of units that are copied, from the next block's first on; all of its units if it has fewer. The
            model's head is copied only if the last block has no other unit.
        bias_form: the trained part of the sum: `"unit"`, a copy of the unit (as released), or `"conv1x1"`, a 1x1
            convolution `W h + b` from the channels before the unit to those after it, with the unit's stride and
            initially 0 (a linear layer if channels are the last dimension). The paper's text speaks of a "lightweight"
            bias. The 1x1 convolution costs 1/18 of a residual unit of two 3x3 convolutions.
        pool: average maps `(N, C, H, W)` over squares of this side (in pixels) before the branches, which divides their
            cost by the side's square. The objective sees the smaller map. This is from no paper.

    Returns:
        A function that builds the module from the next block's units.

    Raises:
        SettingsError: `decay` is outside [0, 1], `depth` or `pool` is below 1, `bias` and `ema` are both False, `form`
            does not go with `bias`, `ema` or `bias_form`, or a choice is unknown; when built, the weights to be
            averaged have a 16-bit dtype.
        CannotSitError: when built, the units to copy have no trained parameters, or do not fit `form`, `bias_form` or
            `pool`.

    Source: Su et al., Momentum Auxiliary Network for Supervised Local Learning, ECCV 2024
    (https://arxiv.org/abs/2407.05623), section "EMA-based information transfer"; released code of the paper,
    `networks/resnetInfoPro_MAN.py`.
    """
    _check(decay, initial, depth)
    if bias_form not in ("unit", "conv1x1"):
        raise SettingsError(f"bias_form is {bias_form!r}: it is 'unit' (a copy, as released) or 'conv1x1'")
    if bias_form != "unit" and not (bias and form == "sum"):
        raise SettingsError("bias_form is 'conv1x1' without a trained part beside the average: form='sum', bias=True")
    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1:
        raise SettingsError(f"pool is {pool!r}: it is the side of a square of pixels, 1 for none, or 2")
    if form not in ("sum", "residual", "fused"):
        raise SettingsError(
            f"form is {form!r}: it is 'sum' (as released), 'residual' (the sum with the residual path once) or 'fused' "
            "(as the paper's formula reads)"
        )
    if not (bias or ema):
        raise SettingsError("bias and ema are both False: keep one of them, or give momentum=None for none")
    if form == "residual" and not (bias and ema):
        raise SettingsError(
            "form is 'residual' and a part is off: one part counts the residual path once already; use form='sum'"
        )
    if form == "fused" and not ema:
        raise SettingsError(
            "form is 'fused' and ema is False: the fused form is one module that the EMA pulls; use 'sum'"
        )

    def build(following: Sequence[Unit]) -> MomentumAuxiliary:
        source = _source(following, depth)
        follower = _follower(source, initial, decay) if ema else None
        if pool > 1 and not _is_map(source[0]):
            raise CannotSitError(f"pool is {pool} and features are {tuple(source[0].inputs)}: it takes (N, C, H, W)")
        if form == "residual" and source[0].inputs != source[-1].features:
            raise CannotSitError(
                f"form is 'residual' and {source[-1].name!r} takes {tuple(source[0].inputs)} to "
                f"{tuple(source[-1].features)}: its residual path is not its input; cut elsewhere, or use form='sum'"
            )
        trained: nn.Module | nn.Parameter | None = None
        if bias and form != "fused":
            is_unit = bias_form == "unit"
            trained = copied(source, initial, share_frozen=True) if is_unit else _conv1x1(source)
        if follower is not None and form != "fused":
            follower.requires_grad_(False)  # shared parameters are frozen already
        if bias and form == "fused":
            unit = source[-1]
            shape = [1] * (len(unit.features) - 1)
            shape[unit.channel_dim - 1] = unit.features[unit.channel_dim]
            like = _trained_parameters(source)[0]
            trained = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        lightweight = trained if bias_form == "conv1x1" and isinstance(trained, nn.Module) else None
        residual_once = form == "residual"
        return MomentumAuxiliary(source, trained, follower, None, decay, recompute, pool, residual_once, lightweight)

    return build


def manpp(
    decay: float = 0.995,
    *,
    initial: Literal["copy", "random"] = "copy",
    recompute: bool = False,
    depth: int = 1,
) -> Momentum:
    """MAN++: the two branches of MAN, weighted by a learnable scalar.

    `y = s * bias(h) + (2 - s) * ema(h)`, with s initially 1, which is MAN's sum. All else is as in `man(form="sum")`.
    The block's optimizer trains s with the other parameters, weight decay included.

    Args:
        decay: m, from 0 to 1, as in `man`.
        initial: `"copy"` or `"random"`, as in `man`.
        recompute: as in `man`.
        depth: as in `man`.

    Returns:
        A function that builds the module from the next block's units.

    Raises:
        SettingsError: as in `man`.
        CannotSitError: as in `man`.

    Source: MAN++ (TPAMI 2026, doi 10.1109/TPAMI.2026.3679406; https://arxiv.org/abs/2507.16279), released code,
    `networks/resnetDGL_MANPP.py`.
    """
    _check(decay, initial, depth)

    def build(following: Sequence[Unit]) -> MomentumAuxiliary:
        source = _source(following, depth)
        follower = _follower(source, initial, decay).requires_grad_(False)
        like = _trained_parameters(source)[0]
        scale = nn.Parameter(torch.ones(1, dtype=like.dtype, device=like.device))  # (1,), because FSDP2 refuses scalars
        trained = copied(source, initial, share_frozen=True)
        return MomentumAuxiliary(source, trained, follower, scale, decay, recompute)

    return build


def _is_map(unit: Unit) -> bool:
    return len(unit.inputs) == len(unit.features) == 4 and unit.channel_dim == 1


def _conv1x1(source: Sequence[Unit]) -> nn.Module:
    """A layer `W h + b`, initially 0, from the input shape of the units to their output shape."""
    inputs, outputs, dim = source[0].inputs, source[-1].features, source[-1].channel_dim
    layer: nn.Module | None = None
    if _is_map(source[0]) and len(outputs) == 4:
        stride = tuple(max(1, round(before / after)) for before, after in zip(inputs[2:], outputs[2:], strict=True))
        if all(-(-b // s) == a for b, s, a in zip(inputs[2:], stride, outputs[2:], strict=True)):
            layer = nn.Conv2d(inputs[1], outputs[1], 1, stride)  # pyright: ignore[reportArgumentType]
    elif dim == len(outputs) - 1 and inputs[1:-1] == outputs[1:-1]:
        layer = nn.Linear(inputs[-1], outputs[-1])
    if layer is None:
        raise CannotSitError(
            f"bias_form is 'conv1x1', and no 1x1 convolution leads from {tuple(inputs)} to {tuple(outputs)} "
            f"(unit {source[0].name!r}): use 'unit'"
        )
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    like = _trained_parameters(source)[0]
    return layer.to(like.device, like.dtype)


def _check(decay: float, initial: str, depth: int) -> None:
    if not isinstance(decay, int | float) or not 0 <= decay <= 1:
        given = repr(decay) if isinstance(decay, int | float | str) else f"a {type(decay).__name__}"
        raise SettingsError(
            f"decay is {given}: it is from 0 (use the next unit's weights) to 1 (never follow); try momentum=man(0.995)"
        )
    if initial not in ("copy", "random"):
        raise SettingsError(f"initial is {initial!r}: it is 'copy' (of the next unit) or 'random'")
    if not isinstance(depth, int) or depth < 1:
        raise SettingsError(f"depth is {depth!r}: copy at least the first unit of the next block, depth=1")


def _source(following: Sequence[Unit], depth: int) -> Sequence[Unit]:
    source = following[:depth]
    if not any(True for _ in source[0].module.parameters()):
        raise CannotSitError(
            f"the unit {source[0].name!r} after a cut has no parameters, so there is nothing for a momentum auxiliary "
            "network to follow: cut after it instead, or name it together with the unit that follows"
        )
    if not _trained_parameters(source):
        raise CannotSitError(
            f"the unit {source[0].name!r} after a cut trains none of its parameters (requires_grad is False), so there "
            "is nothing for a momentum auxiliary network to follow: cut elsewhere, or give momentum=None"
        )
    return source


def _trained_parameters(source: Sequence[Unit]) -> list[nn.Parameter]:
    return [parameter for unit in source for parameter in unit.module.parameters() if parameter.requires_grad]


def _follower(source: Sequence[Unit], initial: str, decay: float) -> nn.Module:
    """The EMA copy. 16-bit weights are refused, because small steps towards the next unit would be rounded away."""
    coarse = [p.dtype for p in _trained_parameters(source) if p.dtype in (torch.bfloat16, torch.float16)]
    if coarse and 0 < decay < 1:
        raise SettingsError(
            f"the weights after a cut are {coarse[0]}, in which an average with decay {decay} stands still: keep the "
            "weights in float32 and compute under autocast, or give decay=0"
        )
    return copied(source, initial, share_frozen=True)
