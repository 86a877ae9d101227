"""Deep copies of modules, without the graphs of tensors that a forward pass left on them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from localgrad.core.initialise import draw_anew
from localgrad.core.trees import leaves
from localgrad.core.units import Unit

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module, shared: Iterable[nn.Parameter] = ()) -> Module:
    """A deep copy of a module, without the graphs of tensors that its modules keep (a balance loss, attention maps).

    Args:
        module: what to copy.
        shared: parameters that the copy shall hold themselves, not copies of them.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    kept = [value for each in module.modules() for value in leaves(vars(each)) if isinstance(value, Tensor)]
    memo |= {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    return copy.deepcopy(module, memo)


def copied(source: Sequence[Unit], initial: str, *, share_frozen: bool = False) -> nn.Module:
    """A copy of units in a row; with `initial="random"` layers that can reset themselves are drawn anew.

    All parameters of the copy are trainable. With `share_frozen` the units' frozen parameters are not copied: the copy
    holds the same tensors.
    """
    whole = nn.ModuleList(unit.module for unit in source)
    copies = deep_copy(whole, [p for p in whole.parameters() if not p.requires_grad] if share_frozen else ())
    module = copies[0] if len(source) == 1 else nn.Sequential(*copies.children())
    for parameter in () if share_frozen else module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if initial == "random":
        own = [layer for layer in module.modules() if all(parameter.requires_grad for parameter in layer.parameters())]
        draw_anew(own)  # what is shared stays as it is
    return module
