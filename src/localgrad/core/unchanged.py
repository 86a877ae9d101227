"""Check that a model's modules, parameters, dtypes and hooks stay the same while it is isolated."""

from typing import Any

import torch
from torch import nn

from localgrad.core.tables import own_modules, own_parameters, slots
from localgrad.errors import LocalGradError


class Unchanged:
    """A snapshot of a model's modules, parameters, dtypes and hooks."""

    def __init__(self, model: nn.Module, hooks: list[tuple[dict[int, Any], Any]]) -> None:
        """`hooks` are pairs of a module's dictionary of hooks and the handle of one hook in it."""
        self.hooks = hooks
        self.held: list[tuple[str, dict[str, Any], str, Any]] = []
        modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        self.tables: list[tuple[str, dict[str, Any], set[str]]] = []
        for name, module in modules.items():
            self.tables += [(name, table, set(table)) for table in (own_modules(module), own_parameters(module))]
            self.held += [(f"{name}.{key}".strip("."), table, key, value) for table, key, value in slots(module)]
        self.dtypes = [(name, parameter, parameter.dtype) for name, parameter in model.named_parameters()]

    def check(self) -> None:
        """Refuse to train if the model differs from the snapshot."""
        if any(handle.id not in table for table, handle in self.hooks):
            raise LocalGradError(
                "hooks of the isolation were removed from the model, so its blocks would not be trained: keep them, or "
                "call isolation.remove() and isolate the model again"
            )
        for name, table, key, value in self.held:
            if table.get(key) is not value:
                raise LocalGradError(
                    f"{name!r} was exchanged after isolate (by another layer, an adapter, FSDP or assign=True): change "
                    "the model first, then isolate it, then make the optimizer; FSDP is not supported, DDP is"
                )
        for name, table, known in self.tables:
            added = [key for key, value in table.items() if key not in known and _has_parameters(value)]
            if added:
                raise LocalGradError(
                    f"{f'{name}.{added[0]}'.strip('.')!r} was added after isolate, which knows no block of it: change "
                    "the model first, then isolate it, then make the optimizer"
                )
        for name, parameter, dtype in self.dtypes:
            if parameter.dtype is not dtype:
                raise LocalGradError(
                    f"{name!r} was {_short(dtype)} in isolate and is {_short(parameter.dtype)} now: cast the model "
                    "first, then isolate it"
                )


def _has_parameters(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, nn.Module) and any(True for _ in value.parameters()))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
