"""Measure the peak memory of a function by its live tensor storages, and count its operations."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from localgrad.core.trees import leaves

Value = TypeVar("Value")


CPU = torch.device("cpu")


class PeakMemory(TorchDispatchMode):
    """Context that counts the bytes of live tensor storages that were created inside it.

    It works on every device. On the meta device it predicts what a real device would hold.

    Attributes:
        current: bytes that are alive now.
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.current = 0
        self.peak = 0
        self._sizes = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._sizes.setdefault(value.untyped_storage(), 0)  # created outside
        result = func(*args, **(kwargs or {}))
        for value in leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.current -= size


class Operations(TorchDispatchMode):
    """Context that counts floating-point operations of matrix products, convolutions and attention.

    A multiply-add counts two.

    Attributes:
        total: operations that have run inside.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        formula = flop_registry.get(_SAME_FORMULA.get(kind, kind))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


_ATEN = torch.ops.aten
_SAME_FORMULA = {  # torch's registry has no formula for the keys
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


def measure_peak(function: Callable[[], Value], device: torch.device = CPU) -> tuple[Value, int]:
    """Run a function and measure the peak of the memory that it allocates.

    Args:
        function: the function to run.
        device: the device of its tensors.

    Returns:
        The function's result, and its peak in bytes beyond the memory allocated before. It is that of the allocator on
        CUDA, and that of live tensor storages on other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    counter = PeakMemory()
    with counter:
        result = function()
    return result, counter.peak
