"""The local step: what training by blocks does with one batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.blocks import Block
from localgrad.errors import LocalGradError, of_another_process

MISFITS = ("shapes cannot be multiplied", "must match the size of tensor")
"""What PyTorch says of a layer that gets features of another shape."""


class OutOfMemoryError(LocalGradError, torch.OutOfMemoryError):
    """A block that does not fit into the device's memory; torch's error too, for what makes batches smaller on that."""


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
    EMA of its momentum auxiliary network. All blocks compute with the weights that the batch began with. Gradients
    that were there before, as a batch that failed leaves them, are dropped.

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
        LocalGradError: there is not one optimizer a block, over its parameters, a block is in evaluation mode, or the
            batch does not fit the blocks (a class that does not exist, a batch of one where a norm needs more, another
            dtype, device or shape).
        OutOfMemoryError: a block does not fit into the device's memory; it is torch's error too.
    """
    check_optimizers(blocks, optimizers)
    for index, (block, optimizer) in enumerate(zip(blocks, optimizers, strict=True)):
        block.check_training()
        _check_parameters(index, block, optimizer)
        optimizer.zero_grad(set_to_none=True)
    if step_each_block:

        def update(index: int, loss: Tensor) -> None:
            apply_updates([blocks[index]], [optimizers[index]])

        return local_gradients(blocks, inputs, targets, after_block=update)
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
    after_block: Callable[[int, Tensor], Any] | None = None,
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
    for index, block in enumerate(blocks):
        try:
            with context(index):
                output, loss = block(passed, targets, inputs)
            passed = output.detach()
            del output  # its graph goes with the backward pass
            if on_output is not None and index == len(blocks) - 1:
                on_output(passed)
            (loss if scale == 1.0 else loss * scale).backward()
        except torch.OutOfMemoryError as error:
            names = _inner(block).names
            raise OutOfMemoryError(
                f"block {index + 1} of {len(blocks)} ({names[0]} to {names[-1]}) does not fit into memory "
                f"with {len(inputs)} samples ({'. '.join(str(error).split('. ')[:2])})"
            ) from error
        except (IndexError, ValueError, RuntimeError) as error:
            if of_another_process(error):
                raise
            is_first = index == 0 and features is None
            explained = _explained(error, _inner(block), index, inputs, targets, is_first)
            if explained is None:
                raise
            raise explained from error
        losses.append(loss.detach())
        del loss
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
    if isinstance(blocks, Block) or isinstance(optimizers, Optimizer) or not hasattr(optimizers, "__len__"):
        raise LocalGradError(
            f"blocks is a {type(blocks).__name__} and optimizers a {type(optimizers).__name__}: give two lists, "
            "what `split` gave and one optimizer a block"
        )
    if not len(blocks):
        raise LocalGradError("blocks is empty: give the list that `split` gave")
    if len(optimizers) != len(blocks):
        raise LocalGradError(
            f"{len(optimizers)} optimizers for {len(blocks)} blocks: give one a block, "
            "[SGD(block.trainable_parameters(), lr=0.1) for block in blocks]"
        )


def _check_parameters(index: int, block: Block, optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps what is not its block's, or leaves out what its block would train."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise LocalGradError(
            f"optimizer {index} is a {type(optimizer).__name__}: give a torch optimizer for each block"
        )
    given = {id(parameter) for group in groups for parameter in group["params"]}
    own = {id(parameter): parameter.requires_grad for parameter in block.parameters()}
    foreign = len(given - own.keys())
    missing = sum(trains and key not in given for key, trains in own.items())
    if foreign or missing:
        raise LocalGradError(
            f"optimizer {index} has {foreign} parameters that are not of block {index} and lacks {missing} that are: "
            "give each block an optimizer over its own, as SGD(block.trainable_parameters(), lr=0.1), and what is not "
            "to be trained requires_grad_(False)"
        )


def _inner(block: nn.Module) -> Block:
    """The block in its data-parallel wrapper, or itself."""
    return block.module if isinstance(block, nn.parallel.DistributedDataParallel) else block  # pyright: ignore


def _explained(
    error: Exception, block: Block, index: int, inputs: Tensor, targets: Tensor, is_first: bool
) -> LocalGradError | None:
    """The error of a batch that cannot be trained on, in words of the batch; None for any other."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, LocalGradError):
        return None
    if len(targets) != len(inputs) if targets.ndim and inputs.ndim else targets.ndim != inputs.ndim:
        return LocalGradError(
            f"inputs are {tuple(inputs.shape)} and targets {tuple(targets.shape)}: give one target a sample"
        )
    if "CUDA error" in text:  # every later call fails too, so that nothing can be found out
        if "device-side assert" not in text:
            return None
        return LocalGradError(
            f"the GPU stopped in block {index} or before ({text}); most often a class in targets is not below the "
            "number of classes: CUDA_LAUNCH_BLOCKING=1 shows the place, and the process has to be started again"
        )
    weight = next(block.parameters(), inputs)
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor.device != weight.device:
            return LocalGradError(
                f"{name} are on {tensor.device} and block {index} is on {weight.device}: move them there, "
                f"{name}.to({str(weight.device)!r})"
            )
    if inputs.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        return LocalGradError(
            f"inputs are {inputs.dtype} and the weights of block {index} {weight.dtype}: give inputs.to({weight.dtype})"
        )
    if ("target" in text or "one_hot" in text) and not isinstance(error, IndexError):
        return LocalGradError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)} ({text}): give one class a sample, "
            "(N,) of torch.int64, as targets.long()"
        )
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
    if is_first and _body_fails(block, inputs):
        return LocalGradError(
            f"inputs of shape {tuple(inputs.shape)} do not fit the first block ({block.names[0]} to "
            f"{block.names[-1]}): {text}; give batches of the shape that the model was split for"
        )
    if any(words in text for words in MISFITS):
        return LocalGradError(
            f"features of inputs of shape {tuple(inputs.shape)} do not fit block {index} ({block.names[0]} to "
            f"{block.names[-1]}) or its objective: {text}; give batches of the shape that the model was split for"
        )
    return None


@torch.no_grad()
def _body_fails(block: Block, inputs: Tensor) -> bool:
    """Whether it is the block's body that cannot take the inputs, and not its objective."""
    try:
        block.body(inputs)
    except Exception:  # the one that is being explained, whatever its class
        return True
    return False
