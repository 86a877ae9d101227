"""Processes for tests of what runs on several ranks: started from a server that has torch imported already."""

import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 90.0) -> list[Any]:
    """What `function(*arguments)` returns on each of `world_size` gloo ranks, on one thread each."""
    multiprocessing.set_forkserver_preload(
        ["torch", "torch.distributed", "lightning.fabric", "localgrad.training.trainer"]
    )
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, address, answers, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=timeout) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    values = [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(world_size)]
    for value in values:
        if isinstance(value, BaseException):
            raise value
    return values


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, address: str, answers: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    host, _, port = address.partition(":")
    os.environ |= {  # what torchrun sets
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
    }
    dist.init_process_group("gloo")
    try:
        answer = function(*arguments)
    except KeyboardInterrupt as error:
        answer = KeyboardInterrupt(str(error))
    except Exception as error:
        answer = error
    written = io.BytesIO()  # the tensors themselves would be gone with this process
    torch.save(answer, written)
    answers.put((rank, written.getvalue()))
    if dist.is_initialized():
        dist.destroy_process_group()
