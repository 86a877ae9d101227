"""Profiles: what each unit does to memory; the peak of any cuts, and the best cuts, follow by addition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from localgrad.blocks import Objective, build_auxiliary
from localgrad.errors import LocalGradError
from localgrad.memory import PeakMemory, to_meta
from localgrad.momentum import Momentum
from localgrad.partition import check_num_blocks
from localgrad.recompute import recomputed
from localgrad.units import Unit

INFINITE = float("inf")


@dataclass(frozen=True)
class UnitProfile:
    """What one unit does to memory in a training step, in bytes.

    Attributes:
        lasting: parameters, buffers, and one buffer of optimizer state a trained parameter.
        gradients: of its parameters.
        output: its features.
        kept: what its graph keeps for the backward pass, without input and output.
        keeps_input: whether its graph keeps the input.
        keeps_output: whether its graph keeps the output.
        forward: the most that is alive during its forward pass beyond the input.
        backward: the most that is alive during its backward pass, its own kept bytes included, beyond the input.
        backward_first: the same where it is the first of a block and its input needs no gradient.
    """

    lasting: int
    gradients: int
    output: int
    kept: int
    keeps_input: bool
    keeps_output: bool
    forward: int
    backward: int
    backward_first: int


@dataclass(frozen=True)
class EndProfile:
    """What a loss does to memory, in bytes: of a block that ends after a unit, or of the model's output.

    Attributes:
        lasting: parameters, buffers and optimizer state of momentum and objective; infinite where they cannot sit.
        gradients: of their parameters.
        peak: the most that is alive during their forward and backward pass beyond the features.
    """

    lasting: float
    gradients: int
    peak: float


@dataclass(frozen=True)
class Profile:
    """A model's memory behaviour, unit by unit; the peak of any cuts follows by addition.

    Attributes:
        units: one profile a unit.
        ends: of a block that ends after each unit, and of the model's output for the last unit; three times, for the
            first, a middle and the last local block, since an objective may differ between them.
        batch: bytes of inputs and targets.
    """

    units: tuple[UnitProfile, ...]
    ends: tuple[tuple[EndProfile, ...], tuple[EndProfile, ...], tuple[EndProfile, ...]]
    batch: int

    def ends_of(self, index: int, num_blocks: int) -> tuple[EndProfile, ...]:
        """What a block with this index may end in."""
        if index == 0:
            return self.ends[0]
        return self.ends[2] if index == num_blocks - 2 else self.ends[1]

    @cached_property
    def _lasting(self) -> int:
        return sum(unit.lasting for unit in self.units) + self.batch

    @cached_property
    def _gradients_before(self) -> list[int]:
        sums = [0]
        for unit in self.units:
            sums.append(sums[-1] + unit.gradients)
        return sums

    @cached_property
    def _between(self) -> list[int]:
        """Bytes of the features after each unit, where a graph keeps them within a block."""
        following = [*self.units[1:], None]
        return [
            unit.output if unit.keeps_output or (after is not None and after.keeps_input) else 0
            for unit, after in zip(self.units, following, strict=True)
        ]

    def peaks_from(self, start: int, ends: Sequence[EndProfile]) -> list[float]:
        """Peak of a block from the unit `start` to each later unit: what it adds while it is trained."""
        first = self.units[start]
        entry = 0 if start == 0 else self.units[start - 1].output
        kept_entry = entry if first.keeps_input else 0
        peaks: list[float] = []
        forward_peak, level = 0.0, float(kept_entry)
        # for the backward pass: level before unit u and what its pass adds; gradients of later units come on top
        backward: list[tuple[float, int]] = []
        alive_input = entry - kept_entry
        for position in range(start, len(self.units)):
            unit, end = self.units[position], ends[position]
            forward_peak = max(forward_peak, level + alive_input + unit.forward)
            backward.append((level + (unit.backward_first if position == start else unit.backward), position))
            level += unit.kept
            held = unit.output  # the block's own output stays alive while it is trained
            at_end = level + held + end.peak
            gradients = self._gradients_before[position + 1]
            worst = max(
                before
                + (0 if later < position else (0 if unit.keeps_output else held))
                + (held if later < position else 0)
                + gradients
                - self._gradients_before[later + 1]
                for before, later in backward
            )
            peaks.append(max(forward_peak, at_end, worst + end.gradients))
            kept = self._between[position]
            level += kept
            alive_input = unit.output - kept
        return peaks

    def peak(self, cuts: Sequence[int]) -> float:
        """Peak bytes of a step with blocks that end after these units: everything that lives in it."""
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.units) - 1]
        lasting, worst, gradients = float(self._lasting), 0.0, 0
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ends = self.ends_of(index, len(stops))
            peak = self.peaks_from(start, ends)[stop - start]
            worst = max(worst, gradients + self._gradients_before[start] + peak)
            if index < len(cuts):
                lasting += ends[stop].lasting
                gradients += ends[stop].gradients
        return lasting + worst

    def best_cuts(self, num_blocks: int) -> list[int]:
        """The cuts into K blocks with the smallest peak.

        Exact for `peak`: dynamic programming over (blocks, last unit), with the Pareto front of what auxiliary
        networks add for good, what gradients wait in them, and the worst block so far.

        Args:
            num_blocks: K.

        Returns:
            The K - 1 indices of the units after which to cut, ascending.

        Raises:
            LocalGradError: K is out of range, or no K - 1 cuts exist at which momentum and objective can sit.
        """
        check_num_blocks(num_blocks, len(self.units))
        last = len(self.units) - 1
        tables = {ends: [self.peaks_from(start, ends) for start in range(last + 1)] for ends in self.ends}
        fronts = {-1: [(0.0, 0, 0.0, ())]}
        for blocks in range(1, num_blocks + 1):
            longer: dict[int, list[tuple[float, int, float, tuple[int, ...]]]] = {}
            ends = self.ends_of(blocks - 1, num_blocks)
            table = tables[ends]
            stops = [last] if blocks == num_blocks else range(blocks - 1, last)
            for stop in stops:
                end = ends[stop] if stop < last else EndProfile(0, 0, 0)
                if end.lasting == INFINITE:
                    continue
                choices = [
                    (
                        lasting + end.lasting,
                        waiting + end.gradients,
                        max(worst, waiting + self._gradients_before[cut + 1] + table[cut + 1][stop - cut - 1]),
                        (*cuts, stop),
                    )
                    for cut, front in fronts.items()
                    if cut < stop
                    for lasting, waiting, worst, cuts in front
                ]
                if choices:
                    longer[stop] = _pareto(choices)
            fronts = longer
        if last not in fronts:
            raise LocalGradError(
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


def profile(
    found: Sequence[Unit],
    example: Tensor,
    objective: Objective | None = None,
    momentum: Momentum | None = None,
    *,
    recompute: bool = False,
) -> Profile:
    """Profile every unit, and every place where a block may end, on `meta` tensors: nothing is computed.

    Args:
        found: the units, from `localgrad.units`.
        example: a batch of the size to train with.
        objective: what ends a block; without one no cut is possible.
        momentum: likewise, or None.
        recompute: with activation checkpointing of each unit.
    """
    inputs = torch.empty_like(example, device="meta")
    targets = torch.zeros(len(example), dtype=torch.long, device="meta")
    on_meta = [replace(unit, module=to_meta(unit.module)) for unit in found]
    features, profiles = inputs, []
    ends: list[list[EndProfile]] = [[], [], []]
    known: dict[object, UnitProfile] = {}
    known_ends: dict[object, list[EndProfile]] = {}
    for position, unit in enumerate(on_meta):
        key = (features.shape, _signature(unit.module))
        if key not in known:
            known[key] = _profile_unit(unit.module, features, recompute)
        profiles.append(known[key])
        with torch.no_grad():
            features = unit.module(features)
        following = on_meta[position + 1 : -1] or on_meta[position + 1 :]
        depth = 1 if momentum is None or not following else getattr(momentum(following), "depth", 1)
        end_key = (features.shape, unit.channel_dim, *(_signature(after.module) for after in following[:depth]))
        if end_key not in known_ends:
            known_ends[end_key] = _profile_ends(unit, following, features, targets, inputs, objective, momentum)
        for role, end in enumerate(known_ends[end_key]):
            ends[role].append(end)
    first, middle, last = map(tuple, ends)
    return Profile(tuple(profiles), (first, middle, last), inputs.nbytes + targets.nbytes)


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What the memory behaviour of a module depends on: types, settings and shapes; equal modules are profiled once."""
    parts: list[object] = []
    for name, layer in module.named_modules():
        settings = [
            (key, repr(value))
            for key, value in sorted(vars(layer).items())
            if isinstance(value, int | str | list | tuple | type(None)) and not key.startswith("_")
        ]
        tensors = [(key, tensor.shape, tensor.requires_grad) for key, tensor in layer.named_parameters(recurse=False)]
        code = layer.code if isinstance(layer, fx.GraphModule) else ""
        parts.append((name, type(layer), tuple(settings), tuple(tensors), code))
    return tuple(parts)


