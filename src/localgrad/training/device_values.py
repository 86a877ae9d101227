"""Numbers on a device that the host reads without a synchronization of the whole device."""

import torch
import torch.distributed as dist
from torch import Tensor


class AsyncScalar:
    """An asynchronous copy of a number to the host. Reading waits for the copy, but not for work queued after it."""

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.device.type == "cuda"
        self._value = torch.empty_like(value, device="cpu", pin_memory=on_cuda).copy_(value, non_blocking=True)
        self._event = torch.cuda.Event() if on_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> float:
        """Wait for the copy, and return the number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


class AnyRank:
    """All-reduce of a boolean by "or": every rank learns whether any rank passed True.

    Args:
        device: the device of this rank.
        late: return the result of the previous call (False at the first), so that the host need not wait for the
            device.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self._device, self._late = device, late
        self._before: AsyncScalar | None = None

    def __call__(self, says_yes: bool) -> bool:
        flag = torch.full((), float(says_yes), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not self._late:
            return bool(flag)
        before, self._before = self._before, AsyncScalar(flag)
        return before is not None and before.read() > 0
