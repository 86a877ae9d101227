"""Functions that run eagerly inside a compiled model."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """The function, into which `torch.compile` does not trace.

    `torch.compiler.disable` does the same, and loads the compiler at once, which takes a second; this loads it at the
    first call, as PyTorch's optimizers do.
    """
    return cast(Any, torch)._disable_dynamo(function)
