"""Explain why a batch fails in a block, from the values of batch and block, not from the text of PyTorch's error."""

import traceback
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.core.block import Block
from localgrad.core.trees import leaves
from localgrad.core.wording import is_peer_failure
from localgrad.errors import DoesNotFitError, LocalGradError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DEVICE_ASSERT = 710
"""CUDA's error code for a failed assertion in a kernel, such as a class index out of range."""


class OutOfMemoryError(DoesNotFitError, torch.OutOfMemoryError):
    """A block does not fit into the device's memory. Loops that catch `torch.OutOfMemoryError` catch this too."""


@contextmanager
def explaining(
    block: Block, index: int, num_blocks: int, inputs: Tensor, targets: Any, first: bool
) -> Generator[None, None, None]:
    """Context: an error inside names the block and, if the values show it, what about the batch does not fit.

    Args:
        block: the block that runs inside.
        index: index of the block.
        num_blocks: number of blocks.
        inputs: the batch's inputs.
        targets: the batch's targets.
        first: whether the block's features are the inputs.
    """
    names = f"{block.names[0]} to {block.names[-1]}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"block {index + 1} of {num_blocks} ({names}) does not fit into memory with {len(inputs)} samples "
            f"({'. '.join(str(error).split('. ')[:2])})"
        ) from error
    except (IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, LocalGradError) or is_peer_failure(error):
            raise
        reason = _stopped(error, index)
        if reason is None and not isinstance(error, torch.AcceleratorError):
            reason = _misfit(error, block, index, inputs, targets, first)
        own = block.objective if hasattr(block.objective, "criterion") else None
        if reason is None and own is not None and _is_inside(error, own):
            reason = _objective_fails(index, targets)
        if reason is None:
            error.add_note(f"in block {index} of {num_blocks} ({names}), with inputs of shape {tuple(inputs.shape)}")
            raise
        raise LocalGradError(f"{reason} ({' '.join(str(error).split())[:200]})") from error


def _stopped(error: Exception, index: int) -> str | None:
    """The message for a failed assertion in a CUDA kernel, else None. Later CUDA calls fail: no value can be read."""
    if not isinstance(error, torch.AcceleratorError) or getattr(error, "error_code", None) != DEVICE_ASSERT:
        return None
    return (
        f"the GPU stopped in block {index} or before; most often a class in targets is not below the number of "
        "classes: CUDA_LAUNCH_BLOCKING=1 shows the place, and the process has to be started again"
    )


def _misfit(error: Exception, block: Block, index: int, inputs: Tensor, targets: Any, first: bool) -> str | None:
    """The message for a batch that does not fit the block; None if the values do not show a reason."""
    labels = [leaf for leaf in leaves(targets) if isinstance(leaf, Tensor)]
    for tensor in labels:
        if tensor.shape[:1] != inputs.shape[:1]:
            shapes = f"inputs are {tuple(inputs.shape)} and targets {tuple(tensor.shape)}"
            return f"{shapes}: give one target a sample"
    weights = [parameter for parameter in block.parameters() if parameter.is_floating_point()]
    given = [("inputs", inputs), *(("targets", tensor) for tensor in labels)]
    for name, tensor in given if weights else ():
        if tensor.device != weights[0].device:
            return (
                f"{name} are on {tensor.device} and block {index} is on {weights[0].device}: move them there, "
                f"{name}.to({str(weights[0].device)!r})"
            )
    dtypes = {weight.dtype for weight in weights}
    autocast = bool(weights) and torch.is_autocast_enabled(weights[0].device.type)
    if dtypes and inputs.is_floating_point() and inputs.dtype not in dtypes and not autocast:
        return (
            f"inputs are {inputs.dtype} and the weights of block {index} {weights[0].dtype}: "
            f"give inputs.to({weights[0].dtype})"
        )
    integers = first and bool(dtypes) and not inputs.is_floating_point() and _body_fails(block, inputs)
    if integers and not _body_fails(block, inputs.to(weights[0].dtype)):
        return (
            f"inputs are {inputs.dtype} and the weights of block {index} {weights[0].dtype}, which its first "
            f"layer asks for: give inputs.to({weights[0].dtype})"
        )
    if block.takes is not None and inputs.shape[1:] != block.takes and _is_of_shapes(error, block, inputs, first):
        return (
            f"inputs are {tuple(inputs.shape)} and the model was split for (N, {', '.join(map(str, block.takes))}): "
            f"block {index} ({block.names[0]} to {block.names[-1]}) or its objective takes no other shape; "
            "give batches of that shape, or another objective"
        )
    return _label_misfit(error, block, index, inputs, labels)


def _label_misfit(error: Exception, block: Block, index: int, inputs: Tensor, labels: list[Tensor]) -> str | None:
    classes = [tensor for tensor in labels if tensor.numel() and not tensor.is_floating_point()]
    if isinstance(error, IndexError) and classes:  # raised by indexing with a class that does not exist
        low, high = int(classes[0].min()), int(classes[0].max())
        return (
            f"targets hold classes {low} to {high}, and one of them is not among the classes of block {index}: build "
            "model and objective with num_classes above every label, or give a criterion that ignores it"
        )
    if one_value_a_channel(error, [block], len(inputs)):
        return (
            f"a batch of 1 leaves a batch norm of block {index} one value a channel: give at least two samples; "
            "a loader's drop_last=True leaves out a last batch of one"
        )
    if block.criterion is torch.nn.functional.cross_entropy and labels:
        return (
            f"targets are {labels[0].dtype} of shape {tuple(labels[0].shape)} under softmax cross-entropy, of block "
            f"{index}: give one class a sample, (N,) of torch.int64, as targets.long(), or probabilities (N, C)"
        )
    return None


def _objective_fails(index: int, targets: Any) -> str:
    shown = [f"{each.dtype} {tuple(each.shape)}" for each in leaves(targets) if isinstance(each, Tensor)]
    return (
        f"the objective of block {index} fails on targets {', '.join(shown) or type(targets).__name__}: give it a "
        "criterion= of its own, or take an objective that keeps places apart (localgrad.dense, localgrad.readout)"
    )


def _is_inside(error: Exception, module: nn.Module) -> bool:
    """Whether the error was raised in a method of this module, or in a call from one."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_locals.get("self") is module for frame, _ in frames)


def one_value_a_channel(error: Exception, modules: Iterable[nn.Module], samples: int) -> bool:
    """Whether a batch norm in training raised the error because it got a single value per channel."""
    inner = (layer for module in modules for layer in module.modules())
    return isinstance(error, ValueError) and samples == 1 and any(isinstance(m, NORMS) and m.training for m in inner)


def _is_of_shapes(error: Exception, block: Block, inputs: Tensor, first: bool) -> bool:
    """Whether a wrong shape caused the error: of the inputs in the first block's body, or of features in a head."""
    if isinstance(error, IndexError) or (isinstance(error, ValueError) and len(inputs) == 1):
        return False
    return not first or block.objective is not None or _body_fails(block, inputs)


@torch.no_grad()
def _body_fails(block: Block, inputs: Tensor) -> bool:
    """Whether the block's body fails on the inputs."""
    try:
        block.body(inputs)
    except Exception:  # of any class: it is the error to be explained
        return True
    return False
