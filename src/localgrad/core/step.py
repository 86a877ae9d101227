"""The local step: what training by blocks does with one batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.core.block import Block
from localgrad.core.checks import check_optimizers, check_parameters
from localgrad.core.explain import OutOfMemoryError, explained, inner, of_another_process
from localgrad.core.reach import Span, check_reach
from localgrad.errors import LocalGradError


def local_step(
    blocks: Sequence[Block],
    optimizers: Sequence[Optimizer],
    inputs: Tensor,
    targets: Tensor,
    *,
    step_each_block: bool = False,
    reach: int = 1,
) -> list[Tensor]:
    """Train every block on one batch.

    For each block: forward on a detached input, backward, drop the graph. Then for each block: its optimizer, and the
    EMA of its momentum auxiliary network. All blocks compute with the weights that the batch began with. Gradients
    that were there before, as a batch that failed leaves them, are dropped.

    With `step_each_block` a block's optimizer and EMA follow its own backward pass at once, and its gradients are freed
    before the next block starts, so that gradients of one block live at a time. The weights come out the same, bit for
    bit: no block reads the weights of a block before it, and block j's EMA reads block j + 1, which has not stepped
    yet. What differs is a batch that fails in the middle: blocks before the one that failed have stepped.

    With `reach` above 1 a loss trains the blocks before its own too: block j gets
    `sum of dL_i / dtheta_j, i = j..min(j + reach - 1, K)`. Its graph, without that of its auxiliary network, waits for
    the last of these losses; `reach` bodies' graphs are alive at a time. `reach=2` costs one more pass for the input's
    gradient a body; `reach=K` is end-to-end training with deep supervision. With `step_each_block` a block steps when
    the last loss that reaches it has been back-propagated, and gradients of `reach` blocks live at a time.

    Args:
        blocks: what `split` gave, in training mode.
        optimizers: one a block, over `block.trainable_parameters()`.
        inputs: `(N, 3, H, W)`, or what the model takes.
        targets: `(N,)` classes, or what the objectives and the criterion take.
        step_each_block: see above.
        reach: number of blocks that a loss trains, its own included.

    Returns:
        One detached scalar loss a block.

    Raises:
        LocalGradError: there is not one optimizer a block, over its parameters, a block is in evaluation mode, or the
            batch does not fit the blocks (a class that does not exist, a batch of one where a norm needs more, another
            dtype, device or shape).
        OutOfMemoryError: a block does not fit into the device's memory; it is torch's error too.
    """
    check_reach(reach)
    check_optimizers(blocks, optimizers)
    for index, (block, optimizer) in enumerate(zip(blocks, optimizers, strict=True)):
        block.check_training()
        check_parameters(index, block, optimizer)
        optimizer.zero_grad(set_to_none=True)
    if step_each_block:

        def update(index: int, loss: Tensor) -> None:
            apply_updates([blocks[index]], [optimizers[index]])

        return local_gradients(blocks, inputs, targets, after_block=update, reach=reach)
    losses = local_gradients(blocks, inputs, targets, reach=reach)
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
    after_block: Callable[[int, Tensor], Any] | None = None,
    reach: int = 1,
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
        after_block: called with a block's place and its loss when it has its gradients, before the next block starts.
        reach: number of blocks that a loss trains, its own included, as in `local_step`; blocks have their gradients
            `reach - 1` blocks later, the last `reach` of them together.

    Returns:
        One detached scalar loss a block, not scaled.
    """
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        kinds = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise LocalGradError(f"inputs and targets are {kinds}: give two tensors, as torch.as_tensor(array) makes them")
    if inputs.numel() == 0:
        raise LocalGradError(f"inputs are {tuple(inputs.shape)}: an empty batch has no loss; leave it out")
    inputs = inputs.detach() if inputs.requires_grad else inputs
    passed, losses = inputs if features is None else features, []
    span = Span(reach, len(blocks))
    for index, block in enumerate(blocks):
        try:
            with context(index):
                output, loss, *leaf = block(passed, targets, inputs, **({} if reach == 1 else {"cut_loss": True}))
            entry, passed = passed if reach > 1 else None, output.detach()
            if on_output is not None and index == len(blocks) - 1:
                on_output(passed)
            if reach == 1:
                del output  # its graph goes with the backward pass
            (loss if scale == 1.0 else loss * scale).backward()
            done = range(index, index + 1)
            if entry is not None:
                trained = [parameter for parameter in inner(block).body.parameters() if parameter.requires_grad]
                done = span.add(trained, entry, output, leaf[0].grad)
                passed.requires_grad_(passed.is_floating_point())  # the next block's entry
                del output, leaf, entry
        except torch.OutOfMemoryError as error:
            names = inner(block).names
            raise OutOfMemoryError(
                f"block {index + 1} of {len(blocks)} ({names[0]} to {names[-1]}) does not fit into memory "
                f"with {len(inputs)} samples ({'. '.join(str(error).split('. ')[:2])})"
            ) from error
        except (IndexError, ValueError, RuntimeError) as error:
            if of_another_process(error):
                raise
            is_first = index == 0 and features is None
            found = explained(error, inner(block), index, inputs, targets, is_first)
            if found is None:
                raise
            raise found from error
        losses.append(loss.detach())
        del loss
        for place in done if after_block is not None else ():
            after_block(place, losses[place])
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
