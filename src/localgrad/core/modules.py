"""Names of modules, typed: torch declares them without the modules' class."""

from typing import Any, cast

from torch import nn


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model by name, itself first, under ""."""
    return list(cast(Any, model).named_modules())


def named_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a module holds directly, by name."""
    return list(cast(Any, module).named_children())
