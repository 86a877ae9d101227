"""Errors of a batch, in words of the batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.core.block import Block
from localgrad.errors import LocalGradError

MISFITS = ("shapes cannot be multiplied", "must match the size of tensor")
"""What PyTorch says of a layer that gets features of another shape."""


class OutOfMemoryError(LocalGradError, torch.OutOfMemoryError):
    """A block that does not fit into the device's memory; torch's error too, for what makes batches smaller on that."""


def inner(block: nn.Module) -> Block:
    """The block in its data-parallel wrapper, or itself."""
    return block.module if isinstance(block, nn.parallel.DistributedDataParallel) else block  # pyright: ignore


def explained(
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


def of_another_process(error: Exception) -> bool:
    """Whether torch.distributed says with it that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