def _profile_unit(module: nn.Module, features: Tensor, recompute: bool) -> UnitProfile:
    def run(needs_gradient: bool) -> tuple[int, int, int, bool, bool, int]:
        module.zero_grad(set_to_none=True)
        counter = PeakMemory()
        leaf = torch.empty_like(features, requires_grad=needs_gradient)
        with counter:
            entry = leaf * 1  # no leaf, so that only the unit's graph can keep it
            size = counter.current
            counter.peak = size
            result = recomputed(module, entry, module) if recompute else module(entry)
            forward = counter.peak - size
            output = result.untyped_storage().nbytes()
            edge = torch.autograd.graph.get_gradient_edge(result)
            gradient = torch.empty_like(result)
            before = counter.current
            del result
            keeps_output = counter.current == before
            before = counter.current
            del entry
            keeps_input = counter.current == before
            level = counter.current - gradient.nbytes
            kept = level - (size if keeps_input else 0) - (output if keeps_output else 0)
            counter.peak = counter.current
            torch.autograd.backward(edge, gradient)
            backward = counter.peak - (size if keeps_input else 0)
        return forward, kept, output, keeps_input, keeps_output, backward

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    forward, kept, output, keeps_input, keeps_output, backward = run(needs_gradient=True)
    backward_first = run(needs_gradient=False)[-1] if trained else backward
    return UnitProfile(
        lasting=_lasting(module),
        gradients=sum(parameter.nbytes for parameter in trained),
        output=output,
        kept=kept,
        keeps_input=keeps_input,
        keeps_output=keeps_output,
        forward=forward,
        backward=backward,
        backward_first=backward_first,
    )


