"""Copies of modules without data."""

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def to_meta(module: Module) -> Module:
    """A copy on `meta`, in the mode of the module; no data is copied on the way."""
    memo: dict[int, Tensor] = {}
    for layer in module.modules():
        for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False), *vars(layer).values()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(module, memo)
