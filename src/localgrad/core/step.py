"""The local step: what training by blocks does with one batch."""

# pyright: reportUnnecessaryIsInstance=false

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.core.block import Block
from localgrad.core.checks import Optimizers, check_optimizers, check_step, inner, of_block
from localgrad.core.explain import explaining
from localgrad.core.local_pass import BACKWARD
from localgrad.core.reach import Span, check_reach
from localgrad.core.trees import batch_parts
from localgrad.core.versions import version
from localgrad.errors import LocalGradError, LocalGradWarning, SettingsError

Context = Callable[[int], AbstractContextManager[Any]]
Backward = Callable[[Tensor], Any]
Step = Callable[[Optimizer], Any]

SUMMED = (
    "optimizers wait for a later batch, and the gradients of batches are summed: divide the losses as you divide your "
    "own, backward=lambda loss: (loss / n).backward(), or backward=accelerator.backward"
)


def local_step(
    blocks: Sequence[nn.Module],
    optimizers: Sequence[Optimizers],
    inputs: Tensor,
    targets: Any = None,
    *,
    step_each_block: bool = False,
    parts: int = 1,
    reach: int = 1,
    context: Context = nullcontext,
    backward: Backward = BACKWARD,
    step: Step = methodcaller("step"),
) -> list[Tensor]:
    """Train every block on one batch.

    For each block: forward on a detached input, backward, drop the graph. Then for each block: its optimizers, and the
    EMA of its momentum auxiliary network. All blocks compute with the weights that the batch began with.

    Gradients that are there when it begins count: the step adds to them, as `backward` does, and warns where it did not
    leave them itself. Optimizers that wait for a later batch (Accelerate's `accumulate`) may keep theirs: a block moves
    its EMA when its optimizers step. A batch that fails leaves no gradients.

    With `step_each_block` a block's optimizers and EMA follow its own backward pass at once, and its gradients are
    freed before the next block starts, so that gradients of one block live at a time. The weights come out the same,
    bit for bit: no block reads the weights of a block before it, and block j's EMA reads block j + 1, which has not
    stepped yet. What differs is a batch that fails in the middle: blocks before the one that failed have stepped.

    With `parts` the batch passes each block in so many micro-batches, one after another, before the next block starts:
    the activations of one micro-batch in one block live at a time, and the features of the whole batch at one cut. The
    loss is the mean over the batch: each part's counts by its share of the samples. Batch norms see a part at a time,
    and so do losses that compare samples (PredSim's, contrast).

    With `reach` above 1 a loss trains the blocks before its own too: block j gets
    `sum of dL_i / dtheta_j, i = j..min(j + reach - 1, K)`. Its graph, without that of its auxiliary network, waits for
    the last of these losses; `reach` bodies' graphs are alive at a time. `reach=2` costs one more pass for the input's
    gradient a body; `reach=K` is end-to-end training with deep supervision. With `step_each_block` a block steps when
    the last loss that reaches it has been back-propagated, and gradients of `reach` blocks live at a time. With
    `parts` each micro-batch passes all blocks before the next, so that graphs of one are alive.

    A scaler, Fabric or Accelerate take part by two functions:
    `local_step(..., backward=lambda loss: scaler.scale(loss).backward(), step=scaler.step); scaler.update()`,
    `backward=fabric.backward`, `backward=accelerator.backward`. Gradients are clipped in `step`, a block at a time.

    Args:
        blocks: what `split` gave, in training mode, each in a data-parallel wrapper or compiled if wanted.
        optimizers: for each block one over `block.trainable_parameters()`, or a sequence that shares them, or None
            where nothing is trained.
        inputs: `(N, 3, H, W)`, or what the model takes.
        targets: what the objectives and the criterion take: classes `(N,)`, a tree of tensors, or None. In parts,
            tensors of N samples are parted and all else goes to each part.
        step_each_block: see above.
        parts: number of micro-batches; where there are fewer samples, one each.
        reach: number of blocks that a loss trains, its own included.
        context: what a block's forward pass runs in, by its place, as `lambda index: torch.autocast("cuda")`. Under one
            autocast around the step the backward passes run in it too, which PyTorch advises against.
        backward: what back-propagates a loss.
        step: what steps an optimizer.

    Returns:
        One detached scalar loss a block; 0 for a block that trains nothing, unless it is the last.

    Raises:
        LocalGradError: optimizers do not have their blocks' parameters, or need a closure; a block is in evaluation
            mode, or no longer the model's; the batch does not fit the blocks (a class that does not exist, a batch of
            one where a norm needs more, another dtype, device or shape).
        OutOfMemoryError: a block does not fit into the device's memory; it is torch's error too.
    """
    check_reach(reach)
    check_step(blocks, optimizers)
    if backward is BACKWARD and any(inner(block).waits for block in blocks):
        warnings.warn(SUMMED, LocalGradWarning, stacklevel=2)

    def update(index: int, loss: Tensor) -> None:
        apply_updates([blocks[index]], [optimizers[index]], step)

    after_block = update if step_each_block else None
    with _freed_on_failure(blocks):
        losses = local_gradients(
            blocks,
            inputs,
            targets,
            parts=parts,
            context=context,
            backward=backward,
            after_block=after_block,
            reach=reach,
        )
        if not step_each_block:
            apply_updates(blocks, optimizers, step)
    return losses


