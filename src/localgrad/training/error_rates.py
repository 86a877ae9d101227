"""Test error of a trained network and of each block's local head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from localgrad.core.block import Block
from localgrad.data.sets import ImageSet

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@torch.no_grad()
def error_rates(
    fabric: Fabric,
    model: nn.Module,
    blocks: Sequence[Block],
    images: ImageSet,
    *,
    batch_size: int,
    channels_last: bool = False,
) -> tuple[float, list[float | None] | None]:
    """Top-1 error in percent, in evaluation mode, of the model's own forward pass and of each block's local head.

    Args:
        fabric: devices and precision; the images are divided between the ranks.
        model: the whole network.
        blocks: blocks whose local heads are evaluated too, all from the first one on; empty for the network alone.
        images: the test set.
        batch_size: number of images per batch, on all ranks together.
        channels_last: whether images have the channels-last memory format.

    Returns:
        The network's error, and a list with the error of each block (None for a block without a class head). The list
        is None without blocks.
    """
    wrong = torch.zeros(1 + len(blocks), dtype=torch.int64, device=fabric.device)
    headless: set[int] = set()
    batches = images.batches(
        max(1, batch_size // fabric.world_size),
        train=False,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        device=fabric.device,
        channels_last=channels_last,
    )
    with evaluation_mode(model, *blocks):
        for inputs, targets in batches:
            with fabric.autocast():
                wrong[0] += _count_wrong(model(inputs), targets)
                features = inputs
                for index, block in enumerate(blocks, start=1):
                    features = block.body(features)
                    scores = block.local_logits(features)
                    if scores is None:
                        headless.add(index)
                    else:
                        wrong[index] += _count_wrong(scores, targets)
    counts: Any = fabric.all_reduce(wrong, reduce_op="sum")
    errors = [100 * count / len(images) for count in counts.tolist()]
    local = [None if index in headless else errors[index] for index in range(1, len(errors))]
    return errors[0], local or None


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Context: evaluation mode. At the end, also after an error, each submodule gets its own mode back."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _count_wrong(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(1) != targets).sum()
