"""Code that runs eagerly although `torch.compile` is at work around it or inside it."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """The function, into which `torch.compile` does not trace.

    `torch.compiler.disable` does the same, and loads the compiler at once, which takes a second; this loads it at the
    first call, as PyTorch's optimizers do.
    """
    return cast(Any, torch)._disable_dynamo(function)


def compiler_off() -> AbstractContextManager[Any]:
    """Inside, whatever `torch.compile` made runs as it was written, and nothing is compiled.

    The compiler is loaded by whoever compiles something; where it is not, there is nothing to turn off.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
