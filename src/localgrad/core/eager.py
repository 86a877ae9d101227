"""Run code eagerly inside a compiled model, and run compiled layers eagerly."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Decorator: `torch.compile` does not trace into the function, which runs eagerly.

    `torch.compiler.disable` does the same, but imports the compiler at once, which takes a second. This decorator
    imports it at the first call, as PyTorch's optimizers do.
    """
    return cast(Any, torch)._disable_dynamo(function)


def compiler_off() -> AbstractContextManager[Any]:
    """Context: compiled modules and functions run eagerly, and nothing is compiled.

    If the compiler is not imported yet, nothing is compiled, and the context does nothing.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
