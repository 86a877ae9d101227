"""Observe one forward pass: the calls of modules in order, and the parameters that each block's loss would reach."""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from localgrad.core.autograd_graph import Edge, Node, edges, is_reentrant_checkpoint, leaf_of, made_at, saves_with
from localgrad.core.restore import restored
from localgrad.core.tracing import CHAIN, is_stage
from localgrad.core.trees import leaves
from localgrad.core.versions import version
from localgrad.errors import LocalGradError

REENTRANT = (
    "the model has reentrant activation checkpointing (use_reentrant=True), which trains nothing where its input needs "
    "no gradient, as that of a block: give use_reentrant=False, or isolate(..., recompute=True) in its place"
)


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: dotted name of the module.
        module: the module.
        start: time at which the call began. The clock counts the beginnings and ends of all calls.
        end: time at which the call ended.
        arguments: the tensors among its arguments that require a gradient, as edges of the autograd graph.
        outputs: the tensors in its output that require a gradient, as edges of the autograd graph.
        inputs: shape of the first floating-point tensor among its arguments.
        features: shape of the first floating-point tensor in its output, or None.
        dtype: dtype of the features.
        source: the features as an edge of the autograd graph; None if they require no gradient.
        writes_input: whether the call changed one of its arguments in place.
        checkpointed: whether the call was made inside the model's own activation checkpointing.
    """

    name: str
    module: nn.Module
    start: int
    end: int
    arguments: tuple[Edge, ...]
    inputs: torch.Size
    outputs: tuple[Edge, ...] = ()
    features: torch.Size | None = None
    dtype: torch.dtype = torch.float32
    source: Edge | None = None
    writes_input: bool = False
    checkpointed: bool = False

    def holds(self, other: "Call") -> bool:
        """Whether the other call was made inside this one."""
        return self.start < other.start and other.end < self.end


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """An observed forward pass.

    Attributes:
        calls: all calls in order of their start; the first is that of the model itself.
        roots: the model's outputs that a training loop may back-propagate, as edges of the autograd graph: its scalars
            (losses), or all of its tensors if it returns no scalar.
    """

    calls: tuple[Call, ...]
    roots: tuple[Edge, ...]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def first_floating(tree: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output: its features."""
    return next((tensor for tensor in tensors_in(tree) if tensor.is_floating_point()), None)


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass, from a tuple, a mapping or a single argument."""
    if isinstance(example, Mapping):
        return (), dict(cast(Mapping[str, Any], example))
    return (cast(tuple[Any, ...], example) if isinstance(example, tuple) else (example,)), {}


def observe(model: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> ForwardPass:
    """Run `model(*arguments, **named)` once in training mode, and record every call of a module.

    Autograd saves no tensors for a backward pass, so that the run needs the memory of inference. Buffers, attributes,
    training modes, `requires_grad` and the random generators are restored afterwards.
    """
    calls: list[Call] = []
    clock = iter(range(1 << 60))
    running: list[tuple[Call, list[tuple[Tensor, int]]]] = []

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensors_in((args, kwargs))
        shape = next((tensor.shape for tensor in given if tensor.is_floating_point()), torch.Size())
        call = Call(name, module, next(clock), -1, edges(given), shape, checkpointed=not saves_with(_drop))
        calls.append(call)
        running.append((call, [(tensor, version(tensor)) for tensor in given]))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, given = running.pop()
        features = first_floating(output)
        call.end = next(clock)
        call.outputs = edges(tensors_in(output))
        if features is not None:
            call.features, call.dtype = features.shape, features.dtype
            call.source = next(iter(edges([features])), None)
        call.writes_input = any(version(tensor) != before for tensor, before in given)

    with ExitStack() as stack:
        stack.enter_context(_in_training(model))
        stack.enter_context(saved_tensors_hooks(_drop, _drop))
        stack.enter_context(torch.enable_grad())
        modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        for name, module in modules.items():
            before = module.register_forward_pre_hook(partial(begin, name), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(end, prepend=True, with_kwargs=True).remove)
        output = model(*arguments, **named)
    found = tensors_in(output)
    losses = [tensor for tensor in found if tensor.ndim == 0]
    return ForwardPass(tuple(calls), edges(losses or found))


def _drop(tensor: Any) -> Any:
    """Saved-tensor hook that saves nothing: no backward pass follows."""
    return None


@contextmanager
def _in_training(model: nn.Module) -> Generator[None, None, None]:
    """Context: a model in evaluation mode trains, and weights require gradients; everything is restored at the end."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {p.device for p, _ in parameters if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    random: Any = torch.random
    evaluating = not model.training
    with restored(model), random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        try:
            for module in model.modules():
                module.training |= evaluating  # not train(), which the user's module may override
            for parameter, _ in parameters:
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)


