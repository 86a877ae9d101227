"""The tables in which a module keeps what is its own, for which PyTorch has no public names."""

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


def hooks_before(module: nn.Module) -> dict[int, Any]:
    """What is called before a module's forward, by the id of its handle."""
    typed_in_part: Any = module
    return typed_in_part._forward_pre_hooks


def hooks_after(module: nn.Module) -> dict[int, Any]:
    """What is called after a module's forward, likewise."""
    typed_in_part: Any = module
    return typed_in_part._forward_hooks
