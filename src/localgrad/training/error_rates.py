"""Test error of a network and of each block's local head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.data.sets import ImageSet


@torch.no_grad()
def error_rates(
    fabric: Any, config: TrainConfig, model: nn.Module, blocks: Sequence[Block], images: ImageSet
) -> tuple[float, list[float | None] | None]:
    """Top-1 error in percent, in eval mode, of the model's own forward and, if the config asks, of each block's head.

    Args:
        fabric: devices and precision; each device takes its share of the images.
        config: says the batch size, the memory format, and whether local heads are wanted.
        model: the whole network, left in training mode.
        blocks: its blocks, left in training mode.
        images: the test set.

    Returns:
        The network's error, and one error a block (None for a block without a class head), or None for all of them.
    """
    modules = (model, *blocks)
    for module in modules:
        module.eval()
    wrong = torch.zeros(1 + len(blocks), dtype=torch.int64, device=fabric.device)
    headless: set[int] = set()
    for inputs, targets in images.batches(
        max(1, config.optim.batch_size // fabric.world_size),
        train=False,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        device=fabric.device,
        channels_last=config.channels_last,
    ):
        with fabric.autocast():
            wrong[0] += _count_wrong(model(inputs), targets)
            features = inputs
            for index, block in enumerate(blocks if config.local_heads else (), start=1):
                features = block.body(features)
                scores = block.local_logits(features)
                if scores is None:
                    headless.add(index)
                else:
                    wrong[index] += _count_wrong(scores, targets)
    for module in modules:
        module.train()
    shares = [100 * count / len(images) for count in fabric.all_reduce(wrong, reduce_op="sum").tolist()]
    if not config.local_heads:
        return shares[0], None
    return shares[0], [None if index in headless else shares[index] for index in range(1, len(shares))]


def _count_wrong(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(1) != targets).sum()
