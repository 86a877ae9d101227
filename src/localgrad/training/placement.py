"""Where blocks and images are: on one device, or divided between ranks by images, by images and weights, or by blocks.

Four classes have the same attributes and methods, and the trainer does not ask which of them it has:

    own                     indices of the blocks that this rank trains
    replicas, replica       number of ranks (or pipelines) that share a batch's images, and index of this one
    wrapped                 this rank's blocks to call, each in its DistributedDataParallel wrapper if there is one
    fused                   whether the optimizers may be fused
    on_output               if not None, called with the detached output of this rank's last block, before its backward
    batches(...)            batches of one epoch: inputs, targets and, with blocks on several ranks, features
    no_sync()               context of every micro-batch but the last, whose backward averages gradients over ranks
    before_updates()        called between the gradients and the optimizers
    all_reduce_max(flag)    maximum in place, over the ranks that decide together whether a step is finite
    mean(values)            mean over the ranks, if each has all blocks and a part of the images; else the values
    totals(sums)            `State.sums` of all blocks, averaged over replicas, from the sums of this rank's blocks
    stop(interrupted)       whether to stop after this step; the same answer on every rank
    gather()                with blocks on several ranks, gives every rank the weights of all blocks; else a no-op
    gather_list(values)     from one value for each block of this rank to one for each block of all ranks
    evaluating()            context: every rank can run the model's own forward pass, with equal weights and buffers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.data.sets import ImageSet
from localgrad.parallel.batchnorm import synchronise
from localgrad.parallel.pipeline import Stage, block_seconds, place
from localgrad.parallel.shards import shard, unsharded
from localgrad.training.device_values import AnyRank

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Batches = Iterator[tuple[Tensor, ...]]
Stop = Callable[[], bool]


class OneDevice:
    """All blocks and all images of a batch on one device."""

    replicas, replica = 1, 0
    fused = True
    on_output = None

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.own = range(len(blocks))
        self.wrapped: list[nn.Module] = list(blocks)

    def batches(self, images: ImageSet, batch_size: int, stop: Stop, **order: Any) -> Batches:
        return images.batches(batch_size, train=True, **order)

    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def before_updates(self) -> None:
        pass

    def all_reduce_max(self, flag: Tensor) -> None:
        pass

    def mean(self, values: Tensor) -> Tensor:
        return values

    def totals(self, sums: Tensor) -> list[float]:
        return sums.tolist()

    def stop(self, interrupted: bool) -> bool:
        return interrupted

    def gather(self) -> None:
        pass

    def gather_list(self, values: list[Any]) -> list[Any]:
        return values

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


class DataParallel:
    """Data parallelism: every rank has all blocks, each in its DistributedDataParallel wrapper, and a part of a batch.

    Before an evaluation every rank gets the running statistics of rank 0.
    """

    fused = True
    on_output = None

    def __init__(self, model: nn.Module, blocks: Sequence[Block], fabric: Fabric) -> None:
        device = fabric.device
        self.own = range(len(blocks))
        self.replicas, self.replica = fabric.world_size, fabric.global_rank
        device_ids = [device.index] if device.type == "cuda" else None
        self._ddp = [nn.parallel.DistributedDataParallel(block, device_ids=device_ids) for block in blocks]
        self.wrapped: list[nn.Module] = list(self._ddp)
        self.any_rank = AnyRank(device, late=device.type == "cuda")
        self._networks = (model, *blocks)

    def batches(self, images: ImageSet, batch_size: int, stop: Stop, **order: Any) -> Batches:
        return images.batches(batch_size, train=True, rank=self.replica, world_size=self.replicas, **order)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self._ddp:
                stack.enter_context(block.no_sync())
            yield

    def before_updates(self) -> None:
        pass

    def all_reduce_max(self, flag: Tensor) -> None:
        dist.all_reduce(flag, dist.ReduceOp.MAX)

    def mean(self, values: Tensor) -> Tensor:
        return _mean(values)

    def totals(self, sums: Tensor) -> list[float]:
        return _mean(sums).tolist()

    def stop(self, interrupted: bool) -> bool:
        return self.any_rank(interrupted)

    def gather(self) -> None:
        pass

    def gather_list(self, values: list[Any]) -> list[Any]:
        return values

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        _broadcast_buffers(self._networks)
        yield


class Sharded:
    """Every rank has a shard of each parameter (FSDP2, one FSDP unit per block) and a part of a batch.

    Before an evaluation every rank gets the running statistics of rank 0.

    Raises:
        LocalGradError: parameters are outside the units' layers (see `localgrad.parallel.shards.shard`).
    """

    fused = False
    """FSDP2's parameters are DTensors, which fused optimizers do not take."""
    on_output = None

    def __init__(self, model: nn.Module, blocks: Sequence[Block], fabric: Fabric) -> None:
        device = fabric.device
        shard(model, blocks, device, fabric.world_size)
        self.own = range(len(blocks))
        self.replicas, self.replica = fabric.world_size, fabric.global_rank
        self.wrapped: list[nn.Module] = list(blocks)
        self.any_rank = AnyRank(device, late=device.type == "cuda")
        self._blocks, self._networks = blocks, (model, *blocks)

    def batches(self, images: ImageSet, batch_size: int, stop: Stop, **order: Any) -> Batches:
        return images.batches(batch_size, train=True, rank=self.replica, world_size=self.replicas, **order)

    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()  # every micro-batch reduces gradients to shards; unreduced ones would take more memory

    def before_updates(self) -> None:
        pass

    def all_reduce_max(self, flag: Tensor) -> None:
        dist.all_reduce(flag, dist.ReduceOp.MAX)

    def mean(self, values: Tensor) -> Tensor:
        return _mean(values)

    def totals(self, sums: Tensor) -> list[float]:
        return _mean(sums).tolist()

    def stop(self, interrupted: bool) -> bool:
        return self.any_rank(interrupted)

    def gather(self) -> None:
        pass

    def gather_list(self, values: list[Any]) -> list[Any]:
        return values

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        _broadcast_buffers(self._networks)
        with unsharded(self._blocks):
            yield


