"""The dictionaries in which a module stores children, parameters, buffers and hooks, under private names of PyTorch."""

from typing import Any

from torch import nn


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The dictionary of a module's children by name, to be read or changed. Values may be None."""
    return module._modules  # pyright: ignore[reportPrivateUsage]


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The dictionary of the parameters that a module itself holds, to be read or changed. Values may be None."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The dictionary of the buffers that a module itself holds, to be read or changed. Values may be None."""
    return module._buffers  # pyright: ignore[reportPrivateUsage]


def slots(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """A module's own children and parameters, each as (dictionary that holds it, name, present value)."""
    return [
        (table, name, value) for table in (own_modules(module), own_parameters(module)) for name, value in table.items()
    ]


def hooks_before(module: nn.Module) -> dict[int, Any]:
    """The forward pre-hooks of a module, by the id of their handle."""
    typed_in_part: Any = module
    return typed_in_part._forward_pre_hooks


def hooks_after(module: nn.Module) -> dict[int, Any]:
    """The forward hooks of a module, by the id of their handle."""
    typed_in_part: Any = module
    return typed_in_part._forward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks or backward hooks."""
    typed_in_part: Any = module
    of_backward = typed_in_part._backward_hooks or typed_in_part._backward_pre_hooks
    return bool(hooks_before(module) or hooks_after(module) or of_backward)
