"""The devices of a run and their precision, through Lightning Fabric."""

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
        LocalGradError: `devices` is neither 1 nor that number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if started > 1 and config.devices not in (1, started):
        raise LocalGradError(
            f"devices is {config.devices} and torchrun started {started} processes: leave --devices out under torchrun"
        )
    return config if started == 1 else replace(config, devices=started)


def make_fabric(config: TrainConfig) -> Fabric:
    """Makes the Fabric of a config: its devices, its number of nodes, and the precision that `auto` stands for.

    Raises:
        LocalGradError: this machine does not have the accelerator, or not as many devices.
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
    except (RuntimeError, ValueError, ImportError) as error:  # the last for an accelerator that needs a package
        given = f"accelerator {config.accelerator!r} with {config.devices} device(s)"
        raise LocalGradError(f"{given} cannot be used on this machine: {error}") from error


def _precision_plugins(config: TrainConfig) -> list[Any]:
    """The precision as a plugin; given as a string, Fabric would log a line about it."""
    from lightning.fabric.plugins import MixedPrecision, Precision

    if resolve_precision(config) == "32-true":
        return [Precision()]
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next((kind for kind, here in present.items() if here and config.accelerator in ("auto", kind)), "cpu")
    return [MixedPrecision(precision="bf16-mixed", device=device)]


def has_native_bf16() -> bool:
    """Whether the processor computes bfloat16 natively."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_precision(config: TrainConfig) -> Any:
    """The precision of a config. `auto` is bf16-mixed where the CPU or GPU computes bfloat16 natively, else 32-true."""
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
    """Context: settings of the whole process under which training is fast, restored at the end where that is possible.

    On CUDA cuDNN times its algorithms for each shape. On a CPU the C library keeps freed memory; this setting stays
    (see `keep_freed_memory`). Torch's global random state, which training seeds, is restored too.
    """
    benchmark = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_memory()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
            # AdamW warns in the steps that run before a CUDA graph is recorded
            warnings.filterwarnings("ignore", message=CAPTURABLE)
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    A local step frees a block's activations and allocates the next block's. With glibc's defaults the heap shrinks and
    grows each time, and every 4 KiB cost a page fault. With this setting the process keeps the peak of its tensors
    below 32 MiB until it ends; larger tensors are returned as before. Other C libraries are left alone.

    Source: `man 3 mallopt` (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 64 << 20)
