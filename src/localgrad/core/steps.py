"""What optimizers do between the batches of an isolated model: whether they step, and what they leave out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from localgrad.core.eager import eager
from localgrad.core.versions import version
from localgrad.errors import warn

UNSTEPPED = (
    "optimizers change the model's weights, but never those of the auxiliary networks, so local losses are those of "
    "heads that stay as they began: give the optimizer isolation.trainable_parameters(), not model.parameters()"
)
EVALUATING = (
    "optimizers step while the isolated model is in evaluation mode, where it has no local losses and is trained "
    "end-to-end: call model.train() first"
)
UNSCALED = (
    "a GradScaler divides gradients by its scale, and those of local losses were not multiplied by it, so they vanish: "
    "give isolation.backward = lambda loss: scaler.scale(loss).backward()"
)


class _Count:
    """Hook of all optimizers: counts their steps, and counts as changed the watched weights that a step changes.

    Fused optimizers, and those that write to `parameter.data`, change weights without `Tensor._version` counting it (in
    PyTorch 2.14). A step that a fused optimizer leaves out for a GradScaler counts too, because only the device knows.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.watched: WeakSet[Steps] = WeakSet()

    @eager
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        for each in [each for each in self.watched if each.unscaled and _in_scaler()]:
            each.unscaled = False
            if {id(p) for group in optimizer.param_groups for p in group["params"]} & {id(p) for p in each.watched}:
                warn(UNSCALED)
        own = {id(parameter) for each in self.watched for parameter in each.watched}
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        increment_version([p for p in given if id(p) in own and p.grad is not None])


def _in_scaler() -> bool:
    """Whether an enabled GradScaler has called the optimizer that steps now."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not GradScaler.step.__code__:
        frame = frame.f_back  # of the loop's own frame no f_locals: Python would keep that copy, and its tensors, alive
    return frame is not None and frame.f_locals["self"].is_enabled()


@cache
def _counted() -> _Count:
    """The counter of this process, whose hook begins at the first call."""
    count = _Count()
    register_optimizer_step_post_hook(count)
    return count


class Steps:
    """Tells whether weights have changed between batches, and warns of weights that no optimizer changes.

    Args:
        trained: trained parameters of the model.
        auxiliary: trained parameters of the auxiliary networks.
    """

    def __init__(self, trained: Sequence[nn.Parameter], auxiliary: Sequence[nn.Parameter]) -> None:
        self.trained, self.auxiliary, self.watched = trained, auxiliary, (*trained, *auxiliary)
        self._versions: tuple[int, int] | None = None
        self._without_auxiliary, self.unscaled = 0, False
        self._evaluated: tuple[int, int] | None = None

    def stepped(self, unscaled: bool) -> bool:
        """Whether the model's trained weights have changed since the last call. Called once per training batch.

        Args:
            unscaled: whether local losses are back-propagated as they are.
        """
        self.unscaled = unscaled
        _counted().watched.add(self)  # here, so that a copy of an isolation is watched too
        before, self._evaluated = self._versions, None
        self._versions = now = _changes(self.trained), _changes(self.auxiliary)
        if before is None:
            return True
        if now[1] != before[1]:
            self.auxiliary = ()  # an optimizer has them
            self._versions = now[0], 0
        elif now[0] != before[0] and any(parameter.grad is not None for parameter in self.auxiliary):
            self._without_auxiliary += 1
            if self._without_auxiliary == 3:  # not earlier: SAM may change the model's weights alone in between
                warn(UNSTEPPED)
        return now[0] != before[0]

    def has_gradients(self) -> bool:
        """Whether a trained parameter of the model has a gradient."""
        return any(parameter.grad is not None for parameter in self.trained)

    def evaluate(self) -> None:
        """Called when the model runs in evaluation mode with gradients: warns if it is trained so."""
        _counted().watched.add(self)
        before, self._evaluated = self._evaluated, (_counted().steps, _changes(self.trained))
        if before is not None and all(a != b for a, b in zip(before, self._evaluated, strict=True)):
            warn(EVALUATING)


def _changes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(map(version, parameters))
