"""Copies of modules, whatever their last forward pass left on them."""

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from localgrad.core.trees import leaves


def deep_copy(module: nn.Module, shared: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A deep copy of a module, without the graphs of tensors that its modules keep (a balance loss, attention maps).

    Args:
        module: what to copy.
        shared: parameters that the copy shall hold themselves, not copies of them.
    """
    memo: dict[int, object] = {id(parameter): parameter for parameter in shared}
    kept = [value for each in module.modules() for value in leaves(vars(each)) if isinstance(value, Tensor)]
    memo |= {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    return copy.deepcopy(module, memo)
