"""Devices and precision of a run, through Lightning Fabric."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from localgrad.config.schema import TrainConfig
from localgrad.core.wording import CAPTURABLE
from localgrad.errors import LocalGradError
from localgrad.parallel.processes import join_again, restarted

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def as_launched(config: TrainConfig) -> TrainConfig:
    """The config with torchrun's number of processes as its `devices`; unchanged without torchrun.

    Raises:
        LocalGradError: `devices` is neither 1 nor torchrun's number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if started > 1 and config.devices not in (1, started):
        raise LocalGradError(
            f"devices is {config.devices} and torchrun started {started} processes: leave --devices out under torchrun"
        )
    return config if started == 1 else replace(config, devices=started)


def make_fabric(config: TrainConfig) -> Fabric:
    """Make the Fabric of a config: devices, number of nodes, and precision with `auto` resolved.

    Raises:
        LocalGradError: this machine does not have the accelerator, or has fewer devices.
    """
    from lightning.fabric import Fabric

    if restarted() and not dist.is_initialized():
        join_again(config.accelerator)
    here = config.devices
    if dist.is_torchelastic_launched():
        here = min(here, int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        return Fabric(
            accelerator=config.accelerator,
            devices=here,
            num_nodes=config.devices // here,
            plugins=_precision_plugins(config),
        )
    except (RuntimeError, ValueError, ImportError) as error:  # ImportError: the accelerator needs a package
        given = f"accelerator {config.accelerator!r} with {config.devices} device(s)"
        raise LocalGradError(f"{given} cannot be used on this machine: {error}") from error


def _precision_plugins(config: TrainConfig) -> list[Any]:
    """The precision as a Fabric plugin; if it is passed as a string, Fabric logs a line about it."""
    from lightning.fabric.plugins import MixedPrecision, Precision

    if resolve_precision(config) == "32-true":
        return [Precision()]
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next((kind for kind, here in present.items() if here and config.accelerator in ("auto", kind)), "cpu")
    return [MixedPrecision(precision="bf16-mixed", device=device)]


def has_native_bf16() -> bool:
    """Whether the CPU computes bfloat16 natively."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_precision(config: TrainConfig) -> Any:
    """The precision of a config. `auto` is bf16-mixed if the CPU or GPU computes bfloat16 natively, else 32-true."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif config.accelerator == "mps" or (config.accelerator == "auto" and torch.backends.mps.is_available()):
        native = False
    else:
        native = has_native_bf16()
    return "bf16-mixed" if native else "32-true"


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """Context: settings of the process that make training fast.

    On CUDA cuDNN times its algorithms for each shape. On a CPU the C library keeps freed memory (see
    `keep_freed_memory`); this setting remains after the context. All else is restored at the end, and so is torch's
    global random state, which training seeds.
    """
    benchmark = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_memory()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
            # AdamW warns in the warm-up steps before a CUDA graph is captured
            warnings.filterwarnings("ignore", message=CAPTURABLE)
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation instead of returning it to the operating system.

    A local step frees the activations of one block and allocates those of the next. With glibc's defaults the heap
    shrinks and grows each time, with a page fault for every 4 KiB. With this setting the process keeps the memory of
    tensors below 32 MiB, at its peak, until it ends. Larger tensors are returned as before. No-op with other C
    libraries.

    Source: `man 3 mallopt` (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest threshold that glibc accepts
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 64 << 20)
