"""NaN and inf in losses and gradients: found before any weight changes; the run stops, or skips the batch.

Two classes with the same methods. `HostCheck` reads the losses and norms of each step on the host, which waits for the
device. `DeviceCheck` is for CUDA: the GPU decides, and the host reads the verdict one step later. In a step's order:

    before()                        keeps what a step changes outside the optimizers, where batches may be skipped
    allow(losses, norms, first)     whether the optimizers may be called
    after()                         puts back what a step that may change nothing has changed
    report(losses, norms)           after the step, outside of its CUDA graph: acts on what is known of it
    if_allowed(values)              the values, or zeros where the step changes nothing
    settle()                        waits until nothing is open: before a checkpoint, and at the end of an epoch
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
    """L2 norm of the gradients of each block, not finite where one of them is not.

    Args:
        blocks: those between backward pass and update.
        like: a tensor of the dtype and on the device that the norms shall have.
    """
    gradients = [[p.grad for p in block.trainable_parameters() if p.grad is not None] for block in blocks]
    return torch.stack([gathered_state(nn.utils.get_total_norm(found)).to(like) for found in gradients])


def state_outside_optimizers(blocks: Sequence[Block]) -> list[Tensor]:
    """What a step changes and no optimizer does: all buffers (running statistics) and the weights of EMA branches."""
    branches = [block.momentum.ema for block in blocks if isinstance(block.momentum, MomentumAuxiliary)]
    averages = [parameter for branch in branches if branch is not None for parameter in branch.parameters()]
    return [*averages, *(buffer for block in blocks for buffer in block.buffers())]


@dataclass(frozen=True)
class Found:
    """Losses and gradient norms of some blocks in a row, and the step that they are of, which counts from 1."""

    losses: Tensor
    norms: Tensor
    first: int
    """Index of the first of those blocks."""
    step: int
    batch: int


class Skips:
    """Counts skipped batches in the run's state, and stops the run where no more may be skipped.

    Args:
        config: `on_nonfinite`, `max_skips` and what the message tells.
        state: of the run.
        blocks: all of them.
        placement: which ranks share a batch.
    """

    def __init__(self, config: TrainConfig, state: State, blocks: Sequence[Block], placement: Placement) -> None:
        self.config, self.state, self.blocks, self.placement = config, state, blocks, placement

    @property
    def allowed(self) -> int:
        """Batches that may be skipped one after the other."""
        return self.config.max_skips if self.config.on_nonfinite == "skip" else 0

    def found(self, losses: Tensor, norms: Tensor, first: int | None = None) -> Found:
        """The losses and norms of the step that is being done, of this rank's blocks from `first` on."""
        first = self.placement.own.start if first is None else first
        return Found(losses, norms, first, self.state.step + 1, self.state.batch + 1)

    def add(self, found: Found) -> None:
        """Counts a skipped batch.

        Raises:
            LocalGradError: the config says to stop, or as many in a row as it allows were skipped before.
        """
        if self.state.skipped_in_a_row >= self.allowed:
            raise LocalGradError(self._message(found))
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1

    def reset(self) -> None:
        """Notes that a batch was not skipped."""
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
        if config.on_nonfinite == "stop" and not alone:  # those cannot skip
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
        skips: of the run.
        optimizers: of this rank; their gradients are freed where a batch is skipped.
    """

    def __init__(self, skips: Skips, optimizers: Sequence[Optimizer]) -> None:
        self.skips, self._optimizers = skips, optimizers
        self._kept: list[Tensor] = []
        self._allowed = True

    def before(self) -> None:
        """Copies what a step changes outside the optimizers, where batches may be skipped."""
        self._kept = _copies(self.skips)

    def allow(self, losses: Tensor, norms: Tensor, first: int) -> bool:
        """Whether losses and gradient norms are finite on every rank that shares this batch.

        Where they are not, gradients are freed, and the batch is counted as skipped.

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
        """Puts running statistics back where the batch was skipped."""
        if self._kept and not self._allowed:
            for tensor, before in zip(state_outside_optimizers(self.skips.blocks), self._kept, strict=True):
                tensor.copy_(before)

    def report(self, losses: Tensor, norms: Tensor) -> None:
        """Nothing: `allow` has acted."""

    def if_allowed(self, values: Tensor) -> Tensor:
        """The values, or zeros where the last step was skipped."""
        return values if self._allowed else torch.zeros_like(values)

    def settle(self) -> None:
        """Nothing: `allow` has acted."""


