"""How often a trained network is wrong: the user's own forward, and each block's own head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.blocks import Block
from localgrad.config import TrainConfig
from localgrad.data import DataConfig
from localgrad.errors import LocalGradError
from localgrad.images import ImageSet
from localgrad.runs import RunFolder, load_state
from localgrad.sources import load_images


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    test_error: float
    """Test error in percent."""
    local_errors: list[float | None] | None
    """Test error in percent of each block's own head (None where it has none), when that was asked for."""
    images: int
    """Number of test images."""


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


def _load_heads(blocks: Sequence[Block], folder: RunFolder, epochs: int) -> None:
    path, saved = folder.newest_checkpoint()
    epoch = saved["state"].get("epoch") if isinstance(saved.get("state"), dict) else None
    if not isinstance(epoch, int) or epoch <= epochs:
        raise LocalGradError(
            f"{path} is not of the end of the run, as its local heads would have to be; leave them out"
        )
    loaders = [block.load_auxiliary_state_dict for block in blocks]
    load_state(
        lambda states: [load(part) for load, part in zip(loaders, states, strict=True)], saved.get("auxiliary"), path
    )


def _test_only(config: DataConfig, source: str | None, split: str | None) -> DataConfig:
    """The config with its test split in both places, so that no other is needed."""
    split = split or config.test_split
    config = replace(config, train_limit=1, test_split=split, train_split=split if config.on_disk else "train")
    return config if source is None else replace(config, source=source, train_split=split, test_limit=None)


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    test_split: str | None = None,
    local_heads: bool = False,
    accelerator: str = "auto",
) -> Evaluation:
    """Evaluates the weights that a finished run left in its folder.

    Args:
        run_dir: the run folder.
        data: other images, a hub name or a folder, all of them; None for those the run was tested on.
        test_split: another split to test on; only this one is read.
        local_heads: evaluate each block's own head too, from the checkpoint.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        Errors in percent, and the number of images.

    Raises:
        LocalGradError: the folder holds no finished run, a file in it is damaged, the images have other classes than
            the network, or local heads are asked for and the last checkpoint is not there or damaged.
    """
    from localgrad.build import build_blocks, build_model
    from localgrad.devices import make_fabric

    folder = RunFolder(Path(run_dir))
    config = folder.config()
    config = replace(
        config,
        accelerator=accelerator,
        devices=1,
        local_heads=local_heads,
        data=_test_only(config.data, data, test_split),
    )
    fabric = make_fabric(config)
    _, test = load_images(config.data)
    trained = folder.num_classes()
    if trained not in (None, test.num_classes):
        raise LocalGradError(
            f"{config.data.source} has {test.num_classes} classes and the network of {folder.path} tells {trained} "
            "apart; give --data with the same classes in the same order"
        )
    model = build_model(config.model, test.num_classes)
    folder.load_model(model)
    blocks = build_blocks(config, model, test.num_classes) if local_heads else []
    if local_heads:
        _load_heads(blocks, folder, config.optim.epochs)
    for module in (model, *blocks):
        module.to(fabric.device)
    test_error, local_errors = error_rates(fabric, config, model, blocks, test.to(fabric.device))
    return Evaluation(test_error, local_errors, len(test))
