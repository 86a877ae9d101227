"""Tracing: a model as a chain of pieces, found with `torch.fx`, that hold the model's own modules."""

import inspect
import operator
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from localgrad.errors import LocalGradError

CHAIN = (nn.Sequential, nn.ModuleList)


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, object)


class _Tracer(fx.Tracer):
    """A tracer with blocks as leaves, which remembers where tracing failed."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, CHAIN) and any(True for child in module.children() for _ in child.parameters())


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is or holds a chain of blocks of one class, as the stages of RegNet and of timm are."""
    return any(
        isinstance(chain, CHAIN)
        and len(chain) > 0
        and len({type(block) for block in chain}) == 1
        and all(_is_block(block) for block in chain)
        for chain in (module, *module.children())
    )


def _leaves(model: nn.Module) -> set[str]:
    """Names of the modules that are not traced into.

    These are the layers of torch.nn and what is derived from them (timm's norm + activation layers read
    `self.training`, which tracing would freeze), and the children of chains.
    """
    leaves = set[str]()
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            plain_chain = type(child) in (*CHAIN, nn.ModuleDict)
            is_layer = any(c.__module__.startswith("torch.nn") for c in type(child).__mro__ if c not in _CONTAINERS)
            if not plain_chain and (is_layer or (isinstance(module, CHAIN) and not _is_stage(child))):
                leaves.add(path)
    return leaves


def _trace(model: nn.Module) -> fx.Graph:
    """Trace the model; a submodule whose forward cannot be traced becomes a leaf, and stays one unit."""
    leaves = _leaves(model)
    while True:
        tracer = _Tracer(leaves)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shape checks of the model warn about the tracer's proxies
                graph = tracer.trace(model, concrete_args=_defaults(model))
        except Exception as error:
            if tracer.failed and tracer.failed not in leaves:
                leaves.add(tracer.failed)
                continue
            reason = str(error).strip().split("\n")[0]
            raise LocalGradError(
                f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {reason}); name the "
                'submodules that make it up, in order: units(model, example, names=["stem", "blocks.0", ..., "head"])'
            ) from error
        return _single_output(graph, model)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of the forward pass, at their default values."""
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def _has_effect(node: fx.Node, model: nn.Module) -> bool:
    """Whether a call counts even if its result is not used: it writes in place."""
    if node.op in ("placeholder", "output") or node.target is operator.setitem:
        return True
    in_place = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        in_place = getattr(model.get_submodule(cast(str, node.target)), "inplace", False) is True
    if in_place:  # what it changes may still be read
        return any(user > node for source in node.all_input_nodes for user in source.users)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def _single_output(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Keep the first of several outputs (a main head before auxiliary ones), and drop what only the others need."""
    output = next(node for node in graph.nodes if node.op == "output")
    value = output.args[0]
    if isinstance(value, fx.Node) and isinstance(value.target, type) and issubclass(value.target, tuple):
        value = tuple(value.args)  # a named tuple is traced as a call of its class
    if isinstance(value, tuple | list) and value and isinstance(value[0], fx.Node):
        warnings.warn(
            f"{type(model).__name__} returns {len(value)} values while training: the first is trained, "
            "auxiliary outputs are left out",
            stacklevel=5,
        )
        output.args = (value[0],)
    elif not isinstance(value, fx.Node):
        raise LocalGradError(
            f"{type(model).__name__} returns {type(value).__name__}: it must return one tensor, or a tuple that "
            "starts with it; wrap the model so that it does"
        )
    graph.eliminate_dead_code(partial(_has_effect, model=model))
    if len([node for node in graph.nodes if node.op == "placeholder" and node.users]) != 1:
        raise LocalGradError(
            f"{type(model).__name__}.forward uses more than one argument: it must take one tensor; wrap the model"
        )
    return graph


