"""Failed ranks, and ranks that torchrun has restarted."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from localgrad.core.wording import is_peer_failure
from localgrad.errors import LocalGradError


def restarted() -> bool:
    """Whether torchrun has restarted this process after the failure of a rank."""
    return dist.is_torchelastic_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def join_again(accelerator: str) -> None:
    """Initialise the process group of ranks that torchrun has restarted.

    torchrun's store still holds the addresses of the ranks before the restart, and PyTorch would wait for them. A
    prefix for each attempt keeps the attempts apart.

    Args:
        accelerator: the accelerator of the config. For `auto` and `cuda` with a CUDA device the backend is NCCL, else
            gloo.
    """
    store, rank, world_size = next(rendezvous("env://"))
    prefix = f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]
    on_cuda = accelerator in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world_size)


@contextmanager
def peer_failure_as_error() -> Generator[None]:
    """Context: translate an error of torch.distributed (another rank has died) into a LocalGradError.

    Raises:
        LocalGradError: a rank that this one waited for has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        raise LocalGradError(
            "another process of this run has ended, so this one stops too; the last checkpoint holds: continue with "
            f"--resume ({str(error).partition('. ')[0]})"
        ) from error
