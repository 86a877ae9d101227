"""Profile the memory of each unit and of the auxiliary networks after it in a training step."""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from localgrad.core.auxiliary import build_auxiliary
from localgrad.core.costs import without_data
from localgrad.core.explain import one_value_a_channel
from localgrad.core.meta import to_meta
from localgrad.core.modules import named_modules
from localgrad.core.momentum import Momentum
from localgrad.core.recompute import recomputed
from localgrad.core.site import Criterion, Objective
from localgrad.core.tables import own_parameters
from localgrad.core.trees import leaves
from localgrad.core.units import Unit
from localgrad.errors import CannotSitError, LocalGradError
from localgrad.planning.measure import Operations, PeakMemory
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
    parts: int = 1,
    targets: Any = None,
    criterion: Criterion = F.cross_entropy,
    known: dict[Any, Any] | None = None,
) -> Profile:
    """Profile every unit, and the auxiliary networks after every unit, on tensors without data: nothing is computed.

    Args:
        found: the units, from `localgrad.units`.
        example: a batch of the size to train with. With `"bf16-mixed"` its device chooses the rules of autocast: the
            CPU's for an example on the CPU, else CUDA's.
        objective: the local objective of a block; without one no cut is possible.
        momentum: the momentum auxiliary network of a block, or None.
        recompute: whether each unit is checkpointed.
        precision: `"32-true"`, or `"bf16-mixed"` for each block's forward pass under bf16 autocast.
        step_each_block: as in `local_step`.
        parts: number of micro-batches, as in `local_step`; the largest is profiled.
        targets: an example of the targets for objective and criterion; classes `(N,)` if None.
        criterion: loss of the model's output.
        known: a cache of profiles of units and auxiliary networks. This call reads it and adds to it.
    """
    simulation = Simulation(precision, example.device.type)
    on_meta = [replace(unit, module=to_meta(unit.module).train()) for unit in found]
    with simulation.running():
        samples = -(-len(example) // parts)
        inputs = torch.empty((samples, *example.shape[1:]), dtype=example.dtype, device=simulation.device)
        wanted = without_data(targets, len(example), samples, simulation.device)
        whole = without_data(targets, len(example), len(example), torch.device("meta"))
    batch = example.nbytes + sum(leaf.nbytes for leaf in leaves(whole) if isinstance(leaf, Tensor))
    setting = (precision, simulation.cuda_rules, inputs.shape, example.dtype, parts > 1)
    known = {} if known is None else known
    features = inputs
    profiles: list[UnitProfile] = []
    made: list[tuple[torch.Size, torch.dtype]] = []
    for unit in on_meta:
        shared = bool(profiles) and profiles[-1].inner.keeps_output  # the graph of the unit before saves this input
        key = ("unit", *setting, recompute, shared, features.shape, features.dtype, _signature(unit.module))
        if key not in known:
            module = copy.deepcopy(unit.module)  # to_fake() changes it, and momentum copies the one on meta
            with simulation.running(), _explained(f"the unit {unit.name!r}", [module], samples):
                placed = simulation.to_fake(module)
                run = partial(_run_unit, placed, features, recompute, unit.writes_input, parts > 1, simulation)
                known[key] = _profile_unit(placed, features, shared, run, simulation)
        profiled, shape, dtype = known[key]
        with simulation.running():
            features = torch.empty(shape, dtype=dtype, device=simulation.device)
        profiles.append(profiled)
        made.append((shape, dtype))
    model = found[0].frozen.model
    model = None if model is None or objective is None else to_meta(model)
    factories = (objective, momentum, criterion, model)
    ends = _Ends(on_meta, made, factories, (wanted, inputs), simulation, setting, known)
    return Profile(tuple(profiles), ends.of_roles, batch, step_each_block, parts, ends.at if ends.differ else None)


class _Ends:
    """Profiles of momentum and objective for any block that ends after any unit.

    Attributes:
        of_roles: for each role (first, middle and last local block, of four blocks) the profiles after each unit.
        differ: whether parameters have other shapes from role to role, so that they may differ in any block
            (AugLocal's).
    """

    def __init__(
        self,
        found: Sequence[Unit],
        made: Sequence[tuple[torch.Size, torch.dtype]],
        factories: tuple[Objective | None, Momentum | None, Criterion, nn.Module | None],
        batch: tuple[Any, Tensor],
        simulation: Simulation,
        setting: tuple[Any, ...],
        known: dict[Any, Any],
    ) -> None:
        self.units, self.made, self.factories, self.batch = found, made, factories, batch
        self.simulation, self.setting, self.known = simulation, setting, known
        self.counted = {id(parameter) for unit in found for parameter in unit.module.parameters()}
        roles = [[self._end(position, role, 4) for position in range(len(found))] for role in range(3)]
        first, middle, last = (tuple(end for end, _ in role) for role in roles)
        self.of_roles = (first, middle, last)
        self.differ = any(len({shapes for _, shapes in ends}) > 1 for ends in zip(*roles, strict=True))
        self._at: dict[tuple[int, int], tuple[EndProfile, ...]] = {}

    def at(self, index: int, num_blocks: int) -> tuple[EndProfile, ...]:
        """Profiles of block `index` of `num_blocks` after each unit where it can end; elsewhere those of its role."""
        if (index, num_blocks) not in self._at:
            begin, stop = index, len(self.units) - num_blocks + index
            role = self.of_roles[0 if index == 0 else 2 if index == num_blocks - 2 else 1]
            self._at[index, num_blocks] = tuple(
                self._end(position, index, num_blocks)[0] if begin <= position <= stop < len(role) - 1 else end
                for position, end in enumerate(role)
            )
        return self._at[index, num_blocks]

    def _end(self, position: int, index: int, num_blocks: int) -> tuple[EndProfile, Any]:
        """Profile of a block's end after the unit at `position`, and the shapes of its auxiliary parameters."""
        unit, rest = self.units[position], self.units[position + 1 :]
        objective, momentum, criterion, model = self.factories
        wanted, inputs = self.batch
        modules: list[nn.Module] | str = []
        if rest:
            example = torch.empty(inputs.shape, dtype=inputs.dtype, device="meta")
            block, following = (index, num_blocks), rest[:-1] or rest
            modules = _auxiliary(unit, following, rest, example, block, objective, momentum, criterion, model)
        if isinstance(modules, str):
            return EndProfile(INFINITE, 0, 0, 0, 0, 0, refused=modules), None
        # the units' profiles count the frozen parameters that copies share with them
        shared = sum(p.nbytes for module in modules for p in module.parameters() if id(p) in self.counted)
        key = ("end", *self.setting, *self.made[position], *map(_signature, modules))
        if key not in self.known:
            shape, dtype = self.made[position]
            with self.simulation.running(), _explained(f"the objective after {unit.name!r}", modules, len(inputs)):
                features = torch.empty(shape, dtype=dtype, device=self.simulation.device)
                accumulates = self.setting[-1]
                profiled = _profile_end(modules, features, wanted, inputs, criterion, accumulates, self.simulation)
            self.known[key] = profiled
        made = tuple(each.shape for module in modules for each in module.parameters())
        return replace(self.known[key], lasting=self.known[key].lasting - shared), made


@contextmanager
def _explained(what: str, modules: Sequence[nn.Module], samples: int) -> Generator[None, None, None]:
    """Context: an error inside says that `what` needs data, or more than one sample, to run."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, LocalGradError):
            raise
        if one_value_a_channel(error, modules, samples):
            raise LocalGradError(
                f"{what} has a batch norm, which a batch of one leaves one value a channel: give two samples or more"
            ) from error
        raise LocalGradError(
            f"{what} cannot be profiled without data ({str(error).strip().splitlines()[0]}): what a forward pass keeps "
            "must follow from shapes alone; if it takes other targets than classes (N,), give targets=, an example of "
            "them; else measure a real step with localgrad.planning.step_peak"
        ) from error


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Key of a module's memory: classes, settings, shapes and dtypes. Modules with equal keys are profiled once."""
    parts: list[object] = []
    for name, layer in named_modules(module):
        settings = [
            (key, repr(cast(Any, value)))
            for key, value in sorted(vars(layer).items())
            if isinstance(value, int | float | str | list | tuple | type(None))
        ]
        tensors = [
            (key, tensor.shape, tensor.dtype, tensor.requires_grad)
            for key, tensor in own_parameters(layer).items()
            if tensor is not None
        ]
        code = layer.code if isinstance(layer, fx.GraphModule) else ""
        parts.append((name, type(layer), tuple(settings), tuple(tensors), code))
    return tuple(parts)


class _Before(torch.autograd.Function):
    """Stand-in for the preceding units: an input that only the graph holds, with a gradient that is discarded."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, features: Tensor) -> Tensor:
        return torch.empty_like(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class _After(torch.autograd.Function):
    """Stand-in for the following units: saves nothing, and returns a gradient that only the autograd engine holds."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.like = features.shape, features.dtype, features.device
        return features.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def _profile_unit(
    module: nn.Module, features: Tensor, shared: bool, run: Callable[..., Pass], simulation: Simulation
) -> tuple[UnitProfile, torch.Size, torch.dtype]:
    """Profile of a unit, and shape and dtype of its output."""
    with torch.no_grad(), simulation.forward_pass():
        result = module(features.clone())
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
    accumulates: bool,
    simulation: Simulation,
    *,
    first: bool = False,
    shared: bool = False,
    last: bool = False,
) -> Pass:
    """Memory and operations of one forward and one backward pass of a unit.

    With `first` the input requires no gradient. With `shared` the input stays alive, because the graph of the unit
    before saves it. With `last` the output stays alive.
    """
    _set_gradients(module, accumulates)
    anchor = torch.zeros((), device=features.device, requires_grad=True)
    counter, operations = PeakMemory(), Operations()
    with operations, counter:
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
        is_input = result.untyped_storage() is entry.untyped_storage()  # changed in place, or a view
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
    return Pass(kept, keeps_input, keeps_output, casts, forward, backward, backward, operations.total)


