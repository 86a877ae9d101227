"""Restore everything that a run of a model changed in it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from localgrad.core.eager import compiler_off


@contextmanager
def restored(model: nn.Module) -> Generator[Callable[[], None], None, None]:
    """Context: at its end, also after an error, training modes, attributes and buffers of all modules are restored.

    Attributes that a forward pass assigned to a module, and entries that it put into a module's lists and dictionaries,
    are removed. A buffer that it replaced or resized is restored as the same tensor with its old values. Compiled
    layers run eagerly inside, because compiling each of them for one run takes minutes.

    Yields:
        A function that restores everything before the context ends, for one more run.
    """
    modules = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers: list[tuple[Any, Any]] = [
        (value, value.copy())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def put_back() -> None:
        for attributes, before in modules:
            _make_equal(attributes, before)
        for container, before in containers:
            if isinstance(container, dict):
                _make_equal(cast(dict[Any, Any], container), cast(dict[Any, Any], before))
            elif isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                buffer.copy_(value)

    try:
        with compiler_off():
            yield put_back
    finally:
        put_back()


def _make_equal(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Put the entries of `before` into the table, the same objects in the same order."""
    if list(table) != list(before):
        table.clear()
        table.update(before)
        return
    for key, value in before.items():
        if table[key] is not value:
            table[key] = value
