"""Sharded weights (FSDP2): each rank keeps a shard of every weight, and gathers a block's weights while it computes."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from localgrad.core.block import Block
from localgrad.core.trees import mapped
from localgrad.errors import LocalGradError


def shard(model: nn.Module, blocks: Sequence[Block], device: torch.device, world_size: int) -> None:
    """Shard the weights of every block over all ranks, auxiliary networks included, in place.

    Parameters become DTensors, so make optimizers afterwards. An EMA and the unit that it follows have the same shapes,
    hence the same shards: the average needs no communication.

    Args:
        model: the whole network.
        blocks: its blocks; each becomes one FSDP unit.
        device: device of this rank.
        world_size: number of ranks.

    Raises:
        LocalGradError: the model has parameters outside the units' layers, which would not be sharded.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    in_blocks = {module for block in blocks for module in block.modules()}
    outside = [
        f"{path}.{name}".removeprefix(".")
        for path, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
        if module not in in_blocks
        for name, _ in module.named_parameters(recurse=False)
    ]
    if outside:
        raise LocalGradError(
            f"the weights {', '.join(outside[:3])} are in no layer of a unit, and FSDP2 shares out those of layers "
            "only: use --parallel data or --parallel blocks"
        )
    mesh = init_device_mesh(device.type, (world_size,))
    for block in blocks:
        block.to(memory_format=torch.contiguous_format)  # FSDP2 refuses channels-last weights, not features
        fully_shard(block, mesh=mesh)


@contextmanager
def unsharded(blocks: Sequence[nn.Module]) -> Generator[None]:
    """Context: all-gather the weights of every sharded block, because the model's own forward pass needs them.

    All ranks must enter and leave together. The weights are sharded again at the end, also after an error.
    """
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for block in sharded:
        block.unshard()
    try:
        yield
    finally:
        for block in sharded:
            block.reshard()


def gathered_state(values: Any) -> Any:
    """The tree with every DTensor gathered into a full tensor, on every rank; other leaves stay."""
    return mapped(DTensor.full_tensor, values, DTensor)


def sharded_as(values: Any, like: dict[str, Any]) -> Any:
    """A saved dict of full tensors, in which those are sharded that are sharded in `like`; other values stay."""
    if not isinstance(values, dict):
        return values
    table = cast("dict[str, Any]", values)
    return {
        name: distribute_tensor(value, like[name].device_mesh, like[name].placements)
        if isinstance(like.get(name), DTensor) and value.shape == like[name].shape
        else value
        for name, value in table.items()
    }


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard the state of a loaded optimizer like its parameters."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            like = dict.fromkeys(state, parameter)
            state.update(sharded_as(state, like))
