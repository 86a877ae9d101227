"""Activation checkpointing that counts a batch once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(
    function: Callable[[Tensor], Tensor], features: Tensor, module: nn.Module, writes_input: bool = False
) -> Tensor:
    """`function(features)`, computed again in the backward pass instead of keeping its activations.

    The running statistics of the module's batch norms are updated in the first pass only.

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
    return checkpoint(  # pyright: ignore[reportReturnType]
        function, features, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(module))
    )


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # with factor 0 a running average stays; without one, fewer tensors would be saved than before
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, factor, batches in kept:
            norm.momentum, norm.num_batches_tracked = factor, batches
