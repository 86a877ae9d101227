"""The local step: train all blocks on one batch."""

# pyright: reportUnnecessaryIsInstance=false

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
from localgrad.errors import LocalGradError, SettingsError, warn

Context = Callable[[int], AbstractContextManager[Any]]
Backward = Callable[[Tensor], Any]
Step = Callable[[Optimizer], Any]

SUMMED = (
    "optimizers wait for a later batch, and the gradients of batches are summed: divide the losses as you divide your "
    "own, backward=lambda loss: (loss / n).backward(), or backward=accelerator.backward"
)

UPSTREAM = (
    "inputs are computed by something that requires a gradient, and a local step gives it none, so it is not trained: "
    "give inputs.detach(), or split a model that begins with it"
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

    Each block in turn runs forward on a detached input and backward, which frees its graph. After all blocks, each
    block's optimizers step, and the EMA of its momentum auxiliary network is updated. So all blocks compute with the
    weights that they have when the batch begins.

    The step adds to gradients that are there when it begins, as `backward` does, and warns if no local step left them.
    Optimizers that wait for a later batch (Accelerate's `accumulate`) keep the gradients; a block's EMA is updated when
    its optimizers step. A batch that fails leaves no gradients.

    With `step_each_block` a block's optimizers and EMA follow its own backward pass at once, and its gradients are
    freed before the next block starts, so that memory holds the gradients of one block at a time. The weights come out
    the same, bit for bit: no block reads the weights of a block before it, and block j's EMA reads block j + 1, which
    has not stepped yet. But if a batch fails in a block, the blocks before it have stepped.

    With `parts` each block takes the batch in micro-batches, one after another, before the next block starts. Memory
    holds the activations of one micro-batch in one block, and the features of the whole batch at one cut. The loss is
    the mean over the batch: a micro-batch is weighted by its share of the samples. Batch norms, and losses that compare
    samples (PredSim's, contrast), see one micro-batch at a time.

    With `reach` above 1 a loss also trains the blocks before its own: block j gets
    `sum of dL_i / dtheta_j, i = j..min(j + reach - 1, K)`. Its graph, without that of its auxiliary network, is kept
    for the last of these losses, so that memory holds the graphs of `reach` bodies. `reach=2` costs one more backward
    pass per body, for the gradient of its input; `reach=K` is end-to-end training with deep supervision. With
    `step_each_block` a block steps when the last loss that reaches it has been back-propagated, and memory holds the
    gradients of `reach` blocks. With `parts` one micro-batch passes all blocks before the next starts, so that memory
    holds the graphs of one micro-batch.

    GradScaler, Fabric and Accelerate are used through `backward` and `step`:
    `local_step(..., backward=lambda loss: scaler.scale(loss).backward(), step=scaler.step); scaler.update()`,
    `backward=fabric.backward`, `backward=accelerator.backward`. Clip gradients in `step`, one block at a time.

    Args:
        blocks: the blocks from `split`, in training mode, each wrapped for data parallelism or compiled if you like.
        optimizers: for each block an optimizer over `block.trainable_parameters()`, or a sequence of optimizers with
            disjoint parameters, or None for a block that trains nothing.
        inputs: `(N, 3, H, W)`, or the shape that the model takes.
        targets: targets for the objectives and the criterion: classes `(N,)`, a tree of tensors, or None. With `parts`,
            tensors with N samples are split, and everything else goes to each micro-batch.
        step_each_block: whether each block steps before the next block starts, see above.
        parts: number of micro-batches, at most one per sample.
        reach: number of blocks that a loss trains, its own included.
        context: called with a block's index; returns the context of its forward pass, as
            `lambda index: torch.autocast("cuda")`. With one autocast around the whole step the backward passes run
            under autocast too, which PyTorch advises against.
        backward: back-propagates a loss.
        step: steps an optimizer.

    Returns:
        One detached scalar loss for each block; 0 for a block that trains nothing, unless it is the last.

    Raises:
        LocalGradError: optimizers do not have their blocks' parameters, or need a closure; a block is in evaluation
            mode, or no longer the model's; the batch does not fit the blocks (a class that does not exist, a batch of
            one where a norm needs more, another dtype, device or shape).
        OutOfMemoryError: a block does not fit into the device's memory. It is a `torch.OutOfMemoryError` too.
    """
    check_reach(reach)
    check_step(blocks, optimizers)
    if backward is BACKWARD and any(inner(block).waits for block in blocks):
        warn(SUMMED)

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
    """The first half of `local_step`: add the gradients of every block's loss, times `scale`, to `.grad`.

    Args:
        blocks: all blocks or consecutive ones, each wrapped for data parallelism if you like.
        inputs: `(N, 3, H, W)`.
        targets: as in `local_step`.
        features: input of the first of these blocks; `inputs` if None.
        scale: factor of every loss, for a part of a batch.
        parts: as in `local_step`.
        context: called with a block's index among these blocks; returns the context of its forward pass.
        backward: back-propagates a loss.
        on_output: called with the last block's detached output before that block's backward pass begins.
        after_block: called with a block's index and its loss when its gradients are complete, before the next block.
        reach: number of blocks that a loss trains, its own included, as in `local_step`. A block's gradients are
            complete `reach - 1` blocks later, those of the last `reach` blocks together.

    Returns:
        One detached scalar loss for each block, without `scale`.
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
    """Run one micro-batch forward and backward through one block.

    `place` is a list of features and a position in it. Before the backward pass the block's input there is replaced by
    its detached output. The list holds the only reference to the input, which is then freed with the graph.

    Returns:
        The detached loss, and the indices of the blocks whose gradients are complete now. None stands for this block.
    """
    passed, number = place
    with context:
        output, loss, *leaf = block(passed[number], targets, inputs, **({} if span is None else {"cut_loss": True}))
    torch.clear_autocast_cache()  # under one autocast around the step, casts of all blocks' weights would stay alive
    waiting = None if span is None else (passed[number], output)
    passed[number] = output.detach()
    if on_output is not None:
        on_output(passed[number])
    del output  # then the backward pass frees its graph, unless a later loss reaches this block
    _check_loss(loss, inner(block))
    if loss.requires_grad:
        backward(loss)
    if span is None or waiting is None:
        return loss.detach(), None
    trained = [parameter for parameter in inner(block).body.parameters() if parameter.requires_grad]
    done = span.add(trained, *waiting, leaf[0].grad)
    passed[number].requires_grad_(passed[number].is_floating_point())  # a leaf, for the next block's input gradient
    return loss.detach(), done


def _micro_batches(
    inputs: Any, targets: Any, features: Tensor | None, parts: int
) -> tuple[Tensor, list[tuple[Tensor, Any]], list[Any]]:
    """The detached inputs, their micro-batches with targets, and the micro-batches of the first block's features."""
    _check_batch(inputs, parts)
    if inputs.requires_grad and inputs.grad_fn is not None:
        warn(UPSTREAM)
    inputs = inputs.detach() if inputs.requires_grad else inputs
    entry = inputs if features is None else features
    parts = min(parts, len(inputs))
    if parts == 1:  # the tensors themselves, not views of them
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
    """The second half of `local_step`: step each block's optimizers, free its gradients and update its EMA.

    Block j's EMA reads block j + 1 before that block's optimizers step, so it reads the weights of the forward pass.
    If optimizers neither change a weight nor free its gradient (gradient accumulation), the EMA is not updated.
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
