"""Tracing: a model's forward pass as a graph of `torch.fx`, and the values that the graph keeps as constants."""

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from localgrad.core.modules import named_children, named_modules
from localgrad.core.restore import restored
from localgrad.core.tables import has_hooks, hooks_after, hooks_before
from localgrad.errors import DefaultsWarning, LocalGradError, LocalGradWarning, NotTraceableError, warn

CHAIN = (nn.Sequential, nn.ModuleList)
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, object)
_OWN = {*vars(nn.Module), *vars(nn.Module())}
NAME_THEM = (
    'name the submodules that make it up, in order: units(model, example, names=["stem", "blocks.0", ..., "head"]), '
    "or use localgrad.isolate, which cuts the model's own forward pass"
)

Read = tuple[Any, str, Any]
"""An attribute that a forward pass read: the object that has it, its name, its value."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced forward pass in one mode, training or evaluation.

    Attributes:
        nodes: the graph of `torch.fx`, with one input and one output.
        constants: tensors that the forward pass creates itself, by their target in the graph.
    """

    nodes: fx.Graph
    constants: dict[str, Tensor]

    def same(self, other: "Graph") -> bool:
        """Whether both graphs have the same nodes and constants."""
        return str(self.nodes) == str(other.nodes) and all(
            mine.is_meta or torch.equal(mine, other.constants[name]) for name, mine in self.constants.items()
        )


@dataclass(frozen=True, eq=False)
class Traced:
    """A model's traced forward pass in both modes.

    Attributes:
        training: the graph in training mode.
        evaluating: the graph in evaluation mode.
        whole: the reason why a module that is no layer was not traced into, by the module's name.
        through: modules that were traced into, by name; the model itself is "".
        reads: plain attributes (numbers, flags, strings) that the forward passes read, by dotted name.
    """

    training: Graph
    evaluating: Graph
    whole: dict[str, str]
    through: dict[str, nn.Module]
    reads: dict[str, Read]


@dataclass(eq=False)
class Frozen:
    """The constants of a trace, and the modules that blocks do not call, to notice later changes of the model.

    Copies and pickles of it are empty, because copied blocks belong to no model.
    """

    model: nn.Module | None = None
    traced: Traced | None = None
    uncalled: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    def check(self) -> None:
        """Refuse to train if the model has changed in a way that its blocks cannot follow.

        Raises:
            LocalGradError: a plain attribute that the forward pass depends on has another value than when the model
                was split, or a forward hook was registered on a module that the blocks do not call.
        """
        for name, module in self.uncalled.items():
            if hooks_before(module) or hooks_after(module):
                raise LocalGradError(
                    f"a forward hook was registered on {name or 'the model itself'} after the model was split, and the "
                    "blocks do not run it: remove it, register it on a unit (localgrad.units lists them), or use "
                    "localgrad.isolate, which runs the model's own forward pass"
                )
        if self.traced is None or self.model is None:
            return
        changed = [name for name, (of, key, value) in self.traced.reads.items() if getattr(of, key, None) != value]
        if not changed:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LocalGradWarning)  # trace() warned when the model was split
            again = trace(self.model)
        if again.training.same(self.traced.training) and again.evaluating.same(self.traced.evaluating):
            self.traced = again  # the attribute changed, and the graphs did not
            return
        of, key, value = self.traced.reads[changed[0]]
        raise LocalGradError(
            f"{changed[0]} was {value!r} when the model was split and is {getattr(of, key, None)!r} now, but the "
            "blocks go on with the first value: split again after a change, keep the number in a buffer or a torch.nn "
            "layer, or use localgrad.isolate, which runs the model's own forward pass"
        )

    def __reduce__(self) -> tuple[type["Frozen"], tuple[()]]:
        return Frozen, ()