class _Shapes(fx.Interpreter):
    """Run a graph and note the shape of every node's output."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


def traced(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """Pieces of the model by name, in order; composed they are the model, as far as tracing sees it.

    Raises:
        LocalGradError: the model cannot be traced or run on the example.
    """
    model.train()
    training = _trace(model)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluating = _trace(model)
    samples = two_samples(example)
    try:
        shapes = _Shapes(model, evaluating)
        shapes.run(samples)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if example.is_meta:
            raise LocalGradError(
                f"{type(model).__name__} does not run without data ({reason}), so its memory cannot be planned: "
                "measure a step with localgrad.memory.step_peak, or give a real example"
            ) from error
        raise LocalGradError(
            f"{type(model).__name__} does not run on the example of shape {tuple(example.shape)} ({reason}); "
            "give an example of the size, dtype and device that the model takes"
        ) from error
    segments = training_segments = _segments(model, evaluating, shapes)
    if str(training) != str(evaluating):
        training_shapes = _Shapes(model, training)
        with seeded(example.device):
            training_shapes.run(samples)
        training_segments = _segments(model, training, training_shapes)
    if [name for name, _ in segments] != [name for name, _ in training_segments]:
        raise LocalGradError(
            f"{type(model).__name__} runs different modules in training and in evaluation; name the submodules "
            "that make it up: units(model, example, names=[...])"
        )
    return [
        (name, _one_module(model, segment, training_segment))
        for (name, segment), (_, training_segment) in zip(segments, training_segments, strict=True)
    ]


def check_composition(model: nn.Module, pieces: Sequence[tuple[str, nn.Module]], example: Tensor) -> list[bool] | None:
    """Compare the pieces with the model in both modes: their outputs, what they draw at random, what they train.

    Tracing freezes what it cannot see, and what a forward pass does between named submodules is not in them.

    Returns:
        Whether each piece changes its input in place while training; None where there is no data to run on.

    Raises:
        LocalGradError: the pieces do not compute what the model does.
    """
    if example.is_meta:
        return None
    inputs = two_samples(example)
    before = [buffer.clone() for buffer in model.buffers()]

    writes: list[bool] = []

    def composed(features: Tensor) -> Tensor:
        writes.clear()
        for _, module in pieces:
            given, version = features, features._version
            features = module(given)
            writes.append(given._version != version)
        return features

    for training in (False, True):
        outcomes, draws, reached = [], [], []
        for run in (model, composed):
            for module in (model, *(module for _, module in pieces)):
                module.train(training)
            with seeded(example.device), torch.set_grad_enabled(training):
                output = run(inputs.clone())
                draws.append(_random_state(example.device))
            reached.append(_reached(output))
            values = output.detach() if isinstance(output, Tensor) else None
            del output  # its graph goes before the next run makes another
            outcomes.append([values, *(buffer.clone() for buffer in model.buffers())])
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
        # auxiliary heads, which are left out, may draw too
        compared = outcomes[0][0] is not None
        if compared and not (all(map(_same, *outcomes)) and draws[0] == draws[1]):
            raise LocalGradError(
                f"{type(model).__name__}, cut into units, does not compute what it did in "
                f"{'training' if training else 'evaluation'}: its forward pass draws random numbers, changes a buffer "
                "or branches outside of a torch.nn layer; move that into a submodule of an nn.Sequential, or name the "
                "submodules: units(model, example, names=[...])"
            )
        if training and reached[0] != reached[1]:
            names = [name for name, parameter in model.named_parameters() if id(parameter) in reached[0] ^ reached[1]]
            raise LocalGradError(
                f"{type(model).__name__}, cut into units, would train other parameters than it did "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): its forward pass has torch.no_grad() "
                "outside of a torch.nn layer, which tracing cannot see; give these parameters requires_grad_(False) "
                "instead"
            )
    return writes


def two_samples(batch: Tensor) -> Tensor:
    """The first two samples of a batch, or its only one twice: batch norm needs more than one value."""
    return torch.cat([batch[:2], batch[:1]])[:2]


def _reached(output: Any) -> set[int]:
    """Ids of the parameters that an output would send a gradient to."""
    output = output[0] if isinstance(output, tuple | list) else output
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [output.grad_fn] if isinstance(output, Tensor) and output.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a node that accumulates a parameter's gradient
        found |= set() if variable is None else {id(variable)}
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Every generator that a forward pass may draw from, seeded with 0; all of them come back as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    on_cpu = device.type in ("cpu", "meta")
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None  # which fork_rng cannot keep
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        try:
            (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(0)  # that of other devices too
            random.seed(0)
            np.random.seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Where the generators stand."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    _, keys, position, *_ = np.random.get_state()
    return (*(state.tolist() for state in states), random.getstate(), keys.tolist(), position)  # pyright: ignore


def _same(first: Tensor, second: Tensor) -> bool:
    close = 0.0 if first.device.type == "cpu" else 1e-3  # other devices may add in another order
    return first.shape == second.shape and torch.allclose(first, second, rtol=close, atol=close, equal_nan=True)


class TwoModes(nn.Module):
    """One unit whose graph depends on the training flag."""

    def __init__(self, training: nn.Module, evaluating: nn.Module) -> None:
        super().__init__()
        self.when_training, self.when_evaluating = training, evaluating

    def forward(self, features: Tensor) -> Tensor:
        return self.when_training(features) if self.training else self.when_evaluating(features)


def _one_module(model: nn.Module, evaluating: fx.Graph, training: fx.Graph) -> nn.Module:
    name = type(model).__name__
    if str(evaluating) != str(training):
        return TwoModes(fx.GraphModule(model, training, name), fx.GraphModule(model, evaluating, name))
    calls = _calls(evaluating)
    if len(calls) == 1 and calls[0].op == "call_module" and len(calls[0].args) == 1 and not calls[0].kwargs:
        return model.get_submodule(cast(str, calls[0].target))
    return fx.GraphModule(model, evaluating, name)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def _segments(model: nn.Module, graph: fx.Graph, shapes: _Shapes) -> list[tuple[str, fx.Graph]]:
    """Cut a graph into named pieces."""
    calls = _calls(graph)
    weighted = [i for i, node in enumerate(calls) if _has_weight(model, node)]
    starts = _starts(model, graph, calls, weighted, [shapes.shapes.get(node) for node in calls])
    pieces = []
    value = next(node for node in graph.nodes if node.op == "placeholder" and node.users)
    for start, stop in zip(starts, [*starts[1:], len(calls)], strict=True):
        piece = fx.Graph()
        copies = {value: piece.placeholder("features")}
        for node in calls[start:stop]:
            for attribute in node.all_input_nodes:
                if attribute.op == "get_attr" and attribute not in copies:
                    copies[attribute] = piece.node_copy(attribute)
            copies[node] = piece.node_copy(node, lambda needed, copies=copies: copies[needed])
        value = _alive(graph, calls, stop)[0]
        piece.output(copies[value])
        pieces.append((_name(calls, weighted, start, stop), piece))
    return pieces


def _alive(graph: fx.Graph, calls: list[fx.Node], position: int) -> list[fx.Node]:
    """The values computed before `calls[position]` that are used from there on."""
    before = {node for node in graph.nodes if node.op == "placeholder"} | set(calls[:position])
    after = {*calls[position:], *(node for node in graph.nodes if node.op == "output")}
    return [node for node in graph.nodes if node in before and any(user in after for user in node.users)]


def _starts(
    model: nn.Module, graph: fx.Graph, calls: list[fx.Node], weighted: list[int], sizes: list[torch.Size | None]
) -> list[int]:
    """Positions in `calls` at which a unit starts."""
    inputs = {node for node in graph.nodes if node.op == "placeholder"}
    place = {node: position for position, node in enumerate(calls)}  # an output is used after all calls
    last_use = [max((place.get(user, len(calls)) for user in node.users), default=-1) for node in calls]
    input_use = max((place.get(user, -1) for node in inputs for user in node.users), default=-1)
    legal = [
        position > input_use and len(alive) == 1 and sizes[alive[0]] is not None  # a tuple is no features
        for position in range(len(calls))
        for alive in [[i for i in range(position) if last_use[i] >= position]]
    ]
    starts = [0]
    for previous, following in pairwise(weighted):
        choices = [position for position in range(previous + 1, following + 1) if legal[position]]
        if not choices:
            continue
        if _is_block(model.get_submodule(cast(str, calls[previous].target))):
            starts.append(choices[0])
            continue
        reduced = _first_reduction(sizes, previous, following)
        starts.append(max((p for p in choices if p <= reduced), default=choices[-1]))
    return starts


def _has_weight(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return any(parameter.ndim >= 2 for parameter in model.get_submodule(cast(str, node.target)).parameters())


def _first_reduction(sizes: list[torch.Size | None], previous: int, following: int) -> int:
    """Position of the first call between two weights that gives up the spatial dimensions: a head starts there."""
    before = sizes[previous]
    for position in range(previous + 1, following):
        size = sizes[position]
        if size is None or before is None:
            continue
        collapsed = len(size) == len(before) and len(size) in (3, 4, 5) and size[2:].numel() == 1 < before[2:].numel()
        if len(size) < len(before) and len(before) in (4, 5) and len(size) == 2:
            return position
        if collapsed or (len(before) == 3 and len(size) == 2):
            return position
        before = size
    return following


def _name(calls: list[fx.Node], weighted: list[int], start: int, stop: int) -> str:
    """The deepest submodule that holds all weights of the unit and nothing else, or else the first with a weight."""
    inside = [cast(str, calls[i].target) for i in weighted if start <= i < stop]
    if not inside:
        return next((str(node.target) for node in calls[start:stop] if node.op == "call_module"), calls[start].name)
    others = [cast(str, calls[i].target) for i in weighted if not start <= i < stop]
    common = inside[0].split(".")
    for name in inside[1:]:
        parts = name.split(".")
        common = [a for i, a in enumerate(common) if parts[: i + 1] == common[: i + 1]]
    prefix = ".".join(common)
    if not prefix or any(name == prefix or name.startswith(f"{prefix}.") for name in others):
        return inside[0]
    return prefix
