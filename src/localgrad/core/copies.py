"""Deep copies of modules, without the autograd graphs of tensors that a forward pass stored on them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from localgrad.core.initialise import draw_anew
from localgrad.core.trees import leaves
from localgrad.core.units import Unit

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module, shared: Iterable[nn.Parameter] = ()) -> Module:
    """A deep copy of a module; tensors with a graph that its modules store (a balance loss, say) are detached.

    Args:
        module: the module to copy.
        shared: parameters that the copy shares with the module instead of copying them.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    kept = [value for each in module.modules() for value in leaves(vars(each)) if isinstance(value, Tensor)]
    memo |= {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    return copy.deepcopy(module, memo)


def copied(source: Sequence[Unit], initial: str, *, share_frozen: bool = False) -> nn.Module:
    """A copy of consecutive units; with `initial="random"` layers with a reset method are initialised again.

    All floating-point parameters of the copy are trainable. With `share_frozen` the units' frozen parameters are not
    copied: the copy holds the same tensors, and they stay frozen.
    """
    modules = nn.ModuleList(unit.module for unit in source)
    copies = deep_copy(modules, [p for p in modules.parameters() if not p.requires_grad] if share_frozen else ())
    module = copies[0] if len(source) == 1 else nn.Sequential(*copies.children())
    for parameter in () if share_frozen else module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if initial == "random":
        own = [layer for layer in module.modules() if all(parameter.requires_grad for parameter in layer.parameters())]
        draw_anew(own)  # shared parameters keep their values
    return module