@contextmanager
def _freed_on_failure(blocks: Sequence[nn.Module]) -> Generator[None, None, None]:
    """Context: a batch that fails or is interrupted leaves no gradients for the next one to add to."""
    try:
        yield
    except BaseException:
        for block in blocks:
            block.zero_grad(set_to_none=True)
            inner(block).accumulates = False
        raise


def local_gradients(
    blocks: Sequence[nn.Module],
    inputs: Tensor,
    targets: Any = None,
    *,
    features: Tensor | None = None,
    scale: float = 1.0,
    parts: int = 1,
    context: Context = nullcontext,
    backward: Backward = BACKWARD,
    on_output: Callable[[Tensor], Any] | None = None,
    after_block: Callable[[int, Tensor], Any] | None = None,
    reach: int = 1,
) -> list[Tensor]:
    """The first half of `local_step`: add the gradients of every block's loss, times `scale`, to its parameters.

    Args:
        blocks: all of them, or a run of them, or a data-parallel wrapper around each.
        inputs: `(N, 3, H, W)`.
        targets: as in `local_step`.
        features: what the first of these blocks gets; the inputs if not given.
        scale: factor of every loss, for a part of a batch.
        parts: as in `local_step`.
        context: what a block's forward pass runs in, such as autocast, by its place among these blocks.
        backward: what back-propagates a loss.
        on_output: called with the last block's detached output before that block's backward pass begins.
        after_block: called with a block's place and its loss when it has its gradients, before the next block starts.
        reach: number of blocks that a loss trains, its own included, as in `local_step`; blocks have their gradients
            `reach - 1` blocks later, the last `reach` of them together.

    Returns:
        One detached scalar loss a block, not scaled.
    """
    inputs, batch, passed = _micro_batches(inputs, targets, features, parts)
    parts = len(batch)
    spans = [Span(reach, len(blocks)) for _ in batch] if reach > 1 else []
    places, numbers = range(len(blocks)), range(parts)
    order = [(i, n) for i in places for n in numbers] if reach == 1 else [(i, n) for n in numbers for i in places]
    losses: list[Tensor] = [torch.empty(0)] * len(blocks)
    with _freed_on_failure(blocks):
        for index, number in order:
            block, (part, part_targets) = blocks[index], batch[number]
            inner(block).accumulates = True
            is_first, is_last, share = (
                index == 0 and features is None,
                index == len(blocks) - 1,
                len(part) / len(inputs),
            )
            with explaining(inner(block), index, len(blocks), part, part_targets, is_first), ExitStack() as no_sync:
                if number < parts - 1 and isinstance(block, nn.parallel.DistributedDataParallel):
                    no_sync.enter_context(block.no_sync())
                factor = scale if parts == 1 else scale * share
                loss, done = _pass(
                    block,
                    (passed, number),
                    part_targets,
                    part,
                    context=context(index),
                    backward=backward if factor == 1.0 else lambda loss, factor=factor: backward(loss * factor),
                    on_output=on_output if is_last else None,
                    span=spans[number] if spans else None,
                )
            loss = loss if parts == 1 else loss * share
            losses[index] = loss if number == 0 else losses[index] + loss
            for place in [index] if done is None else done:
                if after_block is not None and number == parts - 1:
                    after_block(place, losses[place])
    return losses