def trace(model: nn.Module) -> Traced:
    """Trace a model's forward pass in both modes, and restore the model.

    Modules that have hooks, assign their own attributes in their forward pass or cannot be traced are not traced into.

    Raises:
        LocalGradError: the model cannot be traced, has hooks itself, or does not take and return one tensor.
    """
    refuse_hooks(model, type(model).__name__)
    whole = {name: "it has hooks" for name, module in named_modules(model) if has_hooks(module)}
    with restored(model) as put_back:
        while True:
            known, through, reads = len(whole), {"": model}, dict[str, Read]()
            training = _trace(model, True, whole, through, reads, put_back)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LocalGradWarning)  # the trace in training mode has warned
                evaluating = _trace(model, False, whole, through, reads, put_back)
            if len(whole) == known:
                return Traced(training, evaluating, whole, through, reads)


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Refuse hooks on a module that blocks do not call."""
    if has_hooks(module):
        raise NotTraceableError(
            f"{name} itself has hooks, which blocks would not run: register them on a submodule, remove them, or use "
            "localgrad.isolate, which runs the model's own forward pass"
        )


class _Tracer(fx.Tracer):
    """A tracer that does not trace into `leaves`, and records where tracing failed and which modules it traced into."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: tuple[str, Exception] | None = None
        self.through: dict[str, nn.Module] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if name not in self.leaves:
            self.through[name] = m
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.failed = self.failed or (name, error)
            raise


def _trace(
    model: nn.Module,
    training: bool,
    whole: dict[str, str],
    through: dict[str, nn.Module],
    reads: dict[str, Read],
    put_back: Callable[[], None],
) -> Graph:
    """Trace one mode. It adds modules that fail to `whole`, modules traced into to `through`, attributes to `reads`."""
    layers = _layers(model)
    defaults = _defaults(model)
    while True:
        put_back()
        model.train(training)
        tracer = _Tracer(layers | whole.keys())
        before = {module: dict(vars(module)) for module in model.modules()}
        try:
            with warnings.catch_warnings(), _noted(model, reads):
                warnings.simplefilter("ignore")  # shape checks of the model warn about the tracer's proxies
                nodes = tracer.trace(model, concrete_args=defaults)
        except Exception as error:
            if tracer.failed and tracer.failed[0] not in whole:
                whole[tracer.failed[0]] = f"it cannot be traced ({first_line(tracer.failed[1])})"
                continue
            raise NotTraceableError(
                f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {first_line(error)}); "
                + NAME_THEM
            ) from error
        assigned = {name: _assigned(module, before[module]) for name, module in tracer.through.items()}
        if any(assigned.values()):
            whole |= {name: f"it assigns self.{keys[0]}" for name, keys in assigned.items() if keys}
            continue
        _say_what_is_left_out(model, defaults, _assigned(model, before[model]))
        through |= tracer.through
        nodes = _single_output(nodes, model)
        targets = [cast(str, node.target) for node in nodes.nodes if node.op == "get_attr"]
        return Graph(nodes, {name: value for name in targets if isinstance(value := vars(model).get(name), Tensor)})


def _say_what_is_left_out(model: nn.Module, defaults: dict[str, Any], assigned: list[str]) -> None:
    name = type(model).__name__
    if defaults:
        given = ", ".join(f"{key}={value!r}" for key, value in defaults.items())
        warn(
            f"{name} is cut with the optional arguments of its forward pass at their defaults ({given}): blocks take "
            "no others; a model that needs them goes to localgrad.isolate",
            DefaultsWarning,
        )
    for key in assigned:
        warn(
            f"{name} assigns self.{key} in its forward pass, which blocks do not do: do it in a submodule, or use "
            "localgrad.isolate, which runs the model's own forward pass"
        )