def _profile_ends(
    unit: Unit,
    following: Sequence[Unit],
    features: Tensor,
    targets: Tensor,
    inputs: Tensor,
    objective: Objective | None,
    momentum: Momentum | None,
) -> list[EndProfile]:
    """For the first, a middle and the last local block; profiled once where they are built alike."""
    if not following:
        return [_profile_loss(F.cross_entropy, [], features, targets)] * 3
    ends: list[EndProfile] = []
    known: dict[str, EndProfile] = {}
    for index in range(3):
        try:
            if objective is None:
                raise LocalGradError("objective is None, and a block cannot end without one; give one")
            branches, head = build_auxiliary(unit, following, inputs, index, 4, objective, momentum)
        except LocalGradError:
            ends.append(EndProfile(INFINITE, 0, 0))
            continue
        modules = [head] if branches is None else [branches, head]

        def loss(
            features: Tensor, targets: Tensor, head: nn.Module = head, branches: nn.Module | None = branches
        ) -> Tensor:
            return head(features if branches is None else branches(features), targets, inputs)

        if str(head) not in known:
            known[str(head)] = _profile_loss(loss, modules, features, targets)
        ends.append(known[str(head)])
    return ends


def _profile_loss(
    loss: Callable[[Tensor, Tensor], Tensor], modules: Sequence[nn.Module], features: Tensor, targets: Tensor
) -> EndProfile:
    counter = PeakMemory()
    entry = torch.empty_like(features, requires_grad=True)
    with counter:
        loss(entry, targets).backward()
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return EndProfile(
        lasting=sum(map(_lasting, modules)),
        gradients=sum(parameter.nbytes for parameter in trained),
        peak=counter.peak,
    )


def _lasting(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers(), *(p for p in module.parameters() if p.requires_grad)]
    return sum(tensor.nbytes for tensor in tensors)