class DeviceCheck:
    """The device decides, and the host reads each verdict one step later, by when it is there.

    Fused optimizers read `closed` on the device as they read a gradient scaler's `found_inf`, and step only where it is
    0. What else a step changes is put back. Where the host will stop the run, no later step changes anything either.

    Attributes:
        closed: 1 where the step that was checked last may change nothing, else 0; float32, on the run's device.

    Args:
        skips: of the run.
        optimizers: of this rank; each of them must obey (see `obeys_found_inf`).
        device: of this rank.
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
        """Copies what a step changes outside the optimizers, where batches may be skipped."""
        if not self._begun:  # not before, for a checkpoint may have been loaded
            self._in_a_row.fill_(self.skips.state.skipped_in_a_row)
            for optimizer in self._optimizers:
                _begin_momentum(optimizer)
            self._begun = True
        self._kept = _copies(self.skips)

    @torch.no_grad()
    def allow(self, losses: Tensor, norms: Tensor, first: int) -> bool:
        """Decides on the device whether the optimizers change anything; they may be called in any case."""
        bad = _not_finite(losses, norms)
        self.skips.placement.all_reduce_max(bad)
        self._in_a_row.add_(1).mul_(bad)
        self._stopped.logical_or_(self._in_a_row > self.skips.allowed)
        self.closed.copy_(torch.maximum(bad, self._stopped))
        return True

    @torch.no_grad()
    def after(self) -> None:
        """Puts back what a step that may change nothing has changed outside the optimizers."""
        if self._kept:
            for tensor, before in zip(state_outside_optimizers(self.skips.blocks), self._kept, strict=True):
                tensor.copy_(torch.where(self.closed > 0, before, tensor))

    def report(self, losses: Tensor, norms: Tensor) -> None:
        """Queues the verdict's way to the host, and acts on the one of the step before.

        Raises:
            LocalGradError: the step before was not finite, and may not be skipped.
        """
        self.settle()
        self._open = self.skips.found(losses, norms), AsyncScalar(self.closed)

    def if_allowed(self, values: Tensor) -> Tensor:
        """The values, or zeros where the step that was checked last changes nothing; decided on the device."""
        return torch.where(self.closed > 0, torch.zeros_like(values), values)

    def settle(self) -> None:
        """Waits for the verdict of the last step, and acts on it.

        Raises:
            LocalGradError: the step was not finite, and may not be skipped.
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
    """A check on the device for CUDA and optimizers that obey it, one on the host for anything else.

    Raises:
        LocalGradError: steps are to be recorded as CUDA graphs, and the host would have to look at each.
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
    """Whether `step` changes nothing where the optimizer's `found_inf` is 1, as fused SGD, Adam, AdamW and Adagrad.

    Others (RMSprop, Muon, anything that is not fused) step all the same. It is how `torch.amp.GradScaler` asks.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _begin_momentum(optimizer: Optimizer) -> None:
    """Begins SGD's momentum at 0: a first step that changes nothing would leave it uninitialised."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _copies(skips: Skips) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state_outside_optimizers(skips.blocks)] if skips.allowed else []


def _not_finite(losses: Tensor, norms: Tensor) -> Tensor:
    """1 where any of them is NaN or inf, else 0: float32, on their device."""
    return 1 - torch.cat([losses, norms]).isfinite().all().float()
