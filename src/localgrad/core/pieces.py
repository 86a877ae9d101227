"""Cut a traced forward pass into pieces where exactly one tensor is alive. Pieces hold the model's own modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from localgrad.core.tracing import NAME_THEM, Graph, Traced, first_line, has_effect, is_block, is_constant
from localgrad.errors import LocalGradError


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a forward pass that takes one tensor to one tensor.

    Attributes:
        name: name of the submodule that has all of the piece's weights and no others, else of the first with a weight.
        module: the model's own submodule, or a module that calls several of them.
        whole: why the piece is not cut further, in words; empty if it is one layer or one block.
    """

    name: str
    module: nn.Module
    whole: str = ""


class TwoModes(nn.Module):
    """A unit with one module for training and another for evaluation, where `self.training` changes the graph."""

    def __init__(self, training: nn.Module, evaluating: nn.Module) -> None:
        super().__init__()
        self.when_training, self.when_evaluating = training, evaluating

    def forward(self, features: Tensor) -> Tensor:
        return self.when_training(features) if self.training else self.when_evaluating(features)


def pieces_of(model: nn.Module, traced: Traced, samples: Tensor) -> list[Piece]:
    """Pieces of a traced model, in order. One after another they compute what the trace computes.

    Both modes are cut at the same places. Values that the forward pass computes from sizes and constants alone (a table
    of rotary embeddings, the size to interpolate to) are computed again in each piece that needs them.

    Args:
        model: the model that was traced. It runs in both modes, and the caller restores it.
        traced: its graphs.
        samples: two samples that the model runs on. A run on three samples shows which sizes depend on the batch size.

    Raises:
        LocalGradError: training and evaluation run different modules, or a graph does not run on the samples.
    """
    vars(model).update(traced.evaluating.constants)
    evaluating = training = _Chain(model.eval(), traced.evaluating, samples)
    if not traced.training.same(traced.evaluating):
        vars(model).update(traced.training.constants)
        training = _Chain(model.train(), traced.training, samples)
    places = evaluating.places.keys() & training.places.keys()
    runs, twins = evaluating.runs(places), training.runs(places)
    names = [evaluating.name(*run) for run in runs]
    if names != [training.name(*run) for run in twins]:
        raise LocalGradError(
            f"{type(model).__name__} runs different modules in training and in evaluation; name the submodules "
            "that make it up: units(model, example, names=[...]), or use localgrad.isolate"
        )
    modules = evaluating.modules(runs)
    others = modules if training is evaluating else training.modules(twins)
    return [
        Piece(name, _both(module, other), evaluating.why_whole(*run, traced.whole))
        for name, run, module, other in zip(names, runs, modules, others, strict=True)
    ]


def _both(evaluating: nn.Module | fx.GraphModule, training: nn.Module | fx.GraphModule) -> nn.Module:
    if not isinstance(evaluating, fx.GraphModule) or not isinstance(training, fx.GraphModule):
        return evaluating if evaluating is training else TwoModes(training, evaluating)
    return evaluating if _graph_of(evaluating).same(_graph_of(training)) else TwoModes(training, evaluating)


def _graph_of(module: fx.GraphModule) -> Graph:
    return Graph(module.graph, {name: value for name, value in module.named_buffers() if is_constant(name)})


@dataclass(frozen=True)
class _Shape:
    """Shape of a tensor of the forward pass, and whether it is a floating-point tensor."""

    size: torch.Size
    floating: bool


class _Values(fx.Interpreter):
    """Run a graph and record the value of each node: the shape of a tensor; numbers, sizes, dtypes and devices."""

    def __init__(self, model: nn.Module, graph: fx.Graph, samples: Tensor) -> None:
        super().__init__(model, graph=graph)
        self.found: dict[fx.Node, Any] = {}
        self.draws: set[fx.Node] = set()
        self.state = torch.cuda.get_rng_state if samples.is_cuda else torch.get_rng_state
        self.run(samples)

    def run_node(self, n: fx.Node) -> Any:
        before = self.state()
        value = super().run_node(n)
        if not torch.equal(before, self.state()):
            self.draws.add(n)
        if isinstance(value, Tensor):
            self.found[n] = _Shape(value.shape, value.is_floating_point())
        elif _follows_batch_size(value, value):
            self.found[n] = value
        return value


