"""One forward pass of an isolated model: each local loss is back-propagated as soon as its block has ended."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.autograd_graph import derives_from
from localgrad.core.copied_call import as_called, detached
from localgrad.core.isolated_block import IsolatedBlock
from localgrad.core.observed import first_floating, tensors_in
from localgrad.core.reach import Span
from localgrad.core.trees import mapped
from localgrad.core.versions import version
from localgrad.errors import LocalGradError

OUTSIDE = (
    "the cut {!r} is run outside of the isolated model's forward pass: call the model as a whole; instead of its own "
    "checkpointing, which runs it again, use recompute=True"
)
TWICE = (
    "the cut {!r} is run twice in a forward pass, in another order than at first, without gradients or without "
    "features: cut where every batch passes once, and use isolate(..., recompute=True) instead of the model's own "
    "checkpointing"
)
BACKWARD: Callable[[Tensor], Any] = cast(Any, Tensor).backward  # torch types it in part


class LocalPass:
    """Trains local blocks on one batch: `leave` runs after a cut's module, `meet` before the next block's first module.

    Args:
        objectives: auxiliary network and local loss of each local block, or None.
        momenta: momentum auxiliary network of each local block, or None.
        blocks: all blocks, the last included.
        batch: targets and inputs, for the objectives.
        backward: back-propagates a loss.
        reach: number of blocks that a loss trains, its own included.

    Attributes:
        reached: number of cuts that the forward pass has passed.
        is_waiting: whether the loss of the block that ended last waits for the next block's first module.
        losses: detached losses of the blocks so far.
    """

    def __init__(
        self,
        objectives: Sequence[nn.Module | None],
        momenta: Sequence[Any],
        blocks: Sequence[IsolatedBlock],
        batch: tuple[Any, Tensor | None],
        backward: Callable[[Tensor], Any],
        reach: int,
    ) -> None:
        self.objectives, self.momenta, self.blocks = objectives, momenta, blocks
        self.batch, self.backward = batch, backward
        self.reached, self.is_waiting, self.losses = 0, False, list[Tensor]()
        self.features = self.leaf = torch.empty(0)
        self.entry = torch.empty(0)  # with reach > 1: the block's input, a leaf
        self.span = Span(reach, len(blocks)) if reach > 1 else None

    def leave(self, output: Any) -> Any:
        """End a block: back-propagate its local loss (with momentum `meet` does), and return its output detached."""
        block, features = self.reached, first_floating(output)
        assert features is not None
        self.reached += 1
        self.features, self.leaf = features, features.detach()
        has_trained, name = any(each.requires_grad for each in self.blocks[block].parameters), self.blocks[block].name
        if self.objectives[block] is None and has_trained:
            raise LocalGradError(
                f"block {block + 1} (to {name}) was frozen in isolate, so it has no local loss, and "
                "parameters of it are to be trained now: call isolation.remove() and isolate the model again"
            )
        if has_trained and not features.requires_grad:
            raise LocalGradError(
                f"the features of block {block + 1} (to {name}) require no gradient, but parameters of it do: forward "
                "detaches them or runs under no_grad or torch.func.vmap; freeze these parameters, or cut elsewhere"
            )
        trains = features.requires_grad and self.objectives[block] is not None
        if trains and self.momenta[block] is not None:
            self.is_waiting = True
            self.leaf.requires_grad_()
        elif trains:
            seen = features if self.span is None else features.detach().requires_grad_()
            self._train(block, seen, seen)
            self._take_in(block, seen.grad if self.span else None)
        else:
            self._take_in(block, None)
        passed = {id(features): self.leaf}
        return mapped(lambda tensor: passed.get(id(tensor), detached(tensor)), output)

    def meet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and back-propagate the waiting loss. Copies of `module` are called with the arguments of `module`.

        The backward pass includes operations between the cut and the module, and trains no parameter of the next block.

        Returns:
            The arguments for the module itself, detached. None leaves its arguments unchanged: they do not depend on
            the features, so that the loss waits on, or `reach` is above 1.
        """
        block, features, leaf = self.reached - 1, self.features, self.leaf
        given = [t for t in tensors_in((args, kwargs)) if t.requires_grad and derives_from(t, leaf)]
        if not given:
            return None
        self.is_waiting = False
        whole = self.span is None and all(tensor is leaf for tensor in given)
        inner = {id(t): features if whole else t.detach().requires_grad_() for t in given}
        first = inner[id(given[0])]
        mixed = self.momenta[block](first, as_called(module, args, kwargs, given[0], inner))

        def reach_features() -> Tensor | None:
            if whole:
                return None
            pairs = [(t, inner[id(t)].grad) for t in given if inner[id(t)].grad is not None]
            made, gradients = [t for t, _ in pairs], [gradient for _, gradient in pairs]
            (gradient,) = torch.autograd.grad(made, leaf, gradients, retain_graph=self.span is not None)
            if self.span is None:
                features.backward(gradient)  # pyright: ignore[reportUnknownMemberType]
            return gradient

        self._take_in(block, self._train(block, first, mixed, reach_features))
        if self.span is not None:
            return None
        leaf.requires_grad_(False)
        return mapped(lambda t: t.detach() if id(t) in inner and t is not leaf else t, (args, kwargs))

    def explain(self) -> None:
        """Called while the forward pass fails: add a note to the error if it came between a cut and the next module."""
        error, block = sys.exc_info()[1], self.blocks[self.reached - 1]
        if self.is_waiting and isinstance(error, RuntimeError):
            error.add_note(
                f"localgrad: between the cut {block.name!r} and {block.following[0].name!r}, which momentum copies, "
                "the features require a gradient, and nothing may change them in place: cut after what does "
                "(inplace=True, +=), or give momentum=None"
            )

    def check_whole(self) -> None:
        """Refuse a forward pass that has left out a block."""
        if self.is_waiting or self.reached < len(self.blocks) - 1:
            block = self.blocks[self.reached - self.is_waiting]
            missing = block.following[0] if self.is_waiting else block
            raise LocalGradError(
                f"{missing.name!r} was not run in this forward pass, so a block was not trained: cut around modules "
                "that run for every batch (switch layerdrop off)"
            )

    def _train(
        self, block: int, features: Tensor, mixed: Tensor, reach_features: Callable[[], Tensor | None] = lambda: None
    ) -> Tensor | None:
        """Compute and back-propagate a block's local loss, and update its EMA if the weights that it follows changed.

        Args:
            block: index of the block.
            features: the features before the momentum, which the objective must not change in place.
            mixed: input of the objective: the features, or the output of the momentum.
            reach_features: continues the backward pass from the copies' inputs to the features, and returns the
                gradient there.
        """
        objective: Any = self.objectives[block]
        before, kind = version(features), features.device.type
        try:
            loss = objective(mixed, *self.batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            said = isinstance(error, LocalGradError) and self.batch[0] is not None
            if said or isinstance(error, torch.OutOfMemoryError):
                raise
            raise LocalGradError(self._why(block, mixed, error)) from error
        if version(features) != before:
            raise LocalGradError(
                f"the objective of block {block + 1} changes its features in place, and the next block would get them "
                "changed: start it without inplace=True, or with features.clone()"
            )
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            self.backward(loss)
            gradient = reach_features()
        self.losses.append(loss.detach())
        momentum = self.momenta[block]
        if momentum is not None:
            momentum.follow()
        return gradient

    def _why(self, block: int, features: Tensor, error: Exception) -> str:
        """The message for an objective that failed, with the shapes of its features and targets."""
        targets = self.batch[0]
        if targets is None:
            return (
                f"no targets for the objective of block {block + 1} ({type(error).__name__}): give "
                'isolate(..., targets="labels"), the argument of forward that holds them, or set isolation.targets '
                "before every call of the model"
            )
        shown = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        return (
            f"the objective of block {block + 1} fails on features {tuple(features.shape)} and targets {shown}: "
            f"{' '.join(str(error).split())[:200]}"
        )

    def _take_in(self, block: int, gradient: Tensor | None) -> None:
        """With reach above 1: keep the block's graph for later losses, with the gradient of its own loss."""
        if self.span is not None:
            parameters = [parameter for parameter in self.blocks[block].parameters if parameter.requires_grad]
            self.span.add(parameters, self.entry, self.features, gradient)
            self.entry = self.leaf.requires_grad_()
            if block == len(self.blocks) - 2:
                self.entry.register_post_accumulate_grad_hook(self._end)  # pyright: ignore[reportUnknownMemberType]

    def _end(self, entry: Tensor) -> None:
        """Hook of the last cut's output: pass the gradient of the model's own loss on to the blocks that it reaches."""
        assert self.span is not None
        self.span.end(entry.grad)
        entry.grad = None
