"""Profiles: what each unit does to memory; the peak of any cuts, and the best cuts, follow by addition."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from localgrad.blocks import Objective, build_auxiliary
from localgrad.errors import LocalGradError
from localgrad.memory import PeakMemory, to_meta
from localgrad.momentum import Momentum
from localgrad.partition import check_num_blocks
from localgrad.recompute import recomputed
from localgrad.simulation import Precision, Simulation
from localgrad.units import Unit

INFINITE = float("inf")


@dataclass(frozen=True)
class Pass:
    """What a unit's forward and backward pass do to memory, in bytes.

    Attributes:
        kept: what its graph keeps for the backward pass, without input and output.
        keeps_input: whether its graph keeps the input.
        keeps_output: whether its graph keeps the output.
        casts: weights in lower precision that autocast caches until the block's forward pass ends, and no graph keeps.
        forward: the most that is alive during its forward pass beyond the input.
        backward: the most that is alive during its backward pass, its own kept bytes included, beyond the input.
        backward_last: the same where it is the last of a block and its output stays.
    """

    kept: int
    keeps_input: bool
    keeps_output: bool
    casts: int
    forward: int
    backward: int
    backward_last: int


@dataclass(frozen=True)
class UnitProfile:
    """What one unit does to memory in a training step.

    Attributes:
        lasting: bytes of parameters, buffers, and one buffer of optimizer state a trained parameter.
        gradients: bytes of gradients of its parameters; 0 for a frozen unit.
        output: bytes of its features.
        inner: its passes where its input needs a gradient.
        first: its passes where that needs none: the first unit of a block, and those up to its first trained one.
    """

    lasting: int
    gradients: int
    output: int
    inner: Pass
    first: Pass


@dataclass(frozen=True)
class EndProfile:
    """What a loss does to memory, in bytes: of a block that ends after a unit, or of the model's output.

    Attributes:
        lasting: parameters, buffers and optimizer state of momentum and objective; infinite where they cannot sit.
        gradients: of their parameters.
        forward: the most that is alive during their forward pass beyond the features.
        backward: the most that is alive during their backward pass beyond the features.
        forward_frozen: as `forward` where nothing before them is trained, so that the features need no gradient.
        backward_frozen: as `backward`, likewise.
        refused: why they cannot sit, where they cannot.
    """

    lasting: float
    gradients: int
    forward: int
    backward: int
    forward_frozen: int
    backward_frozen: int
    refused: str = ""


@dataclass(frozen=True)
class Profile:
    """A model's memory behaviour, unit by unit; the peak of any cuts follows by addition.

    Attributes:
        units: one profile a unit.
        ends: of a block that ends after each unit, and of the model's output for the last unit; three times, for the
            first, a middle and the last local block, since an objective may differ between them.
        batch: bytes of inputs and targets.
        step_each_block: whether a block's gradients are gone before the next block's forward pass.
    """

    units: tuple[UnitProfile, ...]
    ends: tuple[tuple[EndProfile, ...], tuple[EndProfile, ...], tuple[EndProfile, ...]]
    batch: int
    step_each_block: bool = False

    def ends_of(self, index: int, num_blocks: int) -> tuple[EndProfile, ...]:
        """What a block with this index may end in."""
        if index == 0:
            return self.ends[0]
        return self.ends[2] if index == num_blocks - 2 else self.ends[1]

    @property
    def most_blocks(self) -> int:
        """The largest number of blocks that there can be."""
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

    def _waiting(self, start: int) -> int:
        """Gradients of the units before `start` that wait while the block from there is trained."""
        return 0 if self.step_each_block else self._gradients_before[start]

    def peaks_from(self, start: int, ends: Sequence[EndProfile]) -> list[float]:
        """Peak of a block from the unit `start` to each later unit: what it adds while it is trained."""
        passes = self._passes_from(start)
        entry = 0 if start == 0 else self.units[start - 1].output
        kept = entry if passes[0].keeps_input else 0
        peaks: list[float] = []
        forward_peak, level, casts = 0.0, float(kept), 0
        caller = entry - kept  # holds the block's input until its forward pass ends
        # of the units so far: their backward pass beyond what gradients of later units and the block's output add
        backward: list[float] = []
        alive_input = 0
        for position, (here, after) in enumerate(zip(passes, [*passes[1:], None], strict=True), start=start):
            unit, end = self.units[position], ends[position]
            forward_peak = max(forward_peak, level + caller + casts + alive_input + here.forward)
            casts += here.casts
            last, before = level + here.backward_last, level + here.backward
            level += here.kept
            held = unit.output  # the block's own output stays alive while it is trained
            gradients = self._gradients_before[position + 1]
            frozen = gradients == self._gradients_before[start]
            forward, back = (end.forward_frozen, end.backward_frozen) if frozen else (end.forward, end.backward)
            at_end = level + held + max(caller + casts + forward, back)
            earlier = (peak + held - self._gradients_before[start + 1 + i] for i, peak in enumerate(backward))
            worst = max([last - gradients, *earlier]) + gradients
            backward.append(before)
            peaks.append(max(forward_peak, at_end, worst + end.gradients))
            kept = unit.output if here.keeps_output or (after is not None and after.keeps_input) else 0
            level += kept
            alive_input = unit.output - kept
        return peaks

    def _passes_from(self, start: int) -> list[Pass]:
        """Of each unit of a block from `start`: no gradient goes back beyond its first trained one."""
        before = self._gradients_before
        return [
            unit.first if before[position] == before[start] else unit.inner
            for position, unit in enumerate(self.units[start:], start=start)
        ]

    def peak(self, cuts: Sequence[int]) -> float:
        """Peak bytes of a step with blocks that end after these units: everything that lives in it."""
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.units) - 1]
        lasting, worst, gradients = float(self._lasting), 0.0, 0
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            ends = self.ends_of(index, len(stops))
            peak = self.peaks_from(start, ends)[stop - start]
            worst = max(worst, gradients + self._waiting(start) + peak)
            if index < len(cuts):
                lasting += ends[stop].lasting
                gradients += 0 if self.step_each_block else ends[stop].gradients
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
                end = ends[stop] if stop < last else EndProfile(0, 0, 0, 0, 0, 0)
                if end.lasting == INFINITE:
                    continue
                left = 0 if self.step_each_block else end.gradients
                choices = [
                    (
                        lasting + end.lasting,
                        waiting + left,
                        max(worst, waiting + self._waiting(cut + 1) + table[cut + 1][stop - cut - 1]),
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
    precision: Precision = "32-true",
    step_each_block: bool = False,
    known: dict[Any, Any] | None = None,
) -> Profile:
    """Profile every unit, and every place where a block may end, on tensors without data: nothing is computed.

    Args:
        found: the units, from `localgrad.units`.
        example: a batch of the size to train with. In bf16 its device decides whose autocast is meant: the processor's
            for an example on the CPU, else CUDA's.
        objective: what ends a block; without one no cut is possible.
        momentum: likewise, or None.
        recompute: with activation checkpointing of each unit.
        precision: `"32-true"`, or `"bf16-mixed"` for each block's forward pass under bf16 autocast.
        step_each_block: as in `local_step`.
        known: what earlier calls have profiled, filled further; to be shared by calls that have parts in common.
    """
    simulation = Simulation(precision, example.device.type)
    on_meta = [replace(unit, module=to_meta(unit.module)) for unit in found]
    with simulation.running():
        inputs = torch.empty(example.shape, dtype=example.dtype, device=simulation.device)
        targets = torch.zeros(len(example), dtype=torch.long, device=simulation.device)
    setting = (precision, simulation.cuda_rules, example.shape, example.dtype)
    known = {} if known is None else known
    features, profiles = inputs, []
    ends: list[list[EndProfile]] = [[], [], []]
    for position, unit in enumerate(on_meta):
        shared = bool(profiles) and profiles[-1].inner.keeps_output  # the input stays for the unit before
        key = ("unit", *setting, recompute, shared, features.shape, features.dtype, _signature(unit.module))
        if key not in known:
            module = copy.deepcopy(unit.module)  # the next block's first unit is copied from `meta`
            with simulation.running(), _explained(f"the unit {unit.name!r}"):
                placed = simulation.place(module)
                known[key] = _profile_unit(placed, features, recompute, shared, unit.writes_input, simulation)
        profiled, shape, dtype = known[key]
        with simulation.running():
            features = torch.empty(shape, dtype=dtype, device=simulation.device)
        profiles.append(profiled)
        following = on_meta[position + 1 : -1] or on_meta[position + 1 :]
        for role in range(3):
            modules = _auxiliary(unit, following, example, role, objective, momentum) if following else []
            if isinstance(modules, str):
                ends[role].append(EndProfile(INFINITE, 0, 0, 0, 0, 0, refused=modules))
                continue
            key = ("end", *setting, shape, dtype, *map(_signature, modules))
            if key not in known:
                with simulation.running(), _explained(f"the objective after {unit.name!r}"):
                    known[key] = _profile_end(modules, features, targets, inputs, simulation)
            ends[role].append(known[key])
    first, middle, last = map(tuple, ends)
    return Profile(tuple(profiles), (first, middle, last), inputs.nbytes + targets.nbytes, step_each_block)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say which part it is that needs values to run."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, LocalGradError):
            raise
        if "more than 1 value per channel" in str(error):
            raise LocalGradError(
                f"{what} has a batch norm, which a batch of one leaves one value a channel: give two samples or more"
            ) from error
        raise LocalGradError(
            f"{what} cannot be profiled without data ({str(error).strip().splitlines()[0]}): what a forward pass keeps "
            "must follow from shapes alone; measure a real step with localgrad.memory.step_peak instead"
        ) from error


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What the memory behaviour of a module depends on: types, settings and shapes; equal modules are profiled once."""
    parts: list[object] = []
    for name, layer in module.named_modules():
        settings = [
            (key, repr(value))
            for key, value in sorted(vars(layer).items())
            if isinstance(value, int | float | str | list | tuple | type(None))
        ]
        tensors = [
            (key, tensor.shape, tensor.dtype, tensor.requires_grad)
            for key, tensor in layer.named_parameters(recurse=False)
        ]
        code = layer.code if isinstance(layer, fx.GraphModule) else ""
        parts.append((name, type(layer), tuple(settings), tuple(tensors), code))
    return tuple(parts)


