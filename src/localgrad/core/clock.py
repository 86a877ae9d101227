"""A clock that synchronizes with the device."""

import time

import torch


def now(device: torch.device | None = None) -> float:
    """Seconds on a clock, read after a synchronization with the device (None: the current accelerator, if any)."""
    if torch.accelerator.is_available() and (device is None or device.type not in ("cpu", "meta")):
        torch.accelerator.synchronize(device)
    return time.perf_counter()