def trained_by_block(run: ForwardPass, cuts: Sequence[Call]) -> list[set[Tensor]]:
    """For each block, the leaves that its loss reaches if the outputs of all cuts are detached for their readers.

    Raises:
        LocalGradError: a block reads a tensor from inside another block, or the model has reentrant checkpointing.
    """
    stops = set[Edge]()  # the outputs of the cuts before a block; its own cut's outputs may also be read inside it
    owner: dict[Node, int] = {}
    reached: list[set[Tensor]] = []
    losses = [(cut.source,) if cut.source else () for cut in cuts]
    for block, roots in enumerate([*losses, run.roots]):
        found, waiting = set[Tensor](), [edge for edge in roots if edge not in stops]
        while waiting:
            node, output = waiting.pop()
            leaf = leaf_of(node)
            if leaf is not None:
                found.add(leaf)
            elif node not in owner:
                if cuts and is_reentrant_checkpoint(node):
                    raise LocalGradError(REENTRANT)
                owner[node] = block
                waiting += [edge for edge in node.next_functions if edge[0] is not None and edge not in stops]
            elif owner[node] != block:
                raise LocalGradError(_inside(run, cuts, (node, output), owner[node], block))
        reached.append(found)
        stops.update(cuts[block].outputs if block < len(cuts) else ())
    return reached


def _inside(run: ForwardPass, cuts: Sequence[Call], edge: Edge, owner: int, reader: int) -> str:
    makers = [c for c in run.calls[1:] if edge == c.source and not any(c.holds(cut) for cut in cuts)]
    before = [call for call in run.calls[1:] if call.source and made_at(call.source[0]) < made_at(edge[0])]
    where = f"of {makers[0].name!r}" if makers else f"made after {before[-1].name!r}" if before else "of its beginning"
    who = f"block {reader + 1}" if reader < len(cuts) else "the end of the network"
    advice = f"add {makers[0].name!r} to cuts" if makers else "make it the output of a module, and add that to cuts"
    return (
        f"{who} reads an output {where}, which is inside block {owner + 1} (cut {cuts[owner].name!r}), so their "
        f"gradients are not isolated: {advice} (a U-Net is cut at every level), or detach it in forward"
    )


def units_between(run: ForwardPass, start: int, cuts: Sequence[Call] = (), end: int | None = None) -> list[Call]:
    """The outermost calls with parameters that begin after time `start` and end by time `end`.

    In place of a container, or of a module with a cut inside, the calls inside it are taken.
    """
    found: list[Call] = []
    for call in run.calls[1:]:
        opened = is_container(call.module) or any(call.holds(cut) for cut in cuts)
        if (
            call.start > start
            and not opened
            and (end is None or call.end <= end)
            and any(True for _ in call.module.parameters())
        ):
            found.append(call)
            start = call.end
    return found


def is_container(module: nn.Module) -> bool:
    """Whether a module is a chain of modules (`nn.Sequential`, a stage of blocks)."""
    return isinstance(module, CHAIN) or is_stage(module)


def takes(call: Call, source: Call) -> bool:
    """Whether an argument of `call` is computed from the output of `source`."""
    seen, waiting = set[Node](), list(call.arguments)
    while waiting and source.source is not None:
        edge = waiting.pop()
        if edge == source.source:
            return True
        if edge[0] is not None and edge[0] not in seen and made_at(edge[0]) > made_at(source.source[0]):
            seen.add(edge[0])
            waiting += edge[0].next_functions
    return False


def places_to_cut(run: ForwardPass) -> list[Call]:
    """Calls after which a model can be cut, in order of their end. Modules called more than once are left out.

    Everything after such a call is computed from its output and from parameters. In the autograd graph, whose nodes are
    numbered in the order of their creation, only edges of its output lead from nodes before its end to later nodes.
    """
    edges, seen, waiting = list[tuple[int, int, Edge]](), set[Node](), list[Node]()

    def note(consumer: int, edge: Edge) -> None:
        node = edge[0]
        if node is not None and leaf_of(node) is None:
            edges.append((made_at(node), consumer, edge))
            if node not in seen:
                seen.add(node)
                waiting.append(node)

    newest = 1 + max((made_at(node) for node, _ in run.roots), default=0)
    for edge in run.roots:
        note(newest, edge)
    while waiting:
        node = waiting.pop()
        for edge in node.next_functions:
            note(made_at(node), edge)
    change: dict[int, int] = {}
    readers: dict[Edge, list[int]] = {}
    for made, read, edge in edges:
        change[made] = change.get(made, 0) + 1
        change[read] = change.get(read, 0) - 1
        readers.setdefault(edge, []).append(read)
    moments = sorted(change)
    passing = dict(zip(moments, accumulate(change[moment] for moment in moments), strict=True))

    def alone(call: Call) -> bool:
        if call.source not in readers or call.source in call.arguments:
            return False
        moment = max(made_at(node) for node, _ in call.outputs if node in seen)
        own = sum(read > moment for edge in call.outputs for read in readers.get(edge, ()))
        used = {node for node, output in call.outputs if (node, output) in readers}
        return passing[moment] == own > 0 and _made_on_the_way(call, used)

    times = Counter(call.module for call in run.calls)
    once = [call for call in run.calls[1:] if times[call.module] == 1]
    return sorted((call for call in once if alone(call)), key=lambda call: call.end)


def _made_on_the_way(call: Call, others: set[Node]) -> bool:
    """Whether the nodes `others`, of further outputs such as a position bias, are ancestors of the call's features."""
    assert call.source is not None
    seen, waiting = {call.source[0]}, [call.source[0]]
    while waiting and not others <= seen:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return others <= seen
