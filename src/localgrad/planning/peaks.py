"""Peaks: the peak memory for any cuts, by addition of profiles, and the cuts with the smallest peak."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from localgrad.core.partition import check_num_blocks
from localgrad.errors import CannotSitError

INFINITE = float("inf")


@dataclass(frozen=True)
class Pass:
    """Memory of a unit's forward and backward pass, in bytes.

    Attributes:
        kept: bytes that the unit's graph saves for the backward pass, without input and output.
        keeps_input: whether the graph saves the input.
        keeps_output: whether the graph saves the output.
        casts: bytes of weights in lower precision that autocast caches until the block's forward pass ends, without
            those that a graph saves.
        forward: peak of the forward pass beyond the input.
        backward: peak of the backward pass beyond the input, with `kept`.
        backward_last: peak of the backward pass if the unit is the last of a block, so that its output stays alive.
        operations: floating-point operations of both passes, with those of the recomputation if there is one.
    """

    kept: int
    keeps_input: bool
    keeps_output: bool
    casts: int
    forward: int
    backward: int
    backward_last: int
    operations: int = 0


@dataclass(frozen=True)
class UnitProfile:
    """Memory of one unit in a training step, in bytes.

    Attributes:
        lasting: parameters, buffers, and one buffer of optimizer state for each trained parameter.
        gradients: gradients of its parameters; 0 for a frozen unit.
        output: the unit's output.
        inner: its passes if its input requires a gradient.
        first: its passes if its input requires none: for a block's units up to the first trained one.
    """

    lasting: int
    gradients: int
    output: int
    inner: Pass
    first: Pass


@dataclass(frozen=True)
class EndProfile:
    """Memory of a loss, in bytes: of momentum and objective of a block that ends after a unit, or of the criterion.

    Attributes:
        lasting: parameters, buffers and optimizer state of momentum and objective; infinite if they cannot be built.
        gradients: gradients of their parameters.
        forward: peak of their forward pass beyond the features.
        backward: peak of their backward pass beyond the features.
        forward_frozen: peak of their forward pass if the block trains nothing, so that features require no gradient.
        backward_frozen: peak of their backward pass in that case.
        refused: why they cannot be built; empty if they can.
        operations: floating-point operations of forward and backward pass.
    """

    lasting: float
    gradients: int
    forward: int
    backward: int
    forward_frozen: int
    backward_frozen: int
    refused: str = ""
    operations: int = 0


NO_END = EndProfile(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Profile:
    """A model's memory, unit by unit. The peak for any cuts follows by addition.

    Attributes:
        units: one profile for each unit.
        ends: for each unit the profile of a loss after it; for the last unit, of the criterion. There are three such
            tuples, for the first, a middle and the last local block, since an objective may differ between them.
        batch: bytes of inputs and targets.
        step_each_block: whether a block's gradients are freed before the next block's forward pass.
        parts: number of micro-batches, one of which was profiled. A block takes all of them, and adds up their
            gradients, before the next block starts.
        ends_at: a function of a block's index and the number of blocks that returns the profiles of its possible ends,
            for an objective that differs from block to block (AugLocal's depth). With None `ends` is used.
    """

    units: tuple[UnitProfile, ...]
    ends: tuple[tuple[EndProfile, ...], tuple[EndProfile, ...], tuple[EndProfile, ...]]
    batch: int
    step_each_block: bool = False
    parts: int = 1
    ends_at: Callable[[int, int], tuple[EndProfile, ...]] | None = None

    def ends_of(self, index: int, num_blocks: int) -> tuple[EndProfile, ...]:
        """Profiles of the loss of the block with this index, if it ends after each unit."""
        if self.ends_at is not None:
            return self.ends_at(index, num_blocks)
        if index == 0:
            return self.ends[0]
        return self.ends[2] if index == num_blocks - 2 else self.ends[1]

    @property
    def most_blocks(self) -> int:
        """The largest number of blocks: 1 + the number of units after which momentum and objective can be built."""
        return 1 + sum(end.lasting < INFINITE for end in self.ends[1][:-1])

    @cached_property
    def _lasting(self) -> int:
        return sum(unit.lasting for unit in self.units) + self.batch

    @cached_property
    def _gradients_before(self) -> list[int]:
        sums = [0]
        for unit in self.units:
            sums.append(sums[-1] + unit.gradients)
        return sums

    def waiting(self, start: int) -> int:
        """Bytes of gradients of earlier units that are alive while the block from `start` is trained."""
        return 0 if self.step_each_block else self._gradients_before[start]

    def peaks_from(self, start: int, ends: Sequence[EndProfile]) -> list[float]:
        """Peak bytes that training a block adds, for blocks from the unit `start` to each later unit."""
        passes = self._passes_from(start)
        entry = 0 if start == 0 else self.units[start - 1].output
        kept = entry if passes[0].keeps_input else 0
        peaks: list[float] = []
        forward_peak, level, casts = 0.0, float(kept), 0
        caller = entry - kept  # holds the block's input until its forward pass ends
        # peak of each unit's backward pass so far, without gradients of later units and the block's output
        backward: list[float] = []
        alive_input = 0
        for position, (here, after) in enumerate(zip(passes, [*passes[1:], None], strict=True), start=start):
            unit, end = self.units[position], self._end(ends, start, position)
            forward_peak = max(forward_peak, level + caller + casts + alive_input + here.forward)
            casts += here.casts
            last, before = level + here.backward_last, level + here.backward
            level += here.kept
            held = unit.output  # the block's own output stays alive while it is trained
            gradients = self._gradients_before[position + 1]
            own = gradients - self._gradients_before[start]
            frozen = own == 0
            forward, back = (end.forward_frozen, end.backward_frozen) if frozen else (end.forward, end.backward)
            at_end = level + held + max(caller + casts + forward, back)
            earlier = (peak + held - self._gradients_before[start + 1 + i] for i, peak in enumerate(backward))
            worst = max([last - gradients, *earlier]) + gradients
            peak = max(forward_peak, at_end, worst + end.gradients) + (self.parts - 1) * entry
            if self.parts > 1:  # from the second micro-batch on, all gradients and earlier outputs are alive
                worst = max([last, *(each + held for each in backward)])
                others = max((self.parts - 1) * held, (self.parts - 2) * entry + held)
                peak = max(peak, max(forward_peak, at_end, worst) + own + end.gradients + others)
            peaks.append(peak)
            backward.append(before)
            kept = unit.output if here.keeps_output or (after is not None and after.keeps_input) else 0
            level += kept
            alive_input = unit.output - kept
        return peaks

    def _end(self, ends: Sequence[EndProfile], start: int, stop: int) -> EndProfile:
        """Profile of the block's loss; zeros for a block that trains nothing and is not the last."""
        trains = self._gradients_before[stop + 1] > self._gradients_before[start]
        return ends[stop] if trains or stop == len(self.units) - 1 else NO_END

    def _passes_from(self, start: int) -> list[Pass]:
        """The passes of the units of a block from `start`. Units up to the first trained one need no input gradient."""
        before = self._gradients_before
        return [
            unit.first if before[position] == before[start] else unit.inner
            for position, unit in enumerate(self.units[start:], start=start)
        ]

    def peak(self, cuts: Sequence[int]) -> float:
        """Peak bytes of a step with blocks that end after these units: everything that is alive in it."""
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.units) - 1]
        lasting, worst, gradients = float(self._lasting), 0.0, 0
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ends = self.ends_of(index, len(stops))
            peak = self.peaks_from(start, ends)[stop - start]
            worst = max(worst, gradients + self.waiting(start) + peak)
            if index < len(cuts):
                end = self._end(ends, start, stop)
                lasting += end.lasting
                gradients += 0 if self.step_each_block else end.gradients
        return lasting + worst

    def operations(self, cuts: Sequence[int]) -> int:
        """Floating-point operations of a step with blocks that end after these units."""
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.units) - 1]
        total = 0
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            total += sum(each.operations for each in self._passes_from(start)[: stop - start + 1])
            total += self._end(self.ends_of(index, len(stops)), start, stop).operations
        return self.parts * total

    def best_cuts(self, num_blocks: int) -> list[int]:
        """The cuts into K blocks with the smallest peak.

        The result is exact for `peak`. It is found by dynamic programming over (blocks, last unit), with the Pareto
        front of lasting bytes of auxiliary networks, bytes of their gradients, and the peak of the worst block so far.

        Args:
            num_blocks: K.

        Returns:
            The K - 1 indices of the units after which to cut, ascending.

        Raises:
            LocalGradError: K is out of range, or there are no K - 1 cuts at which momentum and objective can be built.
        """
        check_num_blocks(num_blocks, len(self.units))
        last = len(self.units) - 1
        tables: dict[tuple[EndProfile, ...], list[list[float]]] = {}
        fronts = {-1: [(0.0, 0, 0.0, ())]}
        for blocks in range(1, num_blocks + 1):
            longer: dict[int, list[tuple[float, int, float, tuple[int, ...]]]] = {}
            ends = self.ends_of(blocks - 1, num_blocks)
            if ends not in tables:
                tables[ends] = [self.peaks_from(start, ends) for start in range(last + 1)]
            table = tables[ends]
            stops = [last] if blocks == num_blocks else range(blocks - 1, last)
            for stop in stops:
                choices: list[tuple[float, int, float, tuple[int, ...]]] = []
                for cut, front in fronts.items():
                    end = self._end(ends, cut + 1, stop) if cut < stop < last else NO_END
                    if cut >= stop or end.lasting == INFINITE:
                        continue
                    left = 0 if self.step_each_block else end.gradients
                    choices += [
                        (
                            lasting + end.lasting,
                            waiting + left,
                            max(worst, waiting + self.waiting(cut + 1) + table[cut + 1][stop - cut - 1]),
                            (*cuts, stop),
                        )
                        for lasting, waiting, worst, cuts in front
                    ]
                if choices:
                    longer[stop] = _pareto(choices)
            fronts = longer
        if last not in fronts:
            raise CannotSitError(
                f"num_blocks is {num_blocks}: the objective cannot sit after {num_blocks - 1} of the {last + 1} units; "
                "ask for fewer blocks, or for another objective"
            )
        return list(min(fronts[last], key=lambda choice: choice[0] + choice[2])[3][:-1])


def _pareto(
    choices: list[tuple[float, int, float, tuple[int, ...]]],
) -> list[tuple[float, int, float, tuple[int, ...]]]:
    front: list[tuple[float, int, float, tuple[int, ...]]] = []
    for choice in sorted(choices):
        if not any(all(a <= b for a, b in zip(other[:3], choice[:3], strict=True)) for other in front):
            front.append(choice)
    return front
