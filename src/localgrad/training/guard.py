"""What keeps a step that is not finite from changing anything where a device computes beside the host.

The host would have to wait for each step to look at its gradients. The device decides instead, and the host reads one
step later what it decided.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from localgrad.training.nonfinite import Place, count_or_stop, unguarded
from localgrad.training.state import Run


class Arriving:
    """A number of the device on its way to the host, which waits for no work that is given to the device later."""

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.device.type == "cuda"
        self._value = torch.empty_like(value, device="cpu", pin_memory=on_cuda).copy_(value, non_blocking=True)
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
        self._verdict: Verdict | None = None
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
            for tensor, before in zip(unguarded(run), kept, strict=True):
                tensor.copy_(torch.where(self.closed > 0, before, tensor))

    def only_if_open(self, values: Tensor) -> Tensor:
        """The values, or zeros where the step that was looked at last may change nothing."""
        return torch.where(self.closed > 0, torch.zeros_like(values), values)

    def note(self, run: Run, losses: Tensor, norms: Tensor) -> None:
        """Sends the verdict on its way, and acts on the one before it.

        Raises:
            LocalGradError: as `stop_or_skip`, of an earlier step.
        """
        self.settle(run)
        self._verdict = Verdict(Place.of(run, run.own.start), losses, norms, Arriving(self.closed))

    def any_asked(self, asks: bool) -> bool:
        """Whether a process had asked for something by its step before; all of them get the same answer."""
        flag = torch.full_like(self.closed, float(asks))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        before, self._asked = self._asked, Arriving(flag)
        return before is not None and before.read() > 0

    def settle(self, run: Run) -> None:
        """Acts on the verdict that is on its way; waits for it.

        Raises:
            LocalGradError: as `stop_or_skip`.
        """
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        if verdict.bad.read():
            count_or_stop(run, verdict.losses, verdict.norms, verdict.place)
        else:
            run.state.skipped_in_a_row = 0


def make_guard(run: Run) -> Guard | None:
    """A guard for devices that compute beside the host, None elsewhere and for optimizers that cannot be told."""
    in_shards = run.config.parallel == "shards" and run.fabric.world_size > 1
    return Guard(run) if run.fabric.device.type == "cuda" and not in_shards else None


def _with_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begins SGD's momentum at 0: left to the first step, it would stay uninitialised where that one is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
