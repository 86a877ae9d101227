"""The tables of a module: children, parameters, buffers and hooks, which PyTorch keeps under private names."""

from typing import Any

from torch import nn


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The children of a module by name, None among them, to be read or changed."""
    return module._modules  # pyright: ignore[reportPrivateUsage]


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters that a module itself holds, likewise."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers that a module itself holds, likewise."""
    return module._buffers  # pyright: ignore[reportPrivateUsage]


def slots(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Where a module keeps its children and parameters: the table, the name and what is there now."""
    return [
        (table, name, value) for table in (own_modules(module), own_parameters(module)) for name, value in table.items()
    ]


def hooks_before(module: nn.Module) -> dict[int, Any]:
    """What is called before a module's forward, by the id of its handle."""
    typed_in_part: Any = module
    return typed_in_part._forward_pre_hooks


def hooks_after(module: nn.Module) -> dict[int, Any]:
    """What is called after a module's forward, likewise."""
    typed_in_part: Any = module
    return typed_in_part._forward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, or going back through it, runs more than its forward pass."""
    typed_in_part: Any = module
    of_backward = typed_in_part._backward_hooks or typed_in_part._backward_pre_hooks
    return bool(hooks_before(module) or hooks_after(module) or of_backward)