def _pass(
    block: nn.Module,
    place: tuple[list[Any], int],
    targets: Any,
    inputs: Tensor,
    *,
    context: AbstractContextManager[Any],
    backward: Backward,
    on_output: Callable[[Tensor], Any] | None,
    span: Span | None,
) -> tuple[Tensor, Sequence[int] | None]:
    """One micro-batch forward and backward through one block.

    The features in `place`, a list and a position, are exchanged for those after the block before the backward pass:
    nobody else holds them, so that they go with the graph.

    Returns:
        The detached loss, and the places of the blocks that have their gradients; None for this one.
    """
    passed, number = place
    with context:
        output, loss, *leaf = block(passed[number], targets, inputs, **({} if span is None else {"cut_loss": True}))
    torch.clear_autocast_cache()  # one autocast around the step would keep the casts of all blocks' weights
    waiting = None if span is None else (passed[number], output)
    passed[number] = output.detach()
    if on_output is not None:
        on_output(passed[number])
    del output  # its graph goes with the backward pass, where no later loss reaches it
    _check_loss(loss, inner(block))
    if loss.requires_grad:
        backward(loss)
    if span is None or waiting is None:
        return loss.detach(), None
    trained = [parameter for parameter in inner(block).body.parameters() if parameter.requires_grad]
    done = span.add(trained, *waiting, leaf[0].grad)
    passed[number].requires_grad_(passed[number].is_floating_point())  # the next block's entry
    return loss.detach(), done


def _micro_batches(
    inputs: Any, targets: Any, features: Tensor | None, parts: int
) -> tuple[Tensor, list[tuple[Tensor, Any]], list[Any]]:
    """The detached inputs, their micro-batches with targets, and the micro-batches of the first block's features."""
    _check_batch(inputs, parts)
    inputs = inputs.detach() if inputs.requires_grad else inputs
    entry = inputs if features is None else features
    parts = min(parts, len(inputs))
    if parts == 1:  # what was given itself, and not a view of it
        return inputs, [(inputs, targets)], [entry]
    batch = zip(inputs.tensor_split(parts), batch_parts(targets, len(inputs), parts), strict=True)
    return inputs, list(batch), list(entry.tensor_split(parts))


def _check_batch(inputs: Any, parts: int) -> None:
    if not isinstance(inputs, Tensor):
        raise LocalGradError(
            f"inputs are a {type(inputs).__name__}: give a tensor (N, ...), as torch.as_tensor(array) makes it"
        )
    if inputs.numel() == 0:
        raise LocalGradError(f"inputs are {tuple(inputs.shape)}: an empty batch has no loss; leave it out")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise SettingsError(f"parts is {parts!r}: it is a number of micro-batches, 1 for the whole batch at once")


def _check_loss(loss: Any, block: Block) -> None:
    """Refuse a loss that is no scalar, or that has no gradient while the block has parameters to train."""
    names = f"{block.names[0]}..{block.names[-1]}"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LocalGradError(
            f"the loss of block {names} is {given}: give a criterion or an objective whose loss is one number, such as "
            'nn.CrossEntropyLoss(reduction="mean")'
        )
    if not loss.requires_grad and block.trainable_parameters():
        raise LocalGradError(
            f"the loss of block {names} has no gradient, and the block has parameters to train: its objective or "
            "criterion detaches it, or works under no_grad"
        )


def apply_updates(
    blocks: Sequence[nn.Module], optimizers: Sequence[Optimizers], step: Step = methodcaller("step")
) -> None:
    """The second half of `local_step`: step each block's optimizers and pull its EMA; gradients are freed.

    Block j's EMA reads block j + 1 before that block's optimizers have stepped: the weights that the batch began with.
    Optimizers that neither move a weight nor free its gradient wait for a later batch, and so does the EMA.
    """
    check_optimizers(blocks, optimizers)
    for index, (block, given) in enumerate(zip(blocks, optimizers, strict=True)):
        own, of = inner(block), of_block(given)
        held = next((p for o in of for group in o.param_groups for p in group["params"] if p.grad is not None), None)
        before = None if held is None else version(held)
        for optimizer in of:
            try:
                step(optimizer)
            except (AssertionError, TypeError) as error:
                raise SettingsError(
                    f"the step of block {index}'s {type(optimizer).__name__} failed ({' '.join(str(error).split())}): "
                    "a local step calls step() without a closure; give an optimizer that needs none, as SGD or AdamW"
                ) from error
        for optimizer in of:
            optimizer.zero_grad(set_to_none=True)
        own.waits = own.accumulates = held is not None and held.grad is not None and version(held) == before
        if not own.accumulates:
            own.update_momentum()
