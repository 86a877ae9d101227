"""The devices of a run: their Fabric, their precision, and what they are called in a result."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from localgrad.config import TrainConfig
from localgrad.errors import LocalGradError, of_another_process


def as_launched(config: TrainConfig) -> TrainConfig:
    """The config with as many devices as torchrun has started processes, where it has and the config names none.

    Raises:
        LocalGradError: the config names another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if started > 1 and config.devices not in (1, started):
        raise LocalGradError(
            f"devices is {config.devices} and torchrun started {started} processes: leave --devices out under torchrun"
        )
    return config if started == 1 else replace(config, devices=started)


def restarted() -> bool:
    """Whether torchrun has started this process again, since one of the processes had failed."""
    return dist.is_torchelastic_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _join_again(config: TrainConfig) -> None:
    """Makes the process group of processes that torchrun has restarted.

    torchrun's store still has the addresses of the processes that were there before, and PyTorch would wait for them;
    a prefix of its own for each attempt keeps them apart.
    """
    store, rank, world_size = next(rendezvous("env://"))
    store = PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    on_cuda = config.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world_size)


@contextmanager
def noticed_losses() -> Iterator[None]:
    """Turns what torch.distributed raises when another process is gone into a sentence.

    Raises:
        LocalGradError: a process that this one waited for has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not of_another_process(error):
            raise
        raise LocalGradError(
            "another process of this run has ended, so this one stops too; the last checkpoint holds: continue with "
            f"--resume ({str(error).partition('. ')[0]})"
        ) from error


def make_fabric(config: TrainConfig) -> Any:
    """The Fabric of a config: its devices, with `auto` precision decided.

    Raises:
        LocalGradError: this machine does not have the accelerator, or not as many devices.
    """
    from lightning.fabric import Fabric

    if restarted() and not dist.is_initialized():
        _join_again(config)
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
    """What `precision` stands for, made here: Fabric would log a line about it."""
    from lightning.fabric.plugins import MixedPrecision, Precision

    if resolve_precision(config) == "32-true":
        return [Precision()]
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next((kind for kind, here in present.items() if here and config.accelerator in ("auto", kind)), "cpu")
    return [MixedPrecision(precision="bf16-mixed", device=device)]


def resolve_precision(config: TrainConfig) -> Any:
    """What `auto` stands for: bf16-mixed where the processor or GPU computes bfloat16 natively, else 32-true."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif config.accelerator == "mps" or (config.accelerator == "auto" and torch.backends.mps.is_available()):
        native = False
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next allocation, instead of giving it back to the system.

    A local step frees the activations of a block and allocates the next block's, over and over. With glibc's defaults
    the heap may shrink and grow each time, at a page fault for every 4 KiB. The process keeps the peak of its tensors
    of less than 32 MiB until it ends; larger ones go back to the system as before. Nothing happens where the C library
    is another.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 64 << 20)


def provenance(device: torch.device) -> dict[str, Any]:
    """Where a result comes from: `device` name, `versions` and `commit`, as `Result` has them."""
    from importlib.metadata import version

    from localgrad import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    versions = {package: version(package) for package in ("torch", "torchvision", "lightning")}
    return {
        "device": name,
        "versions": {"localgrad": __version__, "python": platform.python_version(), **versions},
        "commit": _commit(),
    }


def _processor_name() -> str:
    """Name of the processor, with the number of threads that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} thread(s)"


def _commit() -> str | None:
    """Commit of the code, with `-dirty` if it was changed; None where it does not lie in its git repository."""
    source = Path(__file__)
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True, timeout=10)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
