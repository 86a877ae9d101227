"""Check that a model's modules, parameters, dtypes and hooks stay the same while it is isolated."""

from typing import Any

import torch
from torch import nn

from localgrad.core.tables import slots
from localgrad.core.versions import version
from localgrad.errors import LocalGradError


class Unchanged:
    """A snapshot of a model's modules, parameters, dtypes and hooks."""

    def __init__(self, model: nn.Module, hooks: list[tuple[dict[int, Any], Any]]) -> None:
        """`hooks` are pairs of a module's dictionary of hooks and the handle of one hook in it."""
        self.hooks = hooks
        self.held: list[tuple[str, dict[str, Any], str, Any]] = []
        modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        for name, module in modules.items():
            self.held += [(f"{name}.{key}".strip("."), table, key, value) for table, key, value in slots(module)]
        self.dtypes = [(name, parameter, parameter.dtype) for name, parameter in model.named_parameters()]
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.version = -1

    def stepped(self) -> bool:
        """Whether trained weights have changed since the last call. Called once per batch."""
        before, self.version = self.version, sum(map(version, self.trained))
        return self.version != before

    def has_gradients(self) -> bool:
        """Whether a trained parameter has a gradient."""
        return any(parameter.grad is not None for parameter in self.trained)

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
        for name, parameter, dtype in self.dtypes:
            if parameter.dtype is not dtype:
                raise LocalGradError(
                    f"{name!r} was {_short(dtype)} in isolate and is {_short(parameter.dtype)} now: cast the model "
                    "first, then isolate it"
                )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
