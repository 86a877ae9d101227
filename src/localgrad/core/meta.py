"""Copies of modules on the meta device."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from localgrad.core.trees import leaves

Module = TypeVar("Module", bound=nn.Module)


def to_meta(module: Module) -> Module:
    """A copy of a module on the meta device, in the same training mode, without data and without autograd graphs."""
    memo: dict[int, Tensor] = {}
    for layer in module.modules():
        for value in leaves(vars(layer)):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(module, memo)