def _values(model: nn.Module, graph: Graph, samples: Tensor) -> _Values:
    try:
        return _Values(model, graph.nodes, samples)
    except Exception as error:
        raise LocalGradError(
            f"{type(model).__name__} runs, but what tracing found in it does not run on {len(samples)} samples "
            f"({first_line(error)}); {NAME_THEM}"
        ) from error


class _Chain:
    """A graph in one mode as a chain of calls, with the places where it may be cut.

    Attributes:
        sizes_count: whether a piece uses a size of the inputs as a constant; then all inputs must have this size.
        calls: the calls, in order, without those whose results are computed from sizes and constants alone.
        alive: for each position in `calls` and for the end, the results of earlier calls that later calls use.
        places: positions at which a piece may start. Their keys are the same in both modes: the number of calls with
            weights before the position, and the shape of the one tensor that is alive there.
    """

    def __init__(self, model: nn.Module, graph: Graph, samples: Tensor) -> None:
        self.model, self.graph = model, graph
        self.two = _values(model, graph, samples)
        self.three = _values(model, graph, torch.cat([samples, samples[:1]]))
        self.sizes_count = False
        self.input = next(node for node in graph.nodes.nodes if node.op == "placeholder" and node.users)
        self.again = self._made_again()
        nodes = list(graph.nodes.nodes)
        skipped = {*self.again, *(node for node in nodes if node.op in ("placeholder", "get_attr"))}
        *self.calls, output = [node for node in nodes if node not in skipped]
        self.alive = self._alive(output)
        self.weighted = [position for position, node in enumerate(self.calls) if self._has_weight(node)]
        self.places = self._places()

    def _made_again(self) -> set[fx.Node]:
        """The nodes that each piece can compute itself: sizes, numbers, and results of these and of constants."""
        effects = {node for node in self.graph.nodes.nodes if has_effect(node, self.model)}
        written = {used for node in effects for used in node.all_input_nodes}
        again = set[fx.Node]()
        for node in self.graph.nodes.nodes:
            if node.op == "get_attr" or node in effects or node in written or node in self.two.draws:
                continue
            made_of_constants = all(used in again or self._is_constant(used) for used in node.all_input_nodes)
            trains = node.op == "call_module" and self._trains(node)
            if self.follows_batch_size(node) or (made_of_constants and not trains):
                again.add(node)
        return again

    def follows_batch_size(self, node: fx.Node) -> bool:
        return node in self.two.found and _follows_batch_size(self.two.found[node], self.three.found.get(node))

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op != "get_attr":
            return False
        value = _attribute(self.model, cast(str, node.target))
        return not (isinstance(value, nn.Parameter) and value.requires_grad)

    def _trains(self, node: fx.Node) -> bool:
        return any(parameter.requires_grad for parameter in self._called(node).parameters())

    def _called(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(cast(str, node.target))

    def _has_weight(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(parameter.ndim >= 2 for parameter in self._called(node).parameters())

    def _alive(self, output: fx.Node) -> list[list[fx.Node]]:
        place = {node: position for position, node in enumerate([*self.calls, output])}
        last_use = {
            node: max((place[user] for user in node.users if user in place), default=-1)
            for node in (self.input, *self.calls)
        }
        alive = [[self.input]]
        for position, node in enumerate(self.calls, start=1):
            alive.append([value for value in (*alive[-1], node) if last_use[value] >= position])
        return alive

    def _fault(self, position: int) -> str:
        """Why no piece may start here; empty if it may."""
        alive = self.alive[position]
        if len(alive) != 1 or alive[0] is self.input:
            return f"{', '.join(map(self._value_name, alive))} are read again later"
        value, other = self.two.found.get(alive[0]), self.three.found.get(alive[0])
        name = self._value_name(alive[0])
        if not isinstance(value, _Shape) or not value.floating or len(value.size) < 2 or not isinstance(other, _Shape):
            return f"{name} is no floating-point tensor of two dimensions or more"
        if (value.size[0], other.size[0]) != (2, 3) or value.size[1:] != other.size[1:]:
            return f"{name} has not one entry a sample along its first dimension"
        return ""

    def _value_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"the input {node.name}"
        return cast(str, node.target) if node.op == "call_module" else node.name

    def _places(self) -> dict[tuple[int, torch.Size], int]:
        places: dict[tuple[int, torch.Size], int] = {}
        for number, (previous, following) in enumerate(pairwise(self.weighted), start=1):
            choices = [position for position in range(previous + 1, following + 1) if not self._fault(position)]
            if not choices:
                continue
            chosen = choices[0]
            if not is_block(self._called(self.calls[previous])):
                sizes = [self._size_at(position) for position in choices]
                before = self.two.found.get(self.calls[previous])
                chosen = choices[_before_reduction(before.size if isinstance(before, _Shape) else None, sizes)]
            places[number, self._size_at(chosen)] = chosen
        return places

    def _size_at(self, position: int) -> torch.Size:
        return self.two.found[self.alive[position][0]].size

    def runs(self, places: set[tuple[int, torch.Size]]) -> list[tuple[int, int]]:
        """Start and stop positions of the pieces that begin at these places."""
        return list(pairwise([0, *sorted(self.places[place] for place in places), len(self.calls)]))

    def modules(self, runs: Sequence[tuple[int, int]]) -> list[nn.Module]:
        """One module for each run of calls, start included and stop not; a single call gives the model's own module."""
        later = [self._module(*run) for run in runs[1:]]
        return [self._module(*runs[0]), *later]  # the first is built last: it checks the size if a later one uses it

    def _module(self, start: int, stop: int) -> nn.Module:
        calls = self.calls[start:stop]
        (value,) = self.alive[start] if start else [self.input]
        (result,) = self.alive[stop]
        single = len(calls) == 1 and calls[0].op == "call_module" and calls[0].args == (value,) and not calls[0].kwargs
        if single and not (start == 0 and self.sizes_count):
            return self._called(calls[0])
        graph = _PieceGraph(self, value)
        if start == 0 and self.sizes_count:
            graph.nodes.call_function(check_size, (graph.features, tuple(self.two.found[self.input].size[1:])))
        for node in calls:
            graph.copy(node)
        graph.nodes.output(graph.copies[result])
        targets = {cast(str, node.target) for node in graph.nodes.nodes if node.op in ("get_attr", "call_module")}
        owned = {target: self.graph.constants.get(target, _attribute(self.model, target)) for target in targets}
        return fx.GraphModule(owned, graph.nodes, type(self.model).__name__)

    def name(self, start: int, stop: int) -> str:
        """The deepest submodule with all weights of the piece and no others, or else the first with a weight."""
        calls = self.calls
        inside = [cast(str, calls[i].target) for i in self.weighted if start <= i < stop]
        if not inside:
            return next((str(node.target) for node in calls[start:stop] if node.op == "call_module"), calls[start].name)
        others = [cast(str, calls[i].target) for i in self.weighted if not start <= i < stop]
        common = inside[0].split(".")
        for name in inside[1:]:
            parts = name.split(".")
            common = [a for i, a in enumerate(common) if parts[: i + 1] == common[: i + 1]]
        prefix = ".".join(common)
        if not prefix or any(name == prefix or name.startswith(f"{prefix}.") for name in others):
            return inside[0]
        return prefix

    def why_whole(self, start: int, stop: int, whole: dict[str, str]) -> str:
        """Why this piece is not cut further: the values alive between its weights, or a module that was not traced."""
        reasons = [f"{node.target}: {whole[node.target]}" for node in self.calls[start:stop] if node.target in whole]
        inside = [position for position in self.weighted if start <= position < stop]
        for previous, following in pairwise(inside):
            fewest = min(range(previous + 1, following + 1), key=lambda position: len(self.alive[position]))
            fault = self._fault(fewest) or "training and evaluation differ"
            reasons.append(f"between {self.calls[previous].target} and {self.calls[following].target} {fault}")
        return "; ".join(reasons)


class _PieceGraph:
    """The graph of one piece, filled with copies of nodes of the model's graph."""

    def __init__(self, chain: _Chain, value: fx.Node) -> None:
        self.chain = chain
        self.nodes = fx.Graph()
        self.features = self.nodes.placeholder("features")
        self.copies: dict[fx.Node, fx.Node] = {value: self.features}

    def copy(self, node: fx.Node) -> None:
        """Copy a node into this graph, after the nodes that it uses."""
        if node in self.copies:
            return
        chain = self.chain
        if chain.follows_batch_size(node) and not self._is_here(node):
            self.copies[node] = self._from_batch(chain.two.found[node], chain.three.found[node])
            return
        for used in node.all_input_nodes:
            self.copy(used)
        self.copies[node] = self.nodes.node_copy(node, self.copies.__getitem__)

    def _is_here(self, node: fx.Node) -> bool:
        if node in self.copies or node.op == "get_attr":
            return True
        return node in self.chain.again and all(map(self._is_here, node.all_input_nodes))

    def _from_batch(self, value: Any, other: Any) -> Any:
        """Express a value as a constant or a multiple of the batch size; `other` is its value with three samples."""
        if isinstance(value, torch.device):
            return self.nodes.call_function(getattr, (self.features, "device"))
        if isinstance(value, tuple | list):
            entries = [self._from_batch(*pair) for pair in zip(cast(Any, value), other, strict=True)]
            kind = torch.Size if isinstance(value, torch.Size) else cast(type[Any], type(cast(Any, value)))
            return self.nodes.call_function(kind, (entries,))
        if type(value) is int and value != other:
            samples = self.nodes.call_method("size", (self.features, 0))
            return self.nodes.call_function(mul, (samples, value // 2))
        self.chain.sizes_count |= type(value) is int
        return value


def check_size(features: Tensor, size: tuple[int, ...]) -> None:
    """Refuse inputs of another size than that of the example, because a later piece uses this size as a constant.

    Raises:
        LocalGradError: the size differs.
    """
    if features.shape[1:] != size:
        raise LocalGradError(
            f"inputs are {tuple(features.shape)}, and the model was split for {(len(features), *size)}: its forward "
            "pass uses this size after a cut; split again for the other size, or use localgrad.isolate"
        )


def _follows_batch_size(value: Any, other: Any) -> bool:
    """Whether a value is a constant or a multiple of the batch size, from a run on two samples and one on three."""
    if isinstance(value, tuple | list):
        entries = cast(Sequence[Any], value)
        return (
            type(entries) is type(other)
            and len(entries) == len(other)
            and all(_follows_batch_size(*pair) for pair in zip(entries, other, strict=False))
        )
    if type(value) is int:
        return value == other or 3 * value == 2 * other
    return isinstance(value, bool | float | str | None | torch.dtype | torch.device | torch.layout) and value == other


def _before_reduction(before: torch.Size | None, sizes: Sequence[torch.Size]) -> int:
    """Index of the last size before the spatial dimensions are reduced to one position, where a head starts."""
    for index, size in enumerate(sizes):
        if before is not None and index and _is_reduced(before, size):
            return index - 1
        before = size
    return len(sizes) - 1


def _is_reduced(before: torch.Size, size: torch.Size) -> bool:
    if len(size) == 2 < len(before):
        return True
    return len(size) == len(before) > 2 and size[2:].numel() == 1 < before[2:].numel()


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value
