"""The local step: what training by blocks does with one batch."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from localgrad.blocks import Block
from localgrad.errors import LocalGradError


def local_step(
    blocks: Sequence[Block],
    optimizers: Sequence[Optimizer],
    inputs: Tensor,
    targets: Tensor,
    *,
    step_each_block: bool = False,
) -> list[Tensor]:
    """Train every block on one batch.

    For each block: forward on a detached input, backward, drop the graph. Then for each block: its optimizer, and the
    EMA of its momentum auxiliary network. All blocks compute with the weights that the batch began with.

    With `step_each_block` a block's optimizer and EMA follow its own backward pass at once, and its gradients are freed
    before the next block starts, so that gradients of one block live at a time. The weights come out the same, bit for
    bit: no block reads the weights of a block before it, and block j's EMA reads block j + 1, which has not stepped
    yet. What differs is a batch that fails in the middle: blocks before the one that failed have stepped.

    Args:
        blocks: what `split` gave, in training mode.
        optimizers: one a block, over `block.trainable_parameters()`.
        inputs: `(N, 3, H, W)`, or what the model takes.
        targets: `(N,)` classes, or what the objectives and the criterion take.
        step_each_block: see above.

    Returns:
        One detached scalar loss a block.

    Raises:
        LocalGradError: there is not one optimizer a block, a block is in evaluation mode, or the batch does not fit the
            blocks (a class that does not exist, a batch of one where a norm needs more).
    """
    check_optimizers(blocks, optimizers)
    if step_each_block:

        def update(index: int, loss: Tensor) -> None:
            apply_updates([blocks[index]], [optimizers[index]])

        return local_gradients(blocks, inputs, targets, after_block=update)
    losses = local_gradients(blocks, inputs, targets)
    apply_updates(blocks, optimizers)
    return losses


def local_gradients(
    blocks: Sequence[Block],
    inputs: Tensor,
    targets: Tensor,
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    scale: float = 1.0,
    after_block: Callable[[int, Tensor], Any] | None = None,
) -> list[Tensor]:
    """The first half of `local_step`: add the gradients of every block's loss, times `scale`, to its parameters.

    `after_block(index, loss)` is called when a block has its gradients, before the next block starts.
    """
    features, losses = inputs, []
    for index, block in enumerate(blocks):
        block.check_training()
        try:
            features, loss = block(features.detach(), targets, inputs)
        except (IndexError, ValueError) as error:
            raise _explained(error, index, inputs, targets) from error
        backward(loss if scale == 1.0 else loss * scale)
        losses.append(loss.detach())
        if after_block is not None:
            after_block(index, losses[-1])
    return losses


def apply_updates(blocks: Sequence[Block], optimizers: Sequence[Optimizer]) -> None:
    """The second half of `local_step`: step each block's optimizer and pull its EMA; gradients are freed.

    Block j's EMA reads block j + 1 before that block's optimizer has stepped: the weights that the batch began with.
    """
    check_optimizers(blocks, optimizers)
    for block, optimizer in zip(blocks, optimizers, strict=True):
        optimizer.step()
        block.update_momentum()
        optimizer.zero_grad(set_to_none=True)


def check_optimizers(blocks: Sequence[Block], optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that are not one a block."""
    if len(optimizers) != len(blocks):
        raise LocalGradError(
            f"{len(optimizers)} optimizers for {len(blocks)} blocks: give one a block, "
            "[SGD(block.trainable_parameters(), lr=0.1) for block in blocks]"
        )


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
