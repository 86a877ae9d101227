"""Build the objects of a run from a config; no folder is needed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from localgrad.config.build import build_blocks, build_model, build_optimizers
from localgrad.config.networks import check_scores, is_own
from localgrad.config.schema import TrainConfig
from localgrad.config.weights import load_weights
from localgrad.core.block import Block
from localgrad.data.loading import Say, load_images, load_validation, untold
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError
from localgrad.parallel.batchnorm import BatchNorm
from localgrad.training.devices import make_fabric
from localgrad.training.nonfinite import Skips, choose_check
from localgrad.training.outlook import crowded_here
from localgrad.training.placement import place_blocks
from localgrad.training.run import Run
from localgrad.training.state import State
from localgrad.training.step import plain_update, recorded_update

if TYPE_CHECKING:
    from lightning.fabric import Fabric


logger = logging.getLogger(__name__)


def build_run(
    config: TrainConfig,
    images: tuple[ImageSet, ImageSet] | None = None,
    fabric: Fabric | None = None,
    say: Say = logger.warning,
    *,
    fresh: bool = True,
) -> Run:
    """Build the objects of a run on their devices. Nothing is written to disk.

    The config's seed sets torch's global generator before model and auxiliary networks are initialised.

    Args:
        config: a validated config; if it will be saved, with its defaults filled in by `with_defaults`.
        images: training and test set; by default loaded from the config's source.
        fabric: a Fabric that is not launched yet; by default made from the config.
        say: function that rank 0 calls with sentences about progress and about images that are left out.
        fresh: whether to load the config's initial weights; False if a checkpoint will replace them.

    Raises:
        LocalGradError: devices or images do not exist or do not fit the config, the network or its initial weights
            cannot be built, or the network cannot be cut as the config says.
    """
    fabric = fabric or make_fabric(config)
    fabric.launch()
    device = fabric.device
    if config.cuda_graph and device.type != "cuda":
        raise LocalGradError(
            f"cuda_graph is on and the device is {device.type}: it takes a CUDA device; leave --cuda-graph out"
        )
    say = say if fabric.is_global_zero else untold
    if images is None:
        say(f"reading the images of {config.data.source}")
        images = load_images(config.data, say=say)
    train, test = (_moved(each, device) for each in images)
    if device.type == "cpu" and (busy := crowded_here()):
        say(busy)
    torch.manual_seed(config.seed)
    model = _network(config, train.num_classes, fresh, say)
    blocks = build_blocks(config, model, train.num_classes)
    _check_trained(config, blocks)
    for module in (model, *blocks):
        module.to(device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    _check_batches(config, model, train, fabric.world_size)
    if config.parallel == "blocks" and fabric.world_size > 1:
        say("measuring a step of each block, to share the blocks between the ranks")
    placement = place_blocks(config, fabric, model, blocks, train)
    own = [blocks[index] for index in placement.own]
    optimizers = build_optimizers(config.optim, own, fused=placement.fused, capturable=config.cuda_graph)
    state = State(sums=[0.0] * (len(blocks) + 1))
    check = choose_check(Skips(config, state, blocks, placement), optimizers, device)
    parts: Any = (config, fabric, train, test, model, blocks, placement, optimizers, state, check)
    run = Run(*parts, update=lambda *batch: plain_update(run, *batch))
    if config.data.validation_split is not None:
        run.validation = _moved(load_validation(config.data, say), device)
    if config.cuda_graph:
        run.rate = torch.zeros((), device=device)
        run.update = recorded_update(run)
    return run


def _network(config: TrainConfig, num_classes: int, fresh: bool, say: Say) -> nn.Module:
    say(f"building and cutting {config.model.name} for {num_classes} classes")
    model = build_model(config.model, num_classes)
    if is_own(config.model):
        check_scores(model, config.model.name, config.data.image_size, num_classes)
    if fresh and (loaded := load_weights(model, config.model, num_classes, config.data)):
        say(loaded)
    return model


def _moved(images: ImageSet, device: torch.device) -> ImageSet:
    try:
        return images.to(device)
    except torch.OutOfMemoryError as error:
        raise LocalGradError(
            f"the {len(images):,} images of {images.config.image_size} x {images.config.image_size} pixels do not fit "
            f"into the memory of {device} beside what is there: decode them while training, --data.streaming"
        ) from error


def _check_trained(config: TrainConfig, blocks: list[Block]) -> None:
    """Refuse a block whose parameters are all frozen: it has nothing to train."""
    for number, block in enumerate(blocks, start=1):
        if not block.trainable_parameters():
            frozen = ", ".join(config.model.freeze)
            raise LocalGradError(
                f"block {number} of {len(blocks)} ({block.names[0]} to {block.names[-1]}) has nothing to train, with "
                f"--freeze {frozen}: leave out the cut after {block.names[-1]}, or freeze less"
            )


def _check_batches(config: TrainConfig, model: nn.Module, images: ImageSet, world_size: int) -> None:
    """Refuse a training set that is too small for a batch, and with BatchNorm a batch or micro-batch of one image."""
    replicas = config.replicas if config.parallel == "blocks" else world_size
    batch_size = config.optim.batch_size // replicas
    images.batches(batch_size, train=True, world_size=replicas)  # raises the error already here
    if not any(isinstance(module, BatchNorm) for module in model.modules()):
        return
    if batch_size == 1:
        raise LocalGradError(
            f"optim.batch_size {config.optim.batch_size} on {replicas} device(s) leaves a batch norm "
            "one image, which it cannot normalise; give two or more for each device"
        )
    last = len(images) // replicas % batch_size
    sizes = [size for size in (min(batch_size, len(images)), last) if size >= 2]
    if any(size // min(config.optim.accumulate, size) == 1 for size in sizes):  # the smallest micro-batch of each
        raise LocalGradError(
            f"optim.accumulate {config.optim.accumulate} with batches of {sizes} images leaves a micro-batch "
            "of one image, which a BatchNorm cannot normalise; use fewer micro-batches or another batch size"
        )
