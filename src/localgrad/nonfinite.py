"""Losses and gradients that are not finite: found before any weight changes; the run stops or the batch is skipped.

On CUDA the decision is the device's own, so that the host never waits for a step before it prepares the next: `Guard`.
Elsewhere, and where weights are shared out, the host looks.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.blocks import Block
from localgrad.errors import LocalGradError
from localgrad.momentum import MomentumAuxiliary
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
    _count_or_stop(run, losses, norms, place)
    with torch.no_grad():
        for tensor, before in zip(_unguarded(run), kept, strict=True):
            tensor.copy_(before)


def kept_tensors(run: Run) -> list[Tensor]:
    """Copies of what a step changes outside the optimizers, where a batch may be skipped; else nothing."""
    return [tensor.clone() for tensor in _unguarded(run)] if run.config.on_nonfinite == "skip" else []


def _unguarded(run: Run) -> list[Tensor]:
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


def _count_or_stop(run: Run, losses: Tensor, norms: Tensor, place: Place) -> None:
    state, config = run.state, run.config
    if config.on_nonfinite == "stop" or state.skipped_in_a_row == config.max_skips:
        if run.stage is None:
            losses, norms = run.fabric.all_reduce(losses), run.fabric.all_reduce(norms)
        raise LocalGradError(_complaint(run, losses, norms, place))
    state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1


class Arriving:
    """A number of the device on its way to the host, which waits for no work that is given to the device later."""

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.device.type == "cuda"
        self._value = torch.empty((), pin_memory=on_cuda).copy_(value, non_blocking=True)
        self._event = torch.cuda.Event() if on_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> float:
        """The number, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


@dataclass(frozen=True)
class Verdict:
    """What the device decided of a step."""

    place: Place
    losses: Tensor
    norms: Tensor
    bad: Arriving


class Guard:
    """Keeps a step that is not finite from changing anything, without the host.

    The fused optimizers read `closed` on the device, as they read a gradient scaler's `found_inf`, and step only where
    it is 0. What else a step changes is put back. The host reads each verdict one step later, which by then is there:
    it stops or counts as `stop_or_skip` does. Where it will stop, no later step changes anything either.

    Attributes:
        closed: 1 where the step that was looked at last may change nothing, else 0; float32, on the run's device.
    """

    def __init__(self, run: Run) -> None:
        device, config = run.fabric.device, run.config
        self.closed = torch.zeros((), device=device)
        self._stopped = torch.zeros((), device=device)
        self._in_a_row = torch.full((), float(run.state.skipped_in_a_row), device=device)
        self._max_skips = config.max_skips if config.on_nonfinite == "skip" else 0
        self._verdicts = deque[Verdict]()
        self._asked: Arriving | None = None
        for optimizer in run.optimizers:
            optimizer.found_inf = self.closed  # pyright: ignore[reportAttributeAccessIssue]
            _with_momentum(optimizer)

    @torch.no_grad()
    def look(self, run: Run, losses: Tensor, norms: Tensor) -> None:
        """Decides whether the gradients that these losses and norms are of may be used."""
        bad = 1 - torch.cat([losses, norms]).isfinite().all().float()
        if run.stage is None and run.fabric.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)  # Fabric's would have the host wait at a barrier
        self._in_a_row.add_(1).mul_(bad)
        self._stopped.logical_or_(self._in_a_row > self._max_skips)
        self.closed.copy_(torch.maximum(bad, self._stopped))

    @torch.no_grad()
    def put_back(self, run: Run, kept: list[Tensor]) -> None:
        """After the updates: undoes what a step that may change nothing has changed outside the optimizers."""
        if kept:
            for tensor, before in zip(_unguarded(run), kept, strict=True):
                tensor.copy_(torch.where(self.closed > 0, before, tensor))

    def only_if_open(self, values: Tensor) -> Tensor:
        """The values, or zeros where the step that was looked at last may change nothing."""
        return torch.where(self.closed > 0, torch.zeros_like(values), values)

    def note(self, run: Run, losses: Tensor, norms: Tensor) -> None:
        """Sends the verdict on its way, and acts on those before it.

        Raises:
            LocalGradError: as `stop_or_skip`, of an earlier step.
        """
        self.settle(run)
        self._verdicts.append(Verdict(Place.of(run, run.own.start), losses, norms, Arriving(self.closed)))

    def any_asked(self, asks: bool) -> bool:
        """Whether a process had asked for something by its step before; all of them get the same answer."""
        flag = torch.full_like(self.closed, float(asks))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        before, self._asked = self._asked, Arriving(flag)
        return before is not None and before.read() > 0

    def settle(self, run: Run) -> None:
        """Acts on all verdicts that are on their way; waits for the last.

        Raises:
            LocalGradError: as `stop_or_skip`.
        """
        while self._verdicts:
            verdict = self._verdicts.popleft()
            if verdict.bad.read():
                _count_or_stop(run, verdict.losses, verdict.norms, verdict.place)
            else:
                run.state.skipped_in_a_row = 0


def make_guard(run: Run) -> Guard | None:
    """A guard for devices that compute beside the host, None elsewhere and for optimizers that cannot be told."""
    return Guard(run) if run.fabric.device.type == "cuda" and run.config.parallel != "shards" else None


def _with_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begins SGD's momentum at 0: left to the first step, it would stay uninitialised where that one is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _complaint(run: Run, losses: Tensor, norms: Tensor, place: Place) -> str:
    what, values = ("loss", losses) if not losses.isfinite().all() else ("gradient norm", norms)
    found = int(values.isfinite().int().argmin())
    index = place.first + found
    names, state = run.blocks[index].names, run.state
    skipped = f", after {state.skipped_in_a_row} batches in a row were skipped" if state.skipped_in_a_row else ""
    whose = "its" if run.config.step_each_block or run.stage else "all"
    before = ", those of the blocks before it were not" if run.config.step_each_block and index else ""
    block = f"block {index + 1} of {len(run.blocks)} ({names[0]} to {names[-1]})"
    return (
        f"the {what} of {block} is {float(values[found])} at "
        f"epoch {state.epoch}, step {place.step}, learning rate {run.learning_rate:g}, in batch {place.batch} "
        f"of the epoch{skipped}; {whose} weights were left as they were before this step{before}; try "
        "a lower --optim.lr, --optim.clip-norm 1, or --on-nonfinite skip for a rare bad batch"
    )
