"""Losses and gradients that are not finite: found before any weight changes; the run stops or the batch is skipped.

Here the host looks at each step; where a device computes beside the host, `localgrad.guard` does without that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localgrad.core.block import Block
from localgrad.core.momentum import MomentumAuxiliary
from localgrad.errors import LocalGradError
from localgrad.parallel.shards import whole
from localgrad.training.state import Run


def gradient_norms(blocks: Sequence[Block], like: Tensor) -> Tensor:
    """L2 norm of the gradients of each block, not finite where one of them is not.

    Args:
        blocks: those between backward pass and update.
        like: a tensor of the dtype and on the device that the norms shall have.
    """
    gradients = [[p.grad for p in block.trainable_parameters() if p.grad is not None] for block in blocks]
    return torch.stack([whole(nn.utils.get_total_norm(found)).to(like) for found in gradients])


def all_finite(run: Run, losses: Tensor, norms: Tensor) -> bool:
    """Whether losses and gradient norms are finite on every device, as the host sees it: it waits for the device.

    Where blocks are shared, each process looks at its own: asking all would make each wait for the last.
    """
    finite = bool(torch.cat([losses, norms]).isfinite().all())
    return finite if run.stage else run.fabric.strategy.reduce_boolean_decision(finite, all=True)


def stop_or_skip(run: Run, losses: Tensor, norms: Tensor, kept: list[Tensor], first: int | None = None) -> None:
    """Frees the gradients and counts a skipped batch; what the forward pass left in the norms' buffers is undone.

    Args:
        run: the run; no optimizer has stepped.
        losses, norms: one each for blocks in a row, not all of them finite.
        kept: what `kept_tensors` gave before the forward pass.
        first: index of the first of those blocks, where they are not all of this process.

    Raises:
        LocalGradError: the config says to stop, or as many batches in a row as it allows were skipped before.
    """
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    place = Place.of(run, run.own.start if first is None else first)
    count_or_stop(run, losses, norms, place)
    with torch.no_grad():
        for tensor, before in zip(unguarded(run), kept, strict=True):
            tensor.copy_(before)


def kept_tensors(run: Run) -> list[Tensor]:
    """Copies of what a step changes outside the optimizers, where a batch may be skipped; else nothing."""
    return [tensor.clone() for tensor in unguarded(run)] if run.config.on_nonfinite == "skip" else []


def unguarded(run: Run) -> list[Tensor]:
    """All buffers (running statistics) and the weights of the EMA branches."""
    branches = [block.momentum.ema for block in run.blocks if isinstance(block.momentum, MomentumAuxiliary)]
    averages = [parameter for branch in branches if branch is not None for parameter in branch.parameters()]
    return [*averages, *(buffer for block in run.blocks for buffer in block.buffers())]


@dataclass(frozen=True)
class Place:
    """Where in a run a step was, for what is said of it."""

    step: int
    batch: int
    first: int
    """Index of the first block that is spoken of."""

    @classmethod
    def of(cls, run: Run, first: int) -> "Place":
        """The step that is being done; steps and batches count from 1."""
        return cls(run.state.step + 1, run.state.batch + 1, first)


def count_or_stop(run: Run, losses: Tensor, norms: Tensor, place: Place) -> None:
    """Counts a skipped batch.

    Raises:
        LocalGradError: as `stop_or_skip`.
    """
    state, config = run.state, run.config
    if config.on_nonfinite == "stop" or state.skipped_in_a_row == config.max_skips:
        if run.stage is None:
            losses, norms = run.fabric.all_reduce(losses), run.fabric.all_reduce(norms)
        raise LocalGradError(_complaint(run, losses, norms, place))
    state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1


def _complaint(run: Run, losses: Tensor, norms: Tensor, place: Place) -> str:
    what, values = ("loss", losses) if not losses.isfinite().all() else ("gradient norm", norms)
    found = int(values.isfinite().int().argmin())
    index = place.first + found
    names, state = run.blocks[index].names, run.state
    skipped = f", after {state.skipped_in_a_row} batches in a row were skipped" if state.skipped_in_a_row else ""
    whose = "its" if run.config.step_each_block or run.stage else "all"
    before = ", those of the blocks before it were not" if run.config.step_each_block and index else ""
    remedies = ["a lower --optim.lr", "--optim.clip-norm 1"]
    if run.config.on_nonfinite == "stop" and not (run.config.step_each_block or run.stage):  # those cannot skip
        remedies.append("--on-nonfinite skip for a rare bad batch")
    block = f"block {index + 1} of {len(run.blocks)} ({names[0]} to {names[-1]})"
    return (
        f"the {what} of {block} is {float(values[found])} at "
        f"epoch {state.epoch}, step {place.step}, learning rate {run.learning_rate:g}, in batch {place.batch} "
        f"of the epoch{skipped}; {whose} weights were left as they were before this step{before}; try "
        f"{', or '.join(remedies)}"
    )
