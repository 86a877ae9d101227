"""The planner: the smallest peak memory of a step for each number of blocks, and the cuts that reach it."""

# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.meta import to_meta
from localgrad.core.momentum import Momentum
from localgrad.core.partition import check_num_blocks
from localgrad.core.reach import check_reach
from localgrad.core.site import Criterion, Objective
from localgrad.core.units import check_example, check_model, units, why_whole
from localgrad.errors import CannotSitError, DoesNotFitError, SettingsError
from localgrad.planning.peaks import Profile
from localgrad.planning.profile import profile
from localgrad.planning.reaching import cuts_for_reach
from localgrad.planning.simulation import Precision, check_precision
from localgrad.planning.step_peak import step_cost

USUAL_PARTS = 4


@dataclass(frozen=True)
class PlanRow:
    """One way to train a model, with the peak memory and the operations of a step.

    Attributes:
        num_blocks: K; 1 is end-to-end training.
        cuts: names of the units after which to cut, the best for this K.
        recompute: whether every unit is checkpointed, `split(recompute=True)`.
        peak: peak bytes of weights, gradients, optimizer state, activations, auxiliary networks and temporary tensors.
        fits: whether the peak is within the budget; True without a budget.
        parts: number of micro-batches, `local_step(parts=...)`; 1 is the whole batch at once. With K = 1 it is
            gradient accumulation.
        operations: floating-point operations of forward and backward passes, relative to end-to-end training with the
            whole batch. On a busy device this is about the relative time of a step.
    """

    num_blocks: int
    cuts: tuple[str, ...]
    recompute: bool
    peak: int
    fits: bool
    parts: int = 1
    operations: float = 1.0


def plan(
    model: nn.Module,
    example: Tensor,
    *,
    objective: Objective,
    momentum: Momentum | None = None,
    budget: int | None = None,
    num_blocks: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    precision: Precision = "32-true",
    step_each_block: bool = False,
    channel_dim: int | Mapping[str, int] | None = None,
    targets: Any = None,
    criterion: Criterion = F.cross_entropy,
    reach: int = 1,
) -> list[PlanRow]:
    """Predict the peak memory of a training step, and find the cuts that make it smallest, without running it.

    For each K the cuts are the best of all for a batch like `example`. Every unit, and the auxiliary networks after
    every unit, are profiled once on tensors without data, with every live storage counted. The peak for any cuts
    follows by addition. It includes weights, gradients, one buffer of optimizer state per parameter, activations,
    auxiliary networks, temporary tensors and the batch. It does not include workspaces of convolutions, nor
    fragmentation.

    The rows also contain the ways to save memory that change no gradient: activation checkpointing, gradient
    accumulation, and both. If your batch can be split into micro-batches, compare K blocks with these rows of K = 1.

    Args:
        model: as for `split`; it is not changed. For a model that `isolate` cuts see `plan_isolated`.
        example: a batch of the size to train with, such as `torch.empty(128, 3, 224, 224, device="meta")`. With
            `"bf16-mixed"` its device chooses the rules of autocast: the CPU's for an example on the CPU, else CUDA's.
        objective: the local objective.
        momentum: `man(...)`, `manpp(...)` or None.
        budget: bytes that a step may take.
        num_blocks: the K to try; K = 1 is end-to-end training. If None, 1, 2, 4, 8, ... up to the largest possible
            number, and the smallest K that fits the budget.
        parts: the numbers of micro-batches to try, as in `local_step`. If None, 1, and also 4 if each of four has two
            samples. Losses of a whole batch (PredSim, contrast) and batch norms see one micro-batch at a time.
        names: the units by name, for a model that cannot be traced (see `units`).
        precision: `"32-true"`, or `"bf16-mixed"` for weights in float32 and each block's forward pass under bf16
            autocast, as in the trainer.
        step_each_block: as in `local_step`.
        channel_dim: as in `split`.
        targets: an example of the targets for objective and criterion; classes `(N,)` if None.
        criterion: loss of the model's output, as in `split`.
        reach: number of blocks that a loss trains, as in `local_step`. Above 1 the cuts are good by an estimate, but
            not proven to be the best, and each row's peak and operations are measured in a step on the meta device, in
            float32.

    Returns:
        For each K, in the order of `num_blocks`, else ascending, and for each of `parts`, one row without `recompute`
        and one with it. Without `num_blocks` the first row that fits has the smallest K.

    Raises:
        LocalGradError: the budget is not positive, or smaller than the peak of every row (the message names the largest
            unit and what would fit), a K is out of range, the precision is unknown, the model cannot be split, or a
            unit or objective cannot run on tensors without data.
    """
    _check_request(num_blocks, budget)  # before profiling, which takes longer
    planner = Planner(
        model,
        example,
        parts,
        names,
        channel_dim,
        objective=objective,
        momentum=momentum,
        precision=precision,
        step_each_block=step_each_block,
        targets=targets,
        criterion=criterion,
        reach=reach,
    )
    rows = planner.rows(num_blocks, budget)
    if not any(row.fits for row in rows):
        raise planner.nothing_fits(rows, budget or 0)
    return rows


