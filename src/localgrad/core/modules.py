"""`named_modules` and `named_children` with full types, which torch declares only in part."""

from typing import Any, cast

from torch import nn


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model with its name; the model itself comes first, with the name ""."""
    return list(cast(Any, model).named_modules())


def named_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module with their names."""
    return list(cast(Any, module).named_children())
