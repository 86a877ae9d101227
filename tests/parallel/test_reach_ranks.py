"""Reach under data parallelism: each rank's gradients are averaged, whichever backward pass they come from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from localgrad import dgl, man, split
from localgrad.core.step import local_gradients
from localgrad.models import cifar_resnet


def blocks_of() -> list[Any]:
    torch.manual_seed(0)
    model = cifar_resnet(8).double()
    example = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
    return split(model, example, cuts=["conv1", "layer1.0", "layer2.0"], objective=dgl(10), momentum=man(0.9))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 3, 12, 12, generator=generator, dtype=torch.float64), torch.arange(6)


def gradients(blocks: list[Any]) -> list[Tensor]:
    return [p.grad for block in blocks for p in block.parameters() if p.grad is not None]


def run(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for reach in (1, 2, 4):
        blocks = blocks_of()
        wrapped = [nn.parallel.DistributedDataParallel(block) for block in blocks]
        local_gradients(wrapped, *batch(rank), reach=reach)
        alone = []
        for each in (0, 1):
            twin = blocks_of()
            local_gradients(twin, *batch(each), reach=reach)
            alone.append(gradients(twin))
        for found, first, second in zip(gradients(blocks), *alone, strict=True):
            torch.testing.assert_close(found, (first + second) / 2)
    dist.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_get_the_mean_of_their_gradients(tmp_path: Path) -> None:
    mp.spawn(run, args=(str(tmp_path / "meeting"),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
