"""A clock that waits for the device."""

import time

import torch


def now(device: torch.device | None = None) -> float:
    """Seconds on a clock, read when the device (None: any accelerator) has done all that it was given."""
    if torch.accelerator.is_available() and (device is None or device.type not in ("cpu", "meta")):
        torch.accelerator.synchronize(device)
    return time.perf_counter()
