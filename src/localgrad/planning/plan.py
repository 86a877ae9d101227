"""The planner: the peak memory of a step for each number of blocks, with the cuts that make it smallest."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.momentum import Momentum
from localgrad.core.partition import check_num_blocks
from localgrad.core.site import Objective
from localgrad.core.units import Unit, check_example, check_model, units
from localgrad.errors import CannotSitError, DoesNotFitError, SettingsError
from localgrad.planning.peaks import Profile
from localgrad.planning.profile import profile
from localgrad.planning.simulation import Precision, check_precision


@dataclass(frozen=True)
class PlanRow:
    """One way to train a model, and the memory that a step takes.

    Attributes:
        num_blocks: K; 1 is end-to-end.
        cuts: names of the units after which to cut, the best for this K.
        recompute: whether every unit is checkpointed, `split(recompute=True)`.
        peak: bytes of weights, gradients, optimizer state, activations, auxiliary networks and temporary tensors.
        fits: whether the peak is within the budget; True without one.
    """

    num_blocks: int
    cuts: tuple[str, ...]
    recompute: bool
    peak: int
    fits: bool


def plan(
    model: nn.Module,
    example: Tensor,
    *,
    objective: Objective,
    momentum: Momentum | None = None,
    budget: int | None = None,
    num_blocks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    precision: Precision = "32-true",
    step_each_block: bool = False,
) -> list[PlanRow]:
    """Predict the peak memory of a training step, and find the cuts that make it smallest, without running it.

    For each K the cuts are the best there are for a batch like `example`. Every unit, and every auxiliary network
    where it may sit, is profiled once on `meta` tensors with every live storage counted; the peak of a choice of cuts
    follows by addition. Counted: weights, gradients, one buffer of optimizer state a parameter, activations, auxiliary
    networks, temporary tensors, the batch. Not counted: what a convolution takes as workspace, and fragmentation.

    Args:
        model: as for `split`; it is not changed.
        example: a batch of the size to train with, such as `torch.empty(128, 3, 224, 224, device="meta")`. In bf16 its
            device decides whose autocast is meant: the processor's for an example on the CPU, else CUDA's.
        objective: the local objective.
        momentum: `man(...)`, `manpp(...)` or None.
        budget: bytes that a step may take.
        num_blocks: the K to try; 1, 2, 4, 8, ... up to the most that there can be if not given, and the smallest that
            fits the budget. K = 1 is end-to-end.
        names: the units by name, for a model that cannot be traced.
        precision: `"32-true"`, or `"bf16-mixed"` for weights in float32 and each block's forward pass under bf16
            autocast, as the trainer runs it.
        step_each_block: as in `local_step`.

    Returns:
        Two rows a K, without and with `recompute`, in the order of `num_blocks`, else ascending, where the first row
        that fits has the smallest K.

    Raises:
        LocalGradError: the budget is not positive, or less than any row takes (the message names the largest unit and
            what would fit), a K is out of range, the precision is unknown, the model cannot be split, or a unit or
            objective cannot run on tensors without data.
    """
    rows, refusal = plan_rows(
        model,
        example,
        objective=objective,
        momentum=momentum,
        budget=budget,
        num_blocks=num_blocks,
        names=names,
        precision=precision,
        step_each_block=step_each_block,
    )
    if not any(row.fits for row in rows):
        raise DoesNotFitError(refusal)
    return rows


def plan_rows(
    model: nn.Module,
    example: Tensor,
    *,
    objective: Objective,
    momentum: Momentum | None,
    budget: int | None,
    num_blocks: Sequence[int] | None,
    names: Sequence[str] | None,
    precision: Precision,
    step_each_block: bool,
    known: dict[Any, Any] | None = None,
) -> tuple[list[PlanRow], str]:
    """The rows of `plan`, whether one fits or not, and what to say where none does; `known` as in `profile`."""
    if budget is not None and (not isinstance(budget, int) or budget <= 0):
        raise SettingsError(f"budget is {budget!r}: give a whole number of bytes more than 0, such as 8 * 2**30")
    if not callable(objective):
        raise SettingsError(f"objective is {objective!r}: give a factory, such as localgrad.dgl(num_classes=10)")
    if num_blocks is not None and not isinstance(num_blocks, Sequence):
        raise SettingsError(f"num_blocks is {num_blocks!r}: give the numbers to try, such as [2, 4, 8]")
    check_model(model)
    check_example(example)
    check_precision(precision)
    blueprint = copy.deepcopy(model).to("meta").train()
    found = units(blueprint, torch.empty_like(example, device="meta"), names)
    known = {} if known is None else known
    profiles = [
        profile(
            found,
            example,
            objective,
            momentum,
            recompute=recompute,
            precision=precision,
            step_each_block=step_each_block,
            known=known,
        )
        for recompute in (False, True)
    ]
    most = profiles[0].most_blocks
    if num_blocks:
        counts = num_blocks
        _check_counts(counts, found, profiles[0])
    else:
        powers = (2**power for power in range(1, 12))
        counts = sorted({1, *(power for power in powers if power < most), most, *_fewest(profiles, budget)})
    rows = []
    for count in counts:
        for recompute, profiled in zip((False, True), profiles, strict=True):
            ends = profiled.best_cuts(count)
            peak = round(profiled.peak(ends))
            cuts = tuple(found[end].name for end in ends)
            rows.append(PlanRow(count, cuts, recompute, peak, budget is None or peak <= budget))
    return rows, _refusal(budget or 0, rows, found, profiles, len(example))


def _fewest(profiles: Sequence[Profile], budget: int | None) -> set[int]:
    """The smallest number of blocks that fits, without and with `recompute`, where one does."""
    if budget is None:
        return set()
    fitting = (
        (count for count in range(1, profiled.most_blocks + 1) if profiled.peak(profiled.best_cuts(count)) <= budget)
        for profiled in profiles
    )
    return {count for counts in fitting if (count := next(counts, None)) is not None}


def _check_counts(counts: Sequence[int], found: Sequence[Unit], profiled: Profile) -> None:
    """Refuse a number of blocks that the units, or the places where an objective may sit, do not make."""
    for count in counts:
        check_num_blocks(count, len(found))
        if count > profiled.most_blocks:
            ends = profiled.ends[1][:-1]
            refused = {unit.name: end.refused for unit, end in zip(found, ends, strict=False) if end.refused}
            raise CannotSitError(
                f"num_blocks is {count}: momentum and objective cannot sit after {', '.join(refused)}, which leaves "
                f"1 to {profiled.most_blocks} blocks; ask for fewer, or for another objective "
                f"({'; '.join(dict.fromkeys(refused.values()))})"
            )


def _refusal(
    budget: int, rows: Sequence[PlanRow], found: Sequence[Unit], profiles: Sequence[Profile], batch: int
) -> str:
    least = min(rows, key=lambda row: row.peak)
    profiled = profiles[least.recompute]
    weights = sum(unit.lasting + unit.gradients for unit in profiled.units)
    worst = max(range(len(found)), key=lambda position: profiled.units[position].first.backward_last)
    return (
        f"budget is {readable(budget)}, and {batch} samples a step take at least {readable(least.peak)} "
        f"({least.num_blocks} blocks{', recomputed' if least.recompute else ''}): {readable(weights)} are "
        f"weights, gradients and optimizer state, and the unit {found[worst].name!r} alone needs "
        f"{readable(profiled.units[worst].first.backward_last)}; give {readable(least.peak)} or a smaller batch"
    )


def readable(count: float) -> str:
    """In the largest unit that fits, rounded up: what is given back as a budget is enough."""
    size, unit = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(100 * count / size) / 100:.2f} {unit}"
