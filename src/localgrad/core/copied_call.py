"""Call a copy of a module with the arguments of the module's own call and with other features."""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.momentum import Call
from localgrad.core.observed import first_floating
from localgrad.core.trees import leaves, mapped

PLAIN = (Tensor, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Module)


def as_called(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], features: Tensor, others: Mapping[int, Tensor]
) -> Call:
    """Return a function `(copy, other features) -> output` that calls a copy with the arguments of `module`.

    Further tensors, such as masks and embeddings, are passed detached. An object that the module may change, such as a
    key-value cache, is left at its default, if it has one.

    Args:
        module: the module that was copied.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.
        features: the tensor among the arguments that the other features replace.
        others: replacements of further tensors, by the `id` of the tensor.
    """
    given = _without_state(module, args, kwargs)

    def call(copied: nn.Module, mixed: Tensor) -> Tensor:
        def exchanged(tensor: Tensor) -> Tensor:
            return mixed if tensor is features else others.get(id(tensor), detached(tensor))

        in_order, by_name = mapped(exchanged, given)
        output = first_floating(copied(*in_order, **by_name))
        assert output is not None
        return output

    return call


def detached(tensor: Tensor) -> Tensor:
    """`tensor.detach()` if the tensor requires a gradient, else the tensor itself."""
    return tensor.detach() if tensor.requires_grad else tensor


def _without_state(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    parameters = signature(module.forward).parameters
    defaults = [parameter.default for parameter in parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    defaults += [Parameter.empty] * (len(args) - len(defaults))
    in_order = [
        default if _has_state(value) and default is not Parameter.empty else value
        for value, default in zip(args, defaults, strict=False)
    ]
    by_name = {
        name: value
        for name, value in kwargs.items()
        if not _has_state(value) or (name in parameters and parameters[name].default is Parameter.empty)
    }
    return in_order, by_name


def _has_state(value: Any) -> bool:
    return not all(leaf is None or isinstance(leaf, PLAIN) or callable(leaf) for leaf in leaves(value))