def _set_gradients(module: nn.Module, accumulates: bool) -> None:
    """Reset gradients: to None, or to zeros if gradients of earlier micro-batches are accumulated."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if accumulates and parameter.requires_grad else None


def _auxiliary(
    unit: Unit,
    following: Sequence[Unit],
    rest: Sequence[Unit],
    example: Tensor,
    block: tuple[int, int],
    objective: Objective | None,
    momentum: Momentum | None,
    criterion: Criterion,
    model: nn.Module | None,
) -> list[nn.Module] | str:
    """Momentum and objective of `block`, its index and the number of blocks; or why no block can end here."""
    if objective is None:
        return "there is no objective"
    try:
        branches, head = build_auxiliary(unit, following, rest, example, *block, objective, momentum, criterion, model)
    except CannotSitError as error:
        return str(error)
    return [head] if branches is None else [branches, head]


def _profile_end(
    modules: Sequence[nn.Module],
    features: Tensor,
    targets: Any,
    inputs: Tensor,
    criterion: Criterion,
    accumulates: bool,
    simulation: Simulation,
) -> EndProfile:
    """Profile of momentum and objective, or of the criterion on the model's output if `modules` is empty."""
    modules = [simulation.to_fake(module) for module in modules]
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    passes: list[int] = []
    total: list[int] = []
    for needs_gradient in (True, False):
        for module in modules:
            _set_gradients(module, accumulates)
        entry = torch.empty_like(features, requires_grad=needs_gradient)
        counter, operations = PeakMemory(), Operations()
        with operations, counter:
            with simulation.forward_pass():
                mixed = modules[0](entry) if len(modules) == 2 else entry
                loss = modules[-1](mixed, targets, inputs) if modules else criterion(mixed, targets)
                passes.append(counter.peak)
            del mixed
            counter.peak = counter.current
            if loss.requires_grad:
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
        passes.append(counter.peak)
        total.append(operations.total)
    forward, backward, forward_frozen, backward_frozen = passes
    return EndProfile(
        lasting=sum(map(_lasting, modules)),
        gradients=sum(parameter.nbytes for parameter in trained),
        forward=forward,
        backward=backward,
        forward_frozen=forward_frozen,
        backward_frozen=backward_frozen,
        operations=total[0],
    )


def _lasting(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers(), *(p for p in module.parameters() if p.requires_grad)]
    return sum(tensor.nbytes for tensor in tensors)
