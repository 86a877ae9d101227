"""Gradients of local losses, which come in the forward pass, until the model's own loss is back-propagated."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localgrad.core.observed import tensors_in
from localgrad.core.replicas import average_gradients
from localgrad.errors import LocalGradWarning

Block = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""What a local block trains: its own parameters, and those of its auxiliary networks."""

SUMMED = (
    "gradients are accumulated over batches, and those of local losses are summed: divide these losses as you divide "
    "your own, isolation.backward = lambda loss: (loss / n).backward()"
)
LOST = (
    "weights have changed, and no gradient came to what the model returned for the batch before, so its local losses "
    "trained nothing: back-propagate a loss of the model's output"
)


class LocalGradients:
    """The gradients that one forward pass makes: set aside when it ends, and there when the backward pass begins.

    So they count as if the backward pass had made them, in every order of a loop: whoever zeroes gradients between
    forward and backward pass, or leaves a batch out, means those of local losses too. Until then they live beside the
    gradients of the batches before, if those are still there.

    Args:
        blocks: the local blocks.
        ddp: the wrapper over whose processes gradients are averaged; its `no_sync` counts when the forward pass runs.
        stepped: whether an optimizer has stepped since the forward pass before.
        before: those of that pass.

    Attributes:
        are_waiting: whether they are aside.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        ddp: DistributedDataParallel | None,
        stepped: bool,
        before: "LocalGradients | None",
    ) -> None:
        if stepped and before is not None and before.are_waiting:
            warnings.warn(LOST, LocalGradWarning, stacklevel=4)
        self.blocks, self.are_waiting, self._stepped = blocks, False, stepped
        self._ddp = ddp if ddp is not None and ddp.require_backward_grad_sync else None
        self._made: list[tuple[nn.Parameter, Tensor]] = []
        self._before = [(parameter, parameter.grad) for parameter in self._all()]
        for parameter, _ in self._before:
            parameter.grad = None

    def _all(self) -> list[nn.Parameter]:
        return [parameter for own, auxiliary in self.blocks for parameter in (*own, *auxiliary)]

    def set_aside(self, output: Any, last: Sequence[nn.Parameter]) -> None:
        """At the end of the forward pass: the gradients of the batches before are back until a backward pass begins.

        That is seen at the model's output, or where it holds no tensors at the last block's parameters. A pass that
        failed, whose output is None, has made nothing.

        Args:
            output: of the model.
            last: parameters of the last block.
        """
        made = [(parameter, parameter.grad) for parameter in self._all()]
        for parameter, gradient in self._before:
            parameter.grad = gradient
        self._before = []
        if output is None:
            return
        self._made = [(parameter, gradient) for parameter, gradient in made if gradient is not None]
        watched = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        watched = watched or [parameter for parameter in last if parameter.requires_grad]
        if not watched:  # nobody back-propagates
            self.arrive()
            return
        self.are_waiting = True
        handles: list[Any] = []
        arrive = _Once(self.arrive, handles)
        handles += [tensor.register_hook(arrive) for tensor in watched]  # pyright: ignore[reportUnknownMemberType]

    @torch.no_grad()
    def arrive(self) -> None:
        """Add them to the gradients that are there."""
        self.are_waiting = False
        for own, auxiliary in self.blocks:
            kept = [parameter for parameter in auxiliary if parameter.grad is not None]
            gone = all(parameter.grad is None for parameter in own)
            if kept and (gone or (self._stepped and _is_zero(own))):
                for parameter in kept:  # model.zero_grad(), as the Trainer of transformers calls it, means these too
                    parameter.grad = None if gone else parameter.grad.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        for parameter, gradient in self._made:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        self._made = []
        if self._ddp is not None:
            for own, auxiliary in self.blocks:
                average_gradients(self._ddp, [p for p in (*own, *auxiliary) if p.requires_grad])


def _is_zero(own: Sequence[nn.Parameter]) -> bool:
    """Whether the largest of these gradients is zero; that waits for the device."""
    largest = max((p.grad for p in own if p.grad is not None), key=Tensor.numel)
    return not largest.is_meta and not largest.any()


class _Once:
    """A hook on several tensors that calls a function when the first gradient comes, and is gone then."""

    def __init__(self, function: Callable[[], None], handles: list[Any]) -> None:
        self.function, self.handles = function, handles

    def __call__(self, gradient: Tensor) -> None:
        if self.handles:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.function()