def _assigned(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Names of the attributes that a forward pass has assigned to a module."""
    missing = object()
    return [
        key
        for key, value in vars(module).items()
        if value is not before.get(key, missing) and key not in _OWN and not is_constant(key)
    ]


def is_constant(name: str) -> bool:
    """Whether an attribute is a tensor that the forward pass creates; `torch.fx` gave it this name."""
    return name.rpartition(".")[2].startswith("_tensor_constant")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def _noted(model: nn.Module, reads: dict[str, Read]) -> Generator[None, None, None]:
    """Context: record reads of plain attributes of the model's modules, and of objects in them, such as a config."""
    names = {id(module): name for name, module in named_modules(model)}

    def note(module: nn.Module, attribute: str) -> Any:
        value = object.__getattribute__(module, attribute)
        name = names.get(id(module))
        if name is None or attribute in _OWN or attribute.startswith("__"):
            return value
        path = f"{name}.{attribute}" if name else f"{type(module).__name__}.{attribute}"
        if _is_plain(value):
            reads.setdefault(path, (module, attribute, copy.copy(value)))
        elif _is_record(value):
            for key, item in cast(dict[str, Any], vars(value)).items():
                if _is_plain(item):
                    reads.setdefault(f"{path}.{key}", (value, key, copy.copy(item)))
        return value

    nn.Module.__getattribute__ = note  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, cast(list[Any], value)))
    return isinstance(value, bool | int | float | complex | str | None)


def _is_record(value: Any) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor | ModuleType)


def is_block(module: nn.Module) -> bool:
    """Whether a module has children with parameters, and is no `nn.Sequential` or `nn.ModuleList`."""
    return not isinstance(module, CHAIN) and any(True for child in module.children() for _ in child.parameters())


def is_stage(module: nn.Module) -> bool:
    """Whether a module is or holds a chain of blocks of one class, as the stages of RegNet and of timm are."""
    return any(
        isinstance(chain, CHAIN)
        and len(chain) > 0
        and len({type(block) for block in chain}) == 1
        and all(is_block(block) for block in chain)
        for chain in (module, *module.children())
    )


def _layers(model: nn.Module) -> set[str]:
    """Names of the modules that are not traced into.

    These are the layers of torch.nn and classes derived from them (timm's norm + activation layers read
    `self.training`, which tracing would turn into a constant), and the children of `nn.Sequential` and `nn.ModuleList`.
    """
    layers = set[str]()
    for name, module in named_modules(model):
        for child_name, child in named_children(module):
            path = f"{name}.{child_name}" if name else child_name
            plain_chain = type(child) in (*CHAIN, nn.ModuleDict)
            is_layer = any(c.__module__.startswith("torch.nn") for c in type(child).__mro__ if c not in _CONTAINERS)
            if not plain_chain and (is_layer or (isinstance(module, CHAIN) and not is_stage(child))):
                layers.add(path)
    return layers


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of the forward pass with their default values."""
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def has_effect(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node must be kept even if its result is unused, because it writes in place."""
    if node.op in ("placeholder", "output") or node.target is operator.setitem:
        return True
    in_place = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        in_place = getattr(model.get_submodule(cast(str, node.target)), "inplace", False) is True
    if in_place:  # it is kept only if the changed tensor is read later
        return any(user > node for source in node.all_input_nodes for user in source.users)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")


def _single_output(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Keep the first of several outputs (a main head before auxiliary ones); drop nodes that only the others need."""
    output = next(node for node in graph.nodes if node.op == "output")
    value = output.args[0]
    if isinstance(value, fx.Node) and isinstance(value.target, type) and issubclass(value.target, tuple):
        value = tuple(value.args)  # a named tuple is traced as a call of its class
    if isinstance(value, tuple | list) and value and isinstance(value[0], fx.Node):
        count = len(cast(Any, value))
        warn(
            f"{type(model).__name__} returns {count} values while training: the first is trained, auxiliary "
            "outputs are left out"
        )
        output.args = (value[0],)
    elif not isinstance(value, fx.Node):
        kind = type(cast(Any, value)).__name__.removeprefix("immutable_")
        raise NotTraceableError(
            f"{type(model).__name__} returns a {kind}: it must return one tensor, or a tuple that "
            "starts with it; wrap the model so that it does, or use localgrad.isolate"
        )
    graph.eliminate_dead_code(partial(has_effect, model=model))
    if len([node for node in graph.nodes if node.op == "placeholder" and node.users]) != 1:
        raise NotTraceableError(
            f"{type(model).__name__}.forward uses more than one argument: it must take one tensor; wrap the model, or "
            "use localgrad.isolate"
        )
    return graph
