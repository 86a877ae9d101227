"""Profiles: what each unit and each auxiliary network does to memory in a step."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from localgrad.core.auxiliary import build_auxiliary
from localgrad.core.meta import to_meta
from localgrad.core.momentum import Momentum
from localgrad.core.recompute import recomputed
from localgrad.core.site import Objective
from localgrad.core.units import Unit
from localgrad.errors import CannotSitError, LocalGradError
from localgrad.planning.measure import PeakMemory
from localgrad.planning.peaks import INFINITE, EndProfile, Pass, Profile, UnitProfile
from localgrad.planning.simulation import Precision, Simulation


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
    on_meta = [replace(unit, module=to_meta(unit.module).train()) for unit in found]
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
        rest = on_meta[position + 1 :]
        following = rest[:-1] or rest
        for role in range(3):
            modules = _auxiliary(unit, following, rest, example, role, objective, momentum) if following else []
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
    rest: Sequence[Unit],
    example: Tensor,
    role: int,
    objective: Objective | None,
    momentum: Momentum | None,
) -> list[nn.Module] | str:
    """Momentum and objective of the first, a middle or the last local block; why not, if it cannot end here."""
    if objective is None:
        return "there is no objective"
    try:
        branches, head = build_auxiliary(unit, following, rest, example, role, 4, objective, momentum)
    except CannotSitError as error:
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
