"""Losses and gradients that are not finite: found before any weight changes; the run stops or the batch is skipped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localgrad.blocks import Block
from localgrad.errors import LocalGradError
from localgrad.shards import whole
from localgrad.state import Run


def gradient_norms(blocks: Sequence[Block], like: Tensor) -> Tensor:
    """L2 norm of the gradients of each block, not finite where one of them is not.

    Args:
        blocks: those between backward pass and update.
        like: a tensor of the dtype and on the device that the norms shall have.
    """
    gradients = [[p.grad for p in block.trainable_parameters() if p.grad is not None] for block in blocks]
    return torch.stack([whole(nn.utils.get_total_norm(found)).to(like) for found in gradients])


def all_finite(run: Run, losses: Tensor, norms: Tensor) -> bool:
    """Whether losses and gradient norms are finite on every device; the step's one wait for the device.

    Where blocks are shared, each process looks at its own: asking all would make each wait for the last.
    """
    finite = bool(torch.cat([losses, norms]).isfinite().all())
    return finite if run.stage else run.fabric.strategy.reduce_boolean_decision(finite, all=True)


def stop_or_skip(run: Run, losses: Tensor, norms: Tensor, buffers: list[Tensor], first: int | None = None) -> None:
    """Frees the gradients and counts a skipped batch; what the forward pass left in the norms' buffers is undone.

    Args:
        run: the run; no optimizer has stepped.
        losses, norms: one each for blocks in a row, not all of them finite.
        buffers: what `kept_buffers` gave before the forward pass.
        first: index of the first of those blocks, where they are not all of this process.

    Raises:
        LocalGradError: the config says to stop, or as many batches in a row as it allows were skipped before.
    """
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    state, config = run.state, run.config
    if config.on_nonfinite == "stop" or state.skipped_in_a_row == config.max_skips:
        if run.stage is None:
            losses, norms = run.fabric.all_reduce(losses), run.fabric.all_reduce(norms)
        raise LocalGradError(_complaint(run, losses, norms, run.own.start if first is None else first))
    state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
    with torch.no_grad():
        for buffer, before in zip(_buffers(run), buffers, strict=True):
            buffer.copy_(before)


def kept_buffers(run: Run) -> list[Tensor]:
    """Copies of all buffers (running statistics), where a batch may be skipped; else nothing."""
    return [buffer.clone() for buffer in _buffers(run)] if run.config.on_nonfinite == "skip" else []


def _buffers(run: Run) -> list[Tensor]:
    return [buffer for block in run.blocks for buffer in block.buffers()]


def _complaint(run: Run, losses: Tensor, norms: Tensor, first: int) -> str:
    what, values = ("loss", losses) if not losses.isfinite().all() else ("gradient norm", norms)
    place = int(values.isfinite().int().argmin())
    index = first + place
    names, state = run.blocks[index].names, run.state
    skipped = f", after {state.skipped_in_a_row} batches in a row were skipped" if state.skipped_in_a_row else ""
    whose = "its" if run.config.step_each_block or run.stage else "all"
    before = ", those of the blocks before it were not" if run.config.step_each_block and index else ""
    block = f"block {index + 1} of {len(run.blocks)} ({names[0]} to {names[-1]})"
    return (
        f"the {what} of {block} is {float(values[place])} at "
        f"epoch {state.epoch}, step {state.step + 1}, learning rate {run.learning_rate:g}, in batch {state.batch + 1} "
        f"of the epoch{skipped}; {whose} weights were left as they were before this step{before}; try "
        "a lower --optim.lr, --optim.clip-norm 1, or --on-nonfinite skip for a rare bad batch"
    )