class BlockParallel:
    """Consecutive blocks on each rank, in one or several parallel pipelines (see `localgrad.parallel.pipeline.Stage`).

    Each rank decides alone whether its gradients are finite: for a common decision it would wait for the last rank.
    """

    fused = True

    def __init__(self, stage: Stage, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._stage = stage
        self.own, self.wrapped = stage.own, stage.wrapped
        self.replicas, self.replica = dist.get_world_size() // stage.num_stages, stage.replica
        self.on_output = stage.send
        self._num_blocks, self._networks = len(blocks), (model, *blocks)

    def batches(self, images: ImageSet, batch_size: int, stop: Stop, **order: Any) -> Batches:
        share: Any = {"train": True, "rank": self.replica, "world_size": self.replicas}
        sizes = images.batch_sizes(batch_size, start=order["start"], **share)
        return self._stage.batches(images.batches(batch_size, **share, **order), sizes, stop)

    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()  # a batch is never cut into micro-batches here

    def before_updates(self) -> None:
        self._stage.take_weights()

    def all_reduce_max(self, flag: Tensor) -> None:
        pass

    def mean(self, values: Tensor) -> Tensor:
        return values

    def totals(self, sums: Tensor) -> list[float]:
        total = sums.new_zeros(self._num_blocks + 1)
        total[self.own.start : self.own.stop], total[-1] = sums[:-1], sums[-1]
        dist.all_reduce(total)
        return [*(total[:-1] / self.replicas).tolist(), float(total[-1] / dist.get_world_size())]

    def stop(self, interrupted: bool) -> bool:
        return self._stage.is_last_batch  # the first rank decided it before the batch began

    def gather(self) -> None:
        self._stage.gather()

    def gather_list(self, values: list[Any]) -> list[Any]:
        return [value for own in self._stage.gather_objects(values) for value in own]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self._stage.gather()
        if self.replicas > 1:
            _broadcast_buffers(self._networks)
        yield


Placement = OneDevice | DataParallel | Sharded | BlockParallel


def place_blocks(
    config: TrainConfig, fabric: Fabric, model: nn.Module, blocks: Sequence[Block], images: ImageSet
) -> Placement:
    """Divide the work between the ranks as the config says: images, images and weights, or blocks.

    Args:
        config: the config of the run; `parallel`, `replicas` and `sync_batchnorm` are used.
        fabric: the launched Fabric.
        model, blocks: on this rank's device; changed in place if norms are synchronised or weights sharded.
        images: the training set; one of its batches is used to measure the time of each block.

    Raises:
        LocalGradError: there are fewer blocks than ranks of a pipeline, or the weights cannot be sharded.
    """
    if fabric.world_size == 1:
        return OneDevice(blocks)
    if config.parallel == "blocks":
        return _on_stages(config, fabric, model, blocks, images)
    for block in blocks if config.sync_batchnorm else ():
        synchronise(block)
    return {"data": DataParallel, "shards": Sharded}[config.parallel](model, blocks, fabric)


def _on_stages(
    config: TrainConfig, fabric: Fabric, model: nn.Module, blocks: Sequence[Block], images: ImageSet
) -> BlockParallel:
    """Place consecutive blocks on each rank so that ranks need about equal time; rank 0 measures the blocks."""
    num_stages = fabric.world_size // config.replicas
    seconds = [1.0] * len(blocks)
    place(seconds, num_stages)  # refuses too few blocks on every rank
    if fabric.is_global_zero:
        inputs, targets = next(iter(images.batches(config.optim.batch_size // config.replicas, train=True)))
        seconds = block_seconds(blocks, inputs, targets, context=lambda index: fabric.autocast())
    stage = Stage(blocks, place(fabric.broadcast(seconds), num_stages), config.replicas)
    for block in stage.blocks if config.sync_batchnorm and config.replicas > 1 else ():
        synchronise(block, stage.replica_group)
    return BlockParallel(stage, model, blocks)


def _mean(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def _broadcast_buffers(modules: Sequence[nn.Module]) -> None:
    """Broadcast rank 0's buffers: ranks have running statistics of different images, and checkpoints have rank 0's."""
    for buffer in {id(buffer): buffer for module in modules for buffer in module.buffers()}.values():
        dist.broadcast(buffer, 0)
