"""The local step: what training by blocks does with one batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.blocks import Block
from localgrad.errors import LocalGradError


def local_step(
    blocks: Sequence[Block], optimizers: Sequence[Optimizer], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """Train every block on one batch.

    For each block: forward on a detached input, backward, drop the graph. Then for each block: its optimizer, and the
    EMA of its momentum auxiliary network. All blocks compute with the weights that the batch began with.

    Args:
        blocks: what `split` gave, in training mode.
        optimizers: one a block, over `block.trainable_parameters()`.
        inputs: `(N, 3, H, W)`, or what the model takes.
        targets: `(N,)` classes, or what the objectives and the criterion take.

    Returns:
        One detached scalar loss a block.

    Raises:
        LocalGradError: there is not one optimizer a block, a block is in evaluation mode, or the batch does not fit the
            blocks (a class that does not exist, a batch of one where a norm needs more).
    """
    for block in blocks:
        block.check_training()
    losses = local_gradients(blocks, inputs, targets)
    apply_updates(blocks, optimizers)
    return losses


def local_gradients(
    blocks: Sequence[nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    features: Tensor | None = None,
    scale: float = 1.0,
    context: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    on_output: Callable[[Tensor], Any] | None = None,
) -> list[Tensor]:
    """The first half of `local_step`: add the gradients of every block's loss, times `scale`, to its parameters.

    Args:
        blocks: all of them, or a run of them, or a data-parallel wrapper around each.
        inputs: `(N, 3, H, W)`.
        targets: `(N,)`.
        features: what the first of these blocks gets; the inputs if not given.
        scale: factor of every loss, for a part of a batch.
        context: what a block's forward pass runs in, such as autocast, by its place among these blocks.
        on_output: called with the last block's detached output before that block's backward pass begins.

    Returns:
        One detached scalar loss a block, not scaled.
    """
    passed, losses = inputs if features is None else features, []
    for index, block in enumerate(blocks):
        try:
            with context(index):
                output, loss = block(passed, targets, inputs)
        except (IndexError, ValueError) as error:
            raise _explained(error, index, inputs, targets) from error
        passed = output.detach()
        del output  # its graph goes with the backward pass
        if on_output is not None and index == len(blocks) - 1:
            on_output(passed)
        (loss if scale == 1.0 else loss * scale).backward()
        losses.append(loss.detach())
        del loss
    return losses


def apply_updates(blocks: Sequence[Block], optimizers: Sequence[Optimizer]) -> None:
    """The second half of `local_step`: step each block's optimizer and pull its EMA; gradients are freed.

    Block j's EMA reads block j + 1 before that block's optimizer has stepped: the weights that the batch began with.
    """
    if len(optimizers) != len(blocks):
        raise LocalGradError(
            f"{len(optimizers)} optimizers for {len(blocks)} blocks: give one a block, "
            "[SGD(block.trainable_parameters(), lr=0.1) for block in blocks]"
        )
    for block, optimizer in zip(blocks, optimizers, strict=True):
        optimizer.step()
        block.update_momentum()
        optimizer.zero_grad(set_to_none=True)


def _explained(error: Exception, index: int, inputs: Tensor, targets: Tensor) -> Exception:
    """The error of a batch that cannot be trained on, in words of the batch; any other as it is."""
    text = str(error)
    if isinstance(error, IndexError) and "out of bounds" in text and not targets.is_floating_point():
        return LocalGradError(
            f"targets hold classes {int(targets.min())} to {int(targets.max())}, and one of them is not among the "
            f"classes of block {index} ({text}): build model and objective with num_classes above every label"
        )
    if "more than 1 value per channel" in text:
        return LocalGradError(
            f"a batch of {inputs.shape[0]} leaves a batch norm of block {index} one value a channel ({text}): "
            "give at least two samples; a loader's drop_last=True leaves out a last batch of one"
        )
    return error
