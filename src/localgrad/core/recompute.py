"""Activation checkpointing that updates running statistics once per batch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from localgrad.core.tables import own_buffers

NormBase = nn.modules.batchnorm._NormBase  # pyright: ignore[reportPrivateUsage]


def recomputed(
    function: Callable[[Tensor], Tensor], features: Tensor, module: nn.Module, writes_input: bool = False
) -> Tensor:
    """Run `function(features)` with activation checkpointing: the backward pass recomputes its activations.

    Batch norms update their running statistics in the first pass only. The recomputation starts with the values that
    other buffers had before the first pass; afterwards they have the values from the first pass again.

    Args:
        function: computes the output with `module`; it may be `module` itself.
        features: `(N, ...)`.
        module: the module whose norms and other buffers the recomputation leaves unchanged.
        writes_input: whether the function changes its input in place. It then gets a copy, because the recomputation
            needs the input too.
    """
    if not torch.is_grad_enabled():
        return function(features)
    if writes_input:
        return recomputed(lambda features: function(features.clone()), features, module)
    if torch.compiler.is_compiling():  # compiled code writes each buffer once, at the end
        return checkpoint(function, features, use_reentrant=False)  # pyright: ignore[reportReturnType]
    norms = [m for m in module.modules() if isinstance(m, NormBase)]
    initial = [
        (each, name, buffer.clone())
        for each in module.modules()
        if each not in norms
        for name, buffer in own_buffers(each).items()
        if buffer is not None
    ]
    return checkpoint(  # pyright: ignore[reportReturnType]
        function, features, use_reentrant=False, context_fn=lambda: (nullcontext(), _Recomputation(norms, initial))
    )


class _Recomputation:
    """Context of the recomputation: buffers have their initial values, norms update nothing; undone at the end."""

    def __init__(self, norms: Sequence[Any], initial: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self.norms, self.initial = norms, initial
        self.undo = ExitStack()

    def __enter__(self) -> None:
        for module, name, value in self.initial:
            buffers = own_buffers(module)
            self.undo.callback(buffers.__setitem__, name, buffers[name])
            buffers[name] = value.clone()
        # momentum 0 instead of tracking off: running statistics stay unchanged, and autograd saves the same tensors as
        # in the first pass
        for norm in self.norms:
            counted = norm.num_batches_tracked
            self.undo.callback(setattr, norm, "momentum", norm.momentum)
            self.undo.callback(setattr, norm, "num_batches_tracked", counted)
            norm.momentum, norm.num_batches_tracked = 0.0, None if counted is None else counted.clone()

    def __exit__(self, *raised: object) -> None:
        self.undo.close()


class Recomputed:
    """Replacement of a module's `forward` that runs it with activation checkpointing.

    It is an object that holds the module, not a closure, so that copies and pickles of the module hold their own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return recomputed(lambda _: self.forward(*args, **kwargs), torch.empty(0), self.module)
