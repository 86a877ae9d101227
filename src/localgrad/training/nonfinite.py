"""Find NaN and inf in losses and gradients before weights change; then stop the run, or skip the batch.

Two classes have the same methods. `HostCheck` reads the losses and norms of each step on the host, which waits for the
device. `DeviceCheck` is for CUDA: the GPU decides, and the host reads the verdict one step later. In a step's order:

    before()                        copies the state outside the optimizers, if batches may be skipped
    allow(losses, norms, first)     whether to call the optimizers
    after()                         restores the copied state if the batch is skipped
    report(losses, norms)           called after the step and outside its CUDA graph: acts on a verdict that is known
    if_allowed(values)              the values, or zeros if the step changed nothing
    settle()                        waits for the last verdict and acts on it: before a checkpoint, after an epoch
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.core.momentum import MomentumAuxiliary
from localgrad.errors import LocalGradError
from localgrad.parallel.shards import gathered_state
from localgrad.training.device_values import AsyncScalar
from localgrad.training.placement import Placement
from localgrad.training.schedule import rate_of
from localgrad.training.state import State


def gradient_norms(blocks: Sequence[Block], like: Tensor) -> Tensor:
    """L2 norm of the gradients of each block; it is not finite if a gradient is not.

    Args:
        blocks: blocks after their backward pass, before their update.
        like: a tensor with the dtype and device for the norms.

    Returns:
        The norms, `(len(blocks),)`.
    """
    gradients = [[p.grad for p in block.trainable_parameters() if p.grad is not None] for block in blocks]
    return torch.stack([gathered_state(nn.utils.get_total_norm(found)).to(like) for found in gradients])


def state_outside_optimizers(blocks: Sequence[Block]) -> list[Tensor]:
    """The tensors that a step changes outside the optimizers: buffers (running statistics) and EMA weights."""
    branches = [block.momentum.ema for block in blocks if isinstance(block.momentum, MomentumAuxiliary)]
    averages = [parameter for branch in branches if branch is not None for parameter in branch.parameters()]
    return [*averages, *(buffer for block in blocks for buffer in block.buffers())]


@dataclass(frozen=True)
class Found:
    """Losses and gradient norms of consecutive blocks in one step."""

    losses: Tensor
    norms: Tensor
    first: int
    """Index of the first of these blocks."""
    step: int
    """Number of the step in the run, from 1."""
    batch: int
    """Number of the batch in the epoch, from 1."""


class Skips:
    """Counts skipped batches in the run's state, and stops the run when no more may be skipped.

    Args:
        config: the config of the run, with `on_nonfinite` and `max_skips`.
        state: the state of the run, in which skipped batches are counted.
        blocks: all blocks of the run.
        placement: the placement of the blocks on the ranks.
    """

    def __init__(self, config: TrainConfig, state: State, blocks: Sequence[Block], placement: Placement) -> None:
        self.config, self.state, self.blocks, self.placement = config, state, blocks, placement

    @property
    def allowed(self) -> int:
        """Number of batches in a row that may be skipped."""
        return self.config.max_skips if self.config.on_nonfinite == "skip" else 0

    def found(self, losses: Tensor, norms: Tensor, first: int | None = None) -> Found:
        """Losses and norms of the current step, of the blocks from `first` on (default: this rank's first block)."""
        first = self.placement.own.start if first is None else first
        return Found(losses, norms, first, self.state.step + 1, self.state.batch + 1)

    def add(self, found: Found) -> None:
        """Count a skipped batch.

        Raises:
            LocalGradError: the config says to stop, or the allowed number of batches in a row was skipped already.
        """
        if self.state.skipped_in_a_row >= self.allowed:
            raise LocalGradError(self._message(found))
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1

    def reset(self) -> None:
        """Set the count of batches skipped in a row to 0, after a batch that was not skipped."""
        self.state.skipped_in_a_row = 0

    def _message(self, found: Found) -> str:
        config, state = self.config, self.state
        losses, norms = self.placement.mean(found.losses), self.placement.mean(found.norms)
        what, values = ("loss", losses) if not losses.isfinite().all() else ("gradient norm", norms)
        position = int(values.isfinite().int().argmin())
        index = found.first + position
        names, count = self.blocks[index].names, state.skipped_in_a_row
        skipped = f", after {count} batches in a row were skipped" if count else ""
        alone = config.step_each_block or len(self.placement.own) < len(self.blocks)
        before = ", those of the blocks before it were not" if config.step_each_block and index else ""
        remedies = ["a lower --optim.lr", "--optim.clip-norm 1"]
        if config.on_nonfinite == "stop" and not alone:  # blocks that decide alone cannot skip a batch
            remedies.append("--on-nonfinite skip for a rare bad batch")
        return (
            f"the {what} of block {index + 1} of {len(self.blocks)} ({names[0]} to {names[-1]}) is "
            f"{float(values[position])} at epoch {state.epoch}, step {found.step}, "
            f"learning rate {rate_of(config.optim, state.epoch):g}, in batch {found.batch} of the epoch{skipped}; "
            f"{'its' if alone else 'all'} weights were left as they were before this step{before}; try "
            f"{', or '.join(remedies)}"
        )


class HostCheck:
    """The host reads the losses and norms of each step before the optimizers are called.

    Args:
        skips: the count of skipped batches of the run.
        optimizers: the optimizers of this rank, which free their gradients if a batch is skipped.
    """

    def __init__(self, skips: Skips, optimizers: Sequence[Optimizer]) -> None:
        self.skips, self._optimizers = skips, optimizers
        self._kept: list[Tensor] = []
        self._allowed = True

    def before(self) -> None:
        """Copy the state outside the optimizers, if batches may be skipped."""
        self._kept = _copies(self.skips)

    def allow(self, losses: Tensor, norms: Tensor, first: int) -> bool:
        """Whether losses and gradient norms are finite on every rank that shares this batch.

        If they are not, gradients are freed, and the batch is counted as skipped.

        Args:
            losses: losses of consecutive blocks.
            norms: gradient norms of these blocks.
            first: index of the first of these blocks.

        Raises:
            LocalGradError: the batch may not be skipped.
        """
        bad = _not_finite(losses, norms)
        self.skips.placement.all_reduce_max(bad)
        self._allowed = not bad
        if self._allowed:
            self.skips.reset()
            return True
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.skips.add(self.skips.found(losses, norms, first))
        return False

    @torch.no_grad()
    def after(self) -> None:
        """Restore running statistics and EMA branches if the batch was skipped."""
        if self._kept and not self._allowed:
            for tensor, before in zip(state_outside_optimizers(self.skips.blocks), self._kept, strict=True):
                tensor.copy_(before)

    def report(self, losses: Tensor, norms: Tensor) -> None:
        """No-op: `allow` has acted on the step already."""

    def if_allowed(self, values: Tensor) -> Tensor:
        """The values, or zeros if the last batch was skipped."""
        return values if self._allowed else torch.zeros_like(values)

    def settle(self) -> None:
        """No-op: `allow` has acted on every step already."""


class DeviceCheck:
    """The device decides, and the host reads each verdict one step later, when it need not wait for it.

    `closed` takes the place of the `found_inf` of `torch.amp.GradScaler`: fused optimizers read it on the device, and
    step only if it is 0. All else that a step changes is restored. After a step for which the host will stop the run,
    later steps change nothing either.

    Attributes:
        closed: 1 if the last checked step may change nothing, else 0; float32 `()`, on the run's device.

    Args:
        skips: the count of skipped batches of the run.
        optimizers: the optimizers of this rank, all of which must obey `found_inf` (see `obeys_found_inf`).
        device: the device of this rank.
    """

    def __init__(self, skips: Skips, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.skips, self._optimizers = skips, optimizers
        self.closed = torch.zeros((), device=device)
        self._stopped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)
        self._kept: list[Tensor] = []
        self._begun = False
        self._open: tuple[Found, AsyncScalar] | None = None
        for optimizer in optimizers:
            optimizer.found_inf = self.closed  # pyright: ignore[reportAttributeAccessIssue]

    def before(self) -> None:
        """Copy the state outside the optimizers, if batches may be skipped."""
        if not self._begun:  # not in __init__, since a checkpoint may be loaded in between
            self._in_a_row.fill_(self.skips.state.skipped_in_a_row)
            for optimizer in self._optimizers:
                _begin_momentum(optimizer)
            self._begun = True
        self._kept = _copies(self.skips)

    @torch.no_grad()
    def allow(self, losses: Tensor, norms: Tensor, first: int) -> bool:
        """Decide on the device whether the optimizers will change anything. True: they are to be called in any case.

        Args:
            losses: losses of consecutive blocks.
            norms: gradient norms of these blocks.
            first: index of the first of these blocks, which is not needed here.
        """
        bad = _not_finite(losses, norms)
        self.skips.placement.all_reduce_max(bad)
        self._in_a_row.add_(1).mul_(bad)
        self._stopped.logical_or_(self._in_a_row > self.skips.allowed)
        self.closed.copy_(torch.maximum(bad, self._stopped))
        return True

    @torch.no_grad()
    def after(self) -> None:
        """Restore running statistics and EMA branches on the device if the batch is skipped."""
        if self._kept:
            for tensor, before in zip(state_outside_optimizers(self.skips.blocks), self._kept, strict=True):
                tensor.copy_(torch.where(self.closed > 0, before, tensor))

    def report(self, losses: Tensor, norms: Tensor) -> None:
        """Start the copy of this step's verdict to the host, and act on the verdict of the step before.

        Raises:
            LocalGradError: the step before was not finite, and its batch may not be skipped.
        """
        self.settle()
        self._open = self.skips.found(losses, norms), AsyncScalar(self.closed)

    def if_allowed(self, values: Tensor) -> Tensor:
        """The values, or zeros if the last checked step changes nothing; decided on the device."""
        return torch.where(self.closed > 0, torch.zeros_like(values), values)

    def settle(self) -> None:
        """Wait for the verdict of the last reported step, and act on it.

        Raises:
            LocalGradError: the step was not finite, and its batch may not be skipped.
        """
        verdict, self._open = self._open, None
        if verdict is None:
            return
        found, closed = verdict
        if closed.read():
            self.skips.add(found)
        else:
            self.skips.reset()


def choose_check(skips: Skips, optimizers: Sequence[Optimizer], device: torch.device) -> HostCheck | DeviceCheck:
    """A `DeviceCheck` on CUDA if all optimizers obey `found_inf`, else a `HostCheck`.

    Raises:
        LocalGradError: `cuda_graph` is on, which needs a `DeviceCheck`, and an optimizer does not obey `found_inf`.
    """
    ignoring = sorted({type(one).__name__ for one in optimizers if not obeys_found_inf(one)})
    if device.type == "cuda" and not ignoring:
        return DeviceCheck(skips, optimizers, device)
    if skips.config.cuda_graph:
        raise LocalGradError(
            f"cuda_graph is on, and {', '.join(ignoring)} cannot leave out a step that is not finite by itself: leave "
            "--cuda-graph out, or use fused SGD, Adam or AdamW"
        )
    return HostCheck(skips, optimizers)


def obeys_found_inf(optimizer: Optimizer) -> bool:
    """Whether `step` changes nothing if the optimizer's `found_inf` is 1, as in fused SGD, Adam, AdamW and Adagrad.

    Others (RMSprop, Muon, all that are not fused) step nevertheless. `torch.amp.GradScaler` reads the same attribute.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _begin_momentum(optimizer: Optimizer) -> None:
    """Set SGD's momentum buffers to 0: a first step that changes nothing would leave them uninitialised."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _copies(skips: Skips) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state_outside_optimizers(skips.blocks)] if skips.allowed else []


def _not_finite(losses: Tensor, norms: Tensor) -> Tensor:
    """1 if any of the losses and norms is NaN or inf, else 0; float32 `()`, on their device."""
    return 1 - torch.cat([losses, norms]).isfinite().all().float()