def _check_request(num_blocks: Any, budget: Any) -> None:
    """Refuse a budget that is no positive integer, and numbers of blocks that are no sequence."""
    if budget is not None and (not isinstance(budget, int) or budget <= 0):
        raise SettingsError(f"budget is {budget!r}: give a whole number of bytes more than 0, such as 8 * 2**30")
    if num_blocks is not None and not isinstance(num_blocks, Sequence):
        raise SettingsError(f"num_blocks is {num_blocks!r}: give the numbers to try, such as [2, 4, 8]")


class Planner:
    """Profiles of a model with and without recompute, for each number of micro-batches; rows follow by addition.

    Args:
        model: as for `plan`, like `example`, `parts`, `names` and `channel_dim`.
        known: a cache of profiles of units and auxiliary networks, which several planners may share.
        reach: as for `plan`.
        settings: further arguments of `profile`.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        parts: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        channel_dim: int | Mapping[str, int] | None = None,
        *,
        known: dict[Any, Any] | None = None,
        reach: int = 1,
        **settings: Any,
    ) -> None:
        if not callable(settings["objective"]):
            raise SettingsError(
                f"objective is {settings['objective']!r}: give a factory, such as localgrad.dgl(num_classes=10)"
            )
        check_model(model)
        check_example(example)
        check_precision(settings["precision"])
        check_reach(reach)
        if reach > 1 and settings["precision"] != "32-true":
            raise SettingsError(
                f"reach is {reach} with precision {settings['precision']!r}: losses that reach several blocks are "
                "planned in float32; give precision='32-true'"
            )
        if parts is None:
            parts = (1, USUAL_PARTS) if len(example) >= 2 * USUAL_PARTS else (1,)
        if not parts or any(type(number) is not int or not 1 <= number <= len(example) for number in parts):
            raise SettingsError(
                f"parts is {parts!r}: give numbers of micro-batches from 1 to {len(example)}, as [1, 4]"
            )
        blueprint = to_meta(model).train()
        self.reach = reach
        on_meta = torch.empty_like(example, device="meta")
        self.found = units(blueprint, on_meta, names, channel_dim=channel_dim)
        named: dict[str, Any] = {"names": names, "channel_dim": channel_dim, "reach": reach}
        self.measured = partial(step_cost, blueprint, on_meta, **settings, **named)
        self.samples = len(example)
        known = {} if known is None else known

        def profiled(number: int, recompute: bool) -> Profile:
            return profile(self.found, example, recompute=recompute, parts=number, known=known, **settings)

        self.profiles = {(number, each): profiled(number, each) for number in parts for each in (False, True)}
        self.plain = self.profiles[1, False] if 1 in parts else profiled(1, False)

    def rows(self, num_blocks: Sequence[int] | None, budget: int | None) -> list[PlanRow]:
        """The rows of `plan`, whether one fits or not."""
        _check_request(num_blocks, budget)
        most = self.plain.most_blocks
        if num_blocks:
            counts = num_blocks
            self._check_counts(counts)
        else:
            powers = (2**power for power in range(1, 12))
            counts = sorted({1, *(power for power in powers if power < most), most, *self._fewest(budget)})
        rows: list[PlanRow] = []
        end_to_end = self.plain.operations([])
        for count in counts:
            for (number, recompute), profiled in self.profiles.items():
                cuts, peak, total = self._cheapest(profiled, count, number, recompute)
                operations = total / end_to_end if end_to_end else 1.0
                rows.append(PlanRow(count, cuts, recompute, peak, budget is None or peak <= budget, number, operations))
        return rows

    def _cheapest(self, profiled: Profile, count: int, parts: int, recompute: bool) -> tuple[tuple[str, ...], int, int]:
        """The best cuts into `count` blocks, and the peak bytes and operations of a step with them."""
        reaches = self.reach > 1 and count > 1
        ends = cuts_for_reach(profiled, count, self.reach) if reaches else profiled.best_cuts(count)
        cuts = tuple(self.found[end].name for end in ends)
        if not reaches:
            return cuts, round(profiled.peak(ends)), profiled.operations(ends)
        return cuts, *self.measured(cuts=cuts, recompute=recompute, parts=parts)

    def _fewest(self, budget: int | None) -> set[int]:
        """For each profile the smallest number of blocks that fits the budget, if any."""
        if budget is None:
            return set()
        fitting = (
            (count for count in range(1, each.most_blocks + 1) if each.peak(each.best_cuts(count)) <= budget)
            for each in self.profiles.values()
        )
        return {count for counts in fitting if (count := next(counts, None)) is not None}

    def _check_counts(self, counts: Sequence[int]) -> None:
        """Refuse a number of blocks for which there are too few units, or too few where an objective can be built."""
        most = self.plain.most_blocks
        for count in counts:
            check_num_blocks(count, len(self.found), why_whole(self.found))
            if count > most:
                ends = self.plain.ends[1][:-1]
                refused = {unit.name: end.refused for unit, end in zip(self.found, ends, strict=False) if end.refused}
                raise CannotSitError(
                    f"num_blocks is {count}: momentum and objective cannot sit after {', '.join(refused)}, which "
                    f"leaves 1 to {most} blocks; ask for fewer, or for another objective "
                    f"({'; '.join(dict.fromkeys(refused.values()))})"
                )

    def nothing_fits(self, rows: Sequence[PlanRow], budget: int) -> DoesNotFitError:
        """The error for a budget that no row fits."""
        least = min(rows, key=lambda row: row.peak)
        found = self.profiles[least.parts, least.recompute].units
        weights = sum(unit.lasting + unit.gradients for unit in found)
        worst = max(range(len(found)), key=lambda position: found[position].first.backward_last)
        how = f"{least.num_blocks} blocks" if least.num_blocks > 1 else "end-to-end"
        how += f", in {least.parts} micro-batches" if least.parts > 1 else ""
        return DoesNotFitError(
            f"budget is {readable(budget)}, and {self.samples} samples a step take at least {readable(least.peak)} "
            f"({how}{', recomputed' if least.recompute else ''}): {readable(weights)} are weights, gradients and "
            f"optimizer state, and the unit {self.found[worst].name!r} alone needs "
            f"{readable(found[worst].first.backward_last)}; give {readable(least.peak)} or a smaller batch"
        )


def readable(count: float) -> str:
    """Bytes as MiB or GiB, rounded up, so that the figure is enough when it is given as a budget."""
    size, unit = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(100 * count / size) / 100:.2f} {unit}"