class _Before(torch.autograd.Function):
    """Features of the units before: nobody outside holds them, and their gradient is dropped when it arrives."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, features: Tensor) -> Tensor:
        return torch.empty_like(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class _After(torch.autograd.Function):
    """The units after: they keep nothing, and give a gradient that is the engine's own, as in a real backward pass."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.like = features.shape, features.dtype, features.device
        return features.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def _profile_unit(
    module: nn.Module, features: Tensor, recompute: bool, shared: bool, writes_input: bool, simulation: Simulation
) -> tuple[UnitProfile, torch.Size, torch.dtype]:
    """The profile, and the shape and dtype of the output."""
    with torch.no_grad(), simulation.forward_pass():
        result = module(features.clone())
    run = partial(_run_unit, module, features, recompute, writes_input, simulation)
    output = result.untyped_storage().nbytes()
    inner, first = run(), run(first=True)
    if shared:
        inner = replace(inner, backward=run(shared=True).backward)
    inner = replace(inner, backward_last=_backward_last(inner, output, partial(run, shared=shared)))
    first = replace(first, backward_last=_backward_last(first, output, partial(run, first=True)))
    gradients = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    return UnitProfile(_lasting(module), gradients, output, inner, first), result.shape, result.dtype


def _backward_last(passes: Pass, output: int, run: Callable[..., Pass]) -> int:
    return run(last=True).backward if passes.keeps_output else passes.backward + output


