"""Gradients of local losses: computed in the forward pass, stored until the model's own loss is back-propagated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localgrad.core.observed import tensors_in
from localgrad.core.replicas import average_gradients
from localgrad.errors import warn

BlockParameters = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""The parameters that a block trains: its own, and those of its auxiliary networks."""

SUMMED = (
    "gradients are accumulated over batches, and those of local losses are summed: divide these losses as you divide "
    "your own, isolation.backward = lambda loss: (loss / n).backward()"
)
LOST = (
    "weights have changed, and no gradient came to what the model returned for the batch before, so its local losses "
    "trained nothing: back-propagate a loss of the model's output"
)
UPSTREAM = (
    "an input of the isolated model requires a gradient, and gets that of local losses, inside the forward pass: this "
    "trains what computed it, and is lost if gradients are zeroed before backward(). Detach the input, isolate a model "
    "that holds what computes it, or call model.eval() for the end-to-end gradient"
)


class LocalGradients:
    """The local gradients of one forward pass: stored when it ends, added to `.grad` when the backward pass begins.

    So they act as if the backward pass had computed them. A training loop that zeroes gradients between forward and
    backward pass does not zero them. If the loop runs no backward pass for the batch, they are dropped. Until the
    backward pass they need memory beside the gradients of earlier batches.

    Args:
        blocks: the parameters of all blocks. The last has no local gradients, unless the run that the blocks were read
            from skipped one of its layers, which now runs in a local block.
        inputs: tensors among the model's arguments.
        ddp: the DDP wrapper over whose ranks the gradients are averaged, or None. If its `no_sync` is active during the
            forward pass, they are not averaged.
        stepped: whether an optimizer has stepped since the forward pass before.
        before: the local gradients of the forward pass before, or None.

    Attributes:
        are_waiting: whether the gradients are stored, and not added yet.
    """

    def __init__(
        self,
        blocks: Sequence[BlockParameters],
        inputs: Sequence[Tensor],
        ddp: DistributedDataParallel | None,
        stepped: bool,
        before: "LocalGradients | None",
    ) -> None:
        if stepped and before is not None and before.are_waiting:
            warn(LOST)
        self.blocks, self.are_waiting, self._stepped = blocks, False, stepped
        self._ddp = ddp if ddp is not None and ddp.require_backward_grad_sync else None
        self._made: list[tuple[nn.Parameter, Tensor]] = []
        watched = [tensor for tensor in inputs if tensor.requires_grad]
        self._watching: list[Any] = [tensor.register_hook(_reached) for tensor in watched]  # pyright: ignore[reportUnknownMemberType]
        self._before = [(parameter, parameter.grad) for parameter in self._all()]
        for parameter, _ in self._before:
            parameter.grad = None

    def _all(self) -> list[nn.Parameter]:
        return [parameter for own, auxiliary in self.blocks for parameter in (*own, *auxiliary)]

    def set_aside(self, output: Any) -> None:
        """At the end of the forward pass, store its gradients and restore `.grad` of earlier batches.

        Hooks on the model's output notice that a backward pass begins; if no tensor of the output has a graph, hooks on
        the last block's parameters do. A forward pass that failed leaves no gradients.

        Args:
            output: output of the model; None if the forward pass failed.
        """
        for handle in self._watching:
            handle.remove()
        made = [(parameter, parameter.grad) for parameter in self._all()]
        for parameter, gradient in self._before:
            parameter.grad = gradient
        self._before = []
        if output is None:
            return
        self._made = [(parameter, gradient) for parameter, gradient in made if gradient is not None]
        watched = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        watched = watched or [parameter for parameter in self.blocks[-1][0] if parameter.requires_grad]
        if not watched:  # no backward pass can follow
            self.arrive()
            return
        self.are_waiting = True
        handles: list[Any] = []
        arrive = _Once(self.arrive, handles)
        handles += [tensor.register_hook(arrive) for tensor in watched]  # pyright: ignore[reportUnknownMemberType]

    @torch.no_grad()
    def arrive(self) -> None:
        """Add the stored gradients to `.grad`, and average the sums over the ranks under DDP."""
        self.are_waiting = False
        for own, auxiliary in self.blocks:
            kept = [parameter for parameter in auxiliary if parameter.grad is not None]
            gone = all(parameter.grad is None for parameter in own)
            if kept and (gone or (self._stepped and _is_zero(own))):
                # the loop called model.zero_grad(), as the Trainer of transformers does: zero these gradients too
                for parameter in kept:
                    parameter.grad = None if gone else parameter.grad.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        for parameter, gradient in self._made:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        self._made = []
        if self._ddp is not None:
            for own, auxiliary in self.blocks[:-1]:
                average_gradients(self._ddp, [p for p in (*own, *auxiliary) if p.requires_grad])


def _is_zero(own: Sequence[nn.Parameter]) -> bool:
    """Whether the gradient with the most elements is zero. The answer needs a synchronization with the device."""
    largest = max((p.grad for p in own if p.grad is not None), key=Tensor.numel)
    return not largest.is_meta and not largest.any()


def _reached(gradient: Tensor) -> None:
    """Hook of an input, while the forward pass runs: only a local loss can call it then."""
    warn(UPSTREAM)


class _Once:
    """A hook on several tensors: the first gradient calls a function and removes the hook from all of them."""

    def __init__(self, function: Callable[[], None], handles: list[Any]) -> None:
        self.function, self.handles = function, handles

    def __call__(self, gradient: Tensor) -> None:
        if self.handles:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.function()
