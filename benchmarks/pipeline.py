"""Measure images per second on several ranks: block-parallel local learning, and end-to-end alternatives.

Every rank has one thread. The rows take turns of `--steps` steps, round by round. A ratio is the throughput of a row
divided by that of its method on one rank in the same round, median over the rounds.

    python benchmarks/pipeline.py --data path/to/cifar10 -o results/pipeline.json

The alternatives are pipeline parallelism of `torch.distributed.pipelining` (GPipe and 1F1B, in which batch norm sees
micro-batches) and data-parallel training.
"""

import argparse
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import localgrad
from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.core.split import split
from localgrad.core.step import local_step
from localgrad.data.loading import load_images
from localgrad.models import cifar_resnet
from localgrad.parallel.pipeline import Stage, block_seconds, place
from localgrad.recipes import recipe
from report import environment, print_table, write

Steps = Callable[[int], Any]


def batches(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented CIFAR-10 batches, without end."""
    config: TrainConfig = recipe("cifar10-resnet32-e2e").config
    train, _ = load_images(replace(config.data, source=options.data, train_limit=5000, test_limit=10))
    epoch = 0
    while True:
        epoch += 1
        for batch in train.batches(options.batch_size, train=True, epoch=epoch, channels_last=True):
            if len(batch[1]) == options.batch_size:
                yield batch


def network(options: argparse.Namespace) -> nn.Module:
    """The same network on every rank."""
    torch.manual_seed(0)
    return cifar_resnet(options.depth).to(memory_format=torch.channels_last)


def local_blocks(options: argparse.Namespace, momentum: bool) -> list[Block]:
    """K blocks of about equal compute, with DGL."""
    return split(
        network(options),
        torch.empty(2, 3, 32, 32),
        num_blocks=options.blocks,
        balance="compute",
        objective=localgrad.dgl(num_classes=10),
        momentum=localgrad.man() if momentum else None,
    )


def sgd(module: nn.Module) -> torch.optim.SGD:
    """The papers' optimizer."""
    parameters = module.trainable_parameters() if isinstance(module, Block) else list(module.parameters())
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


def on_one_rank(options: argparse.Namespace, data: Iterator[tuple[Tensor, Tensor]], momentum: bool) -> Steps:
    """Local learning on rank 0."""
    blocks = local_blocks(options, momentum)
    optimizers = [sgd(block) for block in blocks]

    def steps(count: int) -> None:
        for _ in range(count if dist.get_rank() == 0 else 0):
            local_step(blocks, optimizers, *next(data))

    return steps


def by_blocks(options: argparse.Namespace, data: Iterator[tuple[Tensor, Tensor]], momentum: bool) -> Steps:
    """Local learning with the blocks on all ranks, placed by measured cost."""
    blocks = local_blocks(options, momentum)
    seconds: list[list[float] | None] = [block_seconds(blocks, *next(data)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(seconds)
    assert seconds[0] is not None
    stage = Stage(blocks, place(seconds[0], dist.get_world_size()))
    optimizers = [sgd(block) for block in stage.blocks]

    def steps(count: int) -> None:
        for inputs, targets, features in stage.batches(data, [options.batch_size] * count):
            stage.step(optimizers, inputs, targets, features)

    return steps


def end_to_end(options: argparse.Namespace, data: Iterator[tuple[Tensor, Tensor]]) -> Steps:
    """End-to-end training on rank 0."""
    model = network(options)
    optimizer = sgd(model)

    def steps(count: int) -> None:
        for _ in range(count if dist.get_rank() == 0 else 0):
            inputs, targets = next(data)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def data_parallel(options: argparse.Namespace, data: Iterator[tuple[Tensor, Tensor]]) -> Steps:
    """Data-parallel end-to-end training: each rank has a shard of the batch."""
    model = nn.parallel.DistributedDataParallel(network(options))
    optimizer = sgd(model)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def steps(count: int) -> None:
        for _ in range(count):
            inputs, targets = next(data)
            F.cross_entropy(model(inputs[rank::world_size]), targets[rank::world_size]).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


class _Contiguous(torch.autograd.Function):
    """Make features and gradients contiguous (NCHW), as `torch.distributed.pipelining` needs them with gloo."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


class Piece(nn.Module):
    """The units of one rank, which receives and sends contiguous tensors (NCHW)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        return _Contiguous.apply(self.body(_Contiguous.apply(features)))  # pyright: ignore


def pipelined(options: argparse.Namespace, data: Iterator[tuple[Tensor, Tensor]], schedule: Any, parts: int) -> Steps:
    """Pipeline-parallel end-to-end training: units divided over the ranks by compute, `parts` micro-batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    example = torch.empty(2, 3, 32, 32)
    pieces = split(
        network(options), example, num_blocks=world_size, balance="compute", objective=localgrad.classifier(10)
    )
    body = Piece(pieces[rank].body)
    stage = PipelineStage(body, rank, world_size, torch.device("cpu"))
    runner = schedule(stage, parts, loss_fn=F.cross_entropy)
    optimizer = sgd(body)

    def steps(count: int) -> None:
        for _ in range(count):
            inputs, targets = next(data)
            runner.step(*([inputs] if rank == 0 else []), **({"target": targets} if rank == world_size - 1 else {}))
            optimizer.step()
            optimizer.zero_grad()

    return steps


def bandwidth(numel: int = 2**22, rounds: int = 10) -> float:
    """Bandwidth from rank 0 to rank 1 in bytes per second."""
    tensor = torch.zeros(numel)
    times = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
        elif dist.get_rank() == 1:
            dist.recv(tensor, 0)
        times.append(time.perf_counter() - begin)
    return 4 * numel / statistics.median(times)


def work(rank: int, address: str, world_size: int, options: argparse.Namespace, answers: Any) -> None:
    """One rank: builds the rows and times them round by round; rank 0 puts the results into `answers`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    data = batches(options)
    rows: dict[str, Steps] = {
        "DGL, one rank": on_one_rank(options, data, momentum=False),
        "DGL, block-parallel": by_blocks(options, data, momentum=False),
        "DGL+MAN, one rank": on_one_rank(options, data, momentum=True),
        "DGL+MAN, block-parallel": by_blocks(options, data, momentum=True),
        "end-to-end, one rank": end_to_end(options, data),
        "end-to-end, data-parallel": data_parallel(options, data),
        "end-to-end, GPipe, 8 micro-batches": pipelined(options, data, ScheduleGPipe, 8),
        "end-to-end, 1F1B, 8 micro-batches": pipelined(options, data, Schedule1F1B, 8),
    }
    seconds: dict[str, list[float]] = {label: [] for label in rows}
    for number in range(options.rounds + 1):
        for label, steps in rows.items():
            dist.barrier()
            begin = time.perf_counter()
            steps(options.steps if number else 3)  # the first round does not count
            dist.barrier()
            if number:
                seconds[label].append((time.perf_counter() - begin) / options.steps)
    link = bandwidth()
    if rank == 0:
        blocks = {
            label: block_seconds(local_blocks(options, momentum), *next(data), rounds=9)
            for label, momentum in (("DGL", False), ("DGL+MAN", True))
        }
        answers.put((seconds, link, blocks))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10, a hub name or a folder")
    parser.add_argument("--depth", type=int, default=32, help="layers of the CIFAR ResNet")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--steps", type=int, default=30, help="steps of each row in a round; ranks fill up in the first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("-o", "--output", type=Path, default=Path("results/pipeline.json"))
    options = parser.parse_args()
    measured = [measure(options, world_size) for world_size in options.ranks]
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data")}
    write(options.output, {"settings": settings, "measured": measured, **environment()})


def measure(options: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """Measure all rows on `world_size` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (address, world_size, options, answers), nprocs=world_size)  # pyright: ignore[reportPrivateImportUsage]
    seconds, link, blocks = answers.get()
    rows = []
    for label, times in seconds.items():
        alone = seconds[f"{label.partition(',')[0]}, one rank"]
        rows.append(
            {
                "row": label,
                "images_per_second": options.batch_size / statistics.median(times),
                "times_one_rank": statistics.median(a / b for a, b in zip(alone, times, strict=True)),
            }
        )
    print_table(f"CIFAR ResNet-{options.depth}, {options.blocks} blocks, {world_size} ranks of one thread", rows)
    return {
        "ranks": world_size,
        "rows": rows,
        "seconds_per_step": seconds,
        "bytes_per_second": link,
        "block_seconds": blocks,
    }


if __name__ == "__main__":
    main()
