"""Load a finished run from its folder onto a device: network, blocks and images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from localgrad.config.build import build_blocks, build_model
from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.data.config import DataConfig
from localgrad.data.loading import load_images
from localgrad.data.sets import ImageSet
from localgrad.data.sources import check_source
from localgrad.errors import LocalGradError
from localgrad.results.read import read_result
from localgrad.runs.folder import RunFolder, load_state
from localgrad.training.devices import make_fabric


@dataclass(frozen=True)
class Trained:
    """A finished run, loaded."""

    folder: RunFolder
    config: TrainConfig
    """The config of the run, changed to one device and to the requested images."""
    fabric: Any
    model: nn.Module
    blocks: list[Block]
    """Blocks with their auxiliary networks; empty unless requested."""
    train: ImageSet
    """Training images; unless requested, a placeholder of one image."""
    test: ImageSet

    @property
    def cuts(self) -> list[str]:
        """Names of the units at which the gradient was stopped: the last unit of each block but the last."""
        return list(read_result(self.folder.result).cuts if self.config.cuts is None else self.config.cuts)


def load_trained(
    run_dir: str | Path,
    *,
    data: str | None = None,
    test_split: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    training_images: bool = False,
    with_blocks: bool = False,
    accelerator: str = "auto",
) -> Trained:
    """Load the trained weights of a finished run, and its images.

    Args:
        run_dir: the run folder.
        data: other images, as a hub name or a folder. None takes the images of the run.
        test_split: split to test on; None takes that of the run.
        train_limit: number of training images. None takes the run's limit, or all images if `data` is given.
        test_limit: number of test images; None as for `train_limit`.
        training_images: whether to load the training images. Otherwise the test split is read, and the training labels
            too if the run's own images are on disk: the classes of a folder are those of both splits.
        with_blocks: build the blocks and load their auxiliary networks from the checkpoint.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        LocalGradError: the folder holds no finished run, a file in it is damaged, or the images are missing or have
            other classes.
    """
    folder = RunFolder(Path(run_dir))
    config = folder.config()
    images = _chosen(config.data, data, test_split, train_limit, test_limit)
    if not training_images:
        images = _own_classes(images) if data is None and images.on_disk else _test_only(images)
    config = replace(config, accelerator=accelerator, devices=1, parallel="data", replicas=1, data=images)
    check_source(images)  # before slow work
    fabric = make_fabric(config)
    train, test = load_images(config.data)
    if data is None:
        own = config.data.on_disk or training_images  # otherwise the training images are a placeholder
        folder.check_images(train=train if own else None, test=test if test_split is None else None)
    classes, names = folder.classes()
    if classes not in (None, test.num_classes):
        raise LocalGradError(
            f"{config.data.source} has {test.num_classes} classes and the network of {folder.path} tells {classes} "
            "apart; give --data with the same classes in the same order"
        )
    if names and test.class_names and names != list(test.class_names) and {*names} & {*test.class_names}:
        raise LocalGradError(
            f"{config.data.source} has the classes {', '.join(test.class_names[:9])} and the network of {folder.path} "
            f"was trained on {', '.join(names[:9])}: give --data with the same classes in the same order"
        )
    model = build_model(config.model, test.num_classes)
    blocks = build_blocks(config, model, test.num_classes) if with_blocks else []
    folder.load_model(model)
    if blocks:
        _load_heads(blocks, folder, config.optim.epochs, stopped_early=config.patience is not None)
    for module in (model, *blocks):
        module.to(fabric.device)
    return Trained(folder, config, fabric, model, blocks, train.to(fabric.device), test.to(fabric.device))


def _load_heads(blocks: Sequence[Block], folder: RunFolder, epochs: int, *, stopped_early: bool) -> None:
    path, saved = folder.newest_checkpoint()
    epoch = saved["state"].get("epoch") if isinstance(saved.get("state"), dict) else None
    if not isinstance(epoch, int) or (epoch <= epochs and not stopped_early):
        raise LocalGradError(
            f"{path} is not of the end of the run, as its local heads would have to be; leave them out"
        )
    if saved.get("auxiliary") is None:
        raise LocalGradError(f"{path} has no auxiliary networks in it, so local heads cannot be loaded; leave them out")
    loaders = [block.load_auxiliary_state_dict for block in blocks]
    load_state(
        lambda states: [load(part) for load, part in zip(loaders, states, strict=True)], saved.get("auxiliary"), path
    )


def _chosen(
    config: DataConfig, source: str | None, test_split: str | None, train_limit: int | None, test_limit: int | None
) -> DataConfig:
    if source is not None:
        config = replace(config, source=source, train_limit=None, test_limit=None, test_fraction=None)
    return replace(
        config,
        test_split=test_split or config.test_split,
        train_limit=train_limit or config.train_limit,
        test_limit=test_limit or config.test_limit,
    )


def _own_classes(config: DataConfig) -> DataConfig:
    """The config with one training image. The training split is still needed: a folder's classes are those of both."""
    return replace(config, train_limit=1)


def _test_only(config: DataConfig) -> DataConfig:
    """The config with one training image. Of images on disk it is from the test split, so no other split is read."""
    return replace(config, train_limit=1, train_split=config.test_split if config.on_disk else "train")
