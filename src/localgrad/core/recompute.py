"""Activation checkpointing that updates running statistics once a batch."""

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
    """`function(features)`, computed again in the backward pass instead of keeping its activations.

    Running statistics of batch norms are updated in the first pass only. Other buffers start the second pass with the
    values that they had before the first, and end with what the first made of them.

    Args:
        function: what `module` does with the features, `module` itself for one.
        features: `(N, ...)`.
        module: the module whose norms are left alone in the second pass.
        writes_input: whether the function changes its input in place; it gets a copy, for the second pass needs it too.
    """
    if not torch.is_grad_enabled():
        return function(features)
    if writes_input:
        return recomputed(lambda features: function(features.clone()), features, module)
    if torch.compiler.is_compiling():  # compiled code writes each buffer once, at the end
        return checkpoint(function, features, use_reentrant=False)  # pyright: ignore[reportReturnType]
    norms = [m for m in module.modules() if isinstance(m, NormBase)]
    begun = [
        (each, name, buffer.clone())
        for each in module.modules()
        if each not in norms
        for name, buffer in own_buffers(each).items()
        if buffer is not None
    ]
    return checkpoint(  # pyright: ignore[reportReturnType]
        function, features, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsItWas(norms, begun))
    )


class _AsItWas:
    """Context of the second pass: buffers and norms as they were before the first, undone at its end."""

    def __init__(self, norms: Sequence[Any], begun: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self.norms, self.begun = norms, begun
        self.left = ExitStack()

    def __enter__(self) -> None:
        for module, name, value in self.begun:
            buffers = own_buffers(module)
            self.left.callback(buffers.__setitem__, name, buffers[name])
            buffers[name] = value.clone()
        # factor 0, and tracking stays on: statistics do not change, and the same tensors are saved as in the first pass
        for norm in self.norms:
            counted = norm.num_batches_tracked
            self.left.callback(setattr, norm, "momentum", norm.momentum)
            self.left.callback(setattr, norm, "num_batches_tracked", counted)
            norm.momentum, norm.num_batches_tracked = 0.0, None if counted is None else counted.clone()

    def __exit__(self, *raised: object) -> None:
        self.left.close()


class Recomputed:
    """In the place of a module's forward: the same, computed again in the backward pass.

    It holds the module rather than closing over it, so that copies and pickles of the module have their own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return recomputed(lambda _: self.forward(*args, **kwargs), torch.empty(0), self.module)
