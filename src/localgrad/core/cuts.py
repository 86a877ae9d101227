"""Where an isolated model is cut: after named modules, or evenly along a chain of modules of one class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from localgrad.core.observed import Call, ForwardPass, is_container, places_to_cut
from localgrad.core.partition import cut_evenly
from localgrad.core.tables import hooks_before
from localgrad.core.wrapped import compiled_from
from localgrad.errors import LocalGradError

WRAPPERS: tuple[type[nn.Module], ...] = (DistributedDataParallel, DataParallel)


def check_cuts(model: Any, cuts: Any, num_blocks: Any, objective: Any, momentum: Any) -> list[str] | int:
    """Check the arguments of `isolate`; return the names of the cuts, each once, or the number of blocks.

    Raises:
        LocalGradError: an argument has a wrong type or value, not exactly one of `cuts` and `num_blocks` is given, a
            cut is no module of the model, or the model is wrapped or isolated already.
    """
    if isinstance(model, WRAPPERS) or compiled_from(model) is not None:
        raise LocalGradError(
            f"model is wrapped in {type(model).__name__}: isolate the model itself, then wrap it (DataParallel cannot "
            "be isolated, and instead of the whole model its layers are compiled, layer.compile())"
        )
    if not isinstance(model, nn.Module) or not any(True for _ in model.children()):
        raise LocalGradError(f"model is a {type(model).__name__}: give a network that consists of modules")
    isolated = [module for module in model.modules() if _is_isolated(module)]
    if isolated:
        which = "model" if isolated[0] is model else f"the {type(isolated[0]).__name__} inside the model"
        raise LocalGradError(f"{which} is isolated already: call remove() of its isolation first")
    if (cuts is None) == (num_blocks is None):
        raise LocalGradError(
            f'cuts is {cuts!r} and num_blocks is {num_blocks!r}: give one of them, as cuts=["layer1", "layer2"] or '
            "num_blocks=4"
        )
    for name, given, example in (
        ("objective", objective, "classifier(num_classes=10)"),
        ("momentum", momentum, "man()"),
    ):
        if given is not None and (not callable(given) or isinstance(given, nn.Module)):
            raise LocalGradError(f"{name} is {given!r}: it must be a factory, such as localgrad.{example}, or None")
    if objective is None and cuts != [] and num_blocks != 1:
        raise LocalGradError(
            "objective is None: every block but the last needs a local objective, as localgrad.classifier(10)"
        )
    if cuts is None:
        if type(num_blocks) is not int or num_blocks < 1:
            raise LocalGradError(f"num_blocks is {num_blocks!r}: it is a whole number, 1 or more")
        return num_blocks
    if not isinstance(cuts, list | tuple) or not all(isinstance(each, str) for each in cast(list[Any], cuts)):
        raise LocalGradError(f'cuts is {cuts!r}: give a list of names of modules, as ["layer1"]')
    names = cast(list[str], cuts)
    modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for name in names:
        if not name or name not in modules:
            parent = name
            while parent and parent not in modules:
                parent = parent.rpartition(".")[0]
            inside = [f"{parent}.{child}".strip(".") for child, _ in modules[parent].named_children()]
            raise LocalGradError(
                f"cut {name!r} is no module of {type(model).__name__}: in {parent or 'it'} are {', '.join(inside[:12])}"
            )
    return list(dict.fromkeys(names))


def _is_isolated(module: nn.Module) -> bool:
    owners = (getattr(hook, "__self__", None) for hook in hooks_before(module).values())
    return any(isinstance(owner, nn.Module) and hasattr(owner, "momenta") for owner in owners)


def named_cuts(model: nn.Module, run: ForwardPass, names: Sequence[str]) -> list[Call]:
    """The calls of the modules that are named as cuts, in order of their end.

    Raises:
        LocalGradError: a module is not called exactly once, returns no features, returns its input, or is called inside
            the model's own activation checkpointing.
    """
    found: list[Call] = []
    for name in names:
        calls = [call for call in run.calls if call.module is model.get_submodule(name)]
        if len(calls) != 1:
            how = f"{len(calls)} times in a forward pass" if calls else "never in the example's forward pass"
            inner = [call.name for call in run.calls if call.name.startswith(f"{name}.")]
            nearest = f"; called inside it: {', '.join(inner[:3])}" if inner else ""
            raise LocalGradError(
                f"cut {name!r} is called {how}: cut at a module that is called once in every forward pass{nearest}"
            )
        call = calls[0]
        if call.features is None:
            raise LocalGradError(
                f"cut {name!r} returns no floating-point tensor (nor a tuple, list or dict with one): cut at a module "
                "that returns features"
            )
        if call.source is not None and call.source in call.arguments:
            raise LocalGradError(
                f"cut {name!r} returns what it is given, which other modules may read as well: cut at the module before"
            )
        if call.checkpointed:
            raise LocalGradError(
                f"cut {name!r} is called inside the model's own activation checkpointing, which would run the cut "
                "again: switch that off, and give isolate(..., recompute=True), which checkpoints between the cuts"
            )
        found.append(call)
    return sorted(found, key=lambda call: call.end)


def even_cuts(run: ForwardPass, num_blocks: int) -> list[Call]:
    """K - 1 cuts that divide the longest chain of modules of one class evenly.

    A model can be cut after a module if everything later is computed from that module's output. Modules of one class
    after which the model can be cut form a chain. The longest chain of composite modules (residual units, transformer
    layers) that has at least half of all calls of its class is taken, if it has K members or more. Otherwise the
    longest chain of any class is taken, or at last the chain of all innermost modules with weight matrices. Of equally
    long chains the outer one is taken. Modules without weight matrices (norms, activations, pooling) stay with the
    block before them.

    Raises:
        LocalGradError: no chain has K members.
    """
    places = [call for call in places_to_cut(run) if not call.checkpointed]
    members = [call for call in places if _has_weights(call.module) and not is_container(call.module)]
    single = [call for call in members if not any(call.holds(other) for other in members)]
    chains: dict[type, list[Call]] = {}
    for call in members:
        chains.setdefault(type(call.module), []).append(call)
    of_class = Counter(type(call.module) for call in run.calls)
    of_layers = [
        _outermost(chain)
        for kind, chain in chains.items()
        if 2 * len(chain) >= of_class[kind] and any(True for _ in chain[0].module.children())
    ]
    for group in (of_layers, list(chains.values()), [single]):
        chain = max(group, key=_length, default=list[Call]())
        if len(chain) >= num_blocks:
            break
    else:
        raise LocalGradError(
            f"num_blocks is {num_blocks}: the forward pass has {len(single)} modules with weights after which one "
            f"tensor alone goes on, so it makes 1 to {max(len(single), 1)} blocks; name the cuts instead, as "
            "cuts=[...], each skip's source among them"
        )
    ends: list[Call] = []
    for index in cut_evenly(len(chain), num_blocks):
        begin = chain[index].end
        until = min(call.start for call in members if call.start > begin)
        after = [call for call in places if begin < call.start and call.end < until]
        ends.append(max([chain[index], *after], key=lambda call: call.end))
    return ends


def _length(chain: Sequence[Call]) -> tuple[int, int]:
    return len(chain), sum(call.end - call.start for call in chain)


def _outermost(chain: Sequence[Call]) -> list[Call]:
    return [call for call in chain if not any(other.holds(call) for other in chain)]


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())