def _run_unit(
    module: nn.Module,
    features: Tensor,
    recompute: bool,
    writes_input: bool,
    simulation: Simulation,
    *,
    first: bool = False,
    shared: bool = False,
    last: bool = False,
) -> Pass:
    """What one forward and one backward pass show.

    `first`: its input needs no gradient. `shared`: its input stays, for the unit before. `last`: its output stays.
    """
    module.zero_grad(set_to_none=True)
    anchor = torch.zeros((), device=features.device, requires_grad=True)
    counter = PeakMemory()
    with counter:
        entry: Any = torch.empty_like(features) if first else _Before.apply(anchor, features)
        size = counter.current
        counter.peak = size
        with simulation.forward_pass():
            result = recomputed(module, entry, module, writes_input) if recompute else module(entry)
            forward = counter.peak - size
            casts = counter.current
        casts -= counter.current
        output = result.untyped_storage().nbytes()
        rest: Any = _After.apply(result)
        held = [entry.detach()] * shared + [result.detach()] * last
        is_input = result.untyped_storage() is entry.untyped_storage()  # changed in place, or looked at otherwise
        before = counter.current
        del result
        keeps_output = counter.current == before
        before = counter.current
        del entry
        keeps_input = counter.current == before
        keeps_output = keeps_input if is_input else keeps_output
        kept = counter.current - rest.nbytes - size * keeps_input - output * keeps_output
        backward = 0
        if rest.requires_grad:
            counter.peak = counter.current
            rest.backward()
            backward = counter.peak - size * keeps_input
    del held
    return Pass(kept, keeps_input, keeps_output, casts, forward, backward, backward_last=backward)


def _auxiliary(
    unit: Unit,
    following: Sequence[Unit],
    example: Tensor,
    role: int,
    objective: Objective | None,
    momentum: Momentum | None,
) -> list[nn.Module] | str:
    """Momentum and objective of the first, a middle or the last local block; why not, if it cannot end here."""
    if objective is None:
        return "there is no objective"
    try:
        branches, head = build_auxiliary(unit, following, example, role, 4, objective, momentum)
    except LocalGradError as error:
        return str(error)
    return [head] if branches is None else [branches, head]


def _profile_end(
    modules: Sequence[nn.Module], features: Tensor, targets: Tensor, inputs: Tensor, simulation: Simulation
) -> EndProfile:
    """Of momentum and objective, or of the cross-entropy of the model's output where there are none."""
    modules = [simulation.place(module) for module in modules]
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    passes: list[int] = []
    for needs_gradient in (True, False):
        for parameter in trained:
            parameter.grad = None
        entry = torch.empty_like(features, requires_grad=needs_gradient)
        counter = PeakMemory()
        with counter:
            with simulation.forward_pass():
                mixed = modules[0](entry) if len(modules) == 2 else entry
                loss = modules[-1](mixed, targets, inputs) if modules else F.cross_entropy(mixed, targets)
                passes.append(counter.peak)
            del mixed
            counter.peak = counter.current
            if loss.requires_grad:
                loss.backward()
        passes.append(counter.peak)
    forward, backward, forward_frozen, backward_frozen = passes
    return EndProfile(
        lasting=sum(map(_lasting, modules)),
        gradients=sum(parameter.nbytes for parameter in trained),
        forward=forward,
        backward=backward,
        forward_frozen=forward_frozen,
        backward_frozen=backward_frozen,
    )


def _lasting(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers(), *(p for p in module.parameters() if p.requires_grad)]
    return sum(tensor.nbytes for tensor in tensors)
