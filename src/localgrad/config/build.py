"""Build the objects that a config describes: the model, its blocks, the optimizers."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from localgrad.config.methods import MOMENTA, OBJECTIVES, Method, planned_objective
from localgrad.config.networks import build_model as build_model
from localgrad.config.schema import OptimConfig, TrainConfig
from localgrad.core.block import Block
from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.core.split import split
from localgrad.errors import DefaultsWarning


def build_blocks(config: TrainConfig, model: nn.Module, num_classes: int) -> list[Block]:
    """Split a model into the blocks of a config; the criterion of the last block is the cross-entropy."""
    objective, momentum = build_factories(config, num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DefaultsWarning)  # the trainer calls the network with images alone
        return split(
            model,
            torch.zeros(2, 3, config.data.image_size, config.data.image_size),
            cuts=None if config.cuts is None else list(config.cuts),
            num_blocks=config.num_blocks,
            balance=config.balance,
            objective=objective,
            momentum=momentum,
            criterion=nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing),
            recompute=config.recompute,
        )


def build_factories(config: TrainConfig, num_classes: int) -> tuple[Objective | None, Momentum | None]:
    """The factories of objective and momentum network of a config, for `split` and `plan`; None for `none`."""
    # as in the papers' code, local heads have no label smoothing, only the last block has
    data = {"num_classes": num_classes, "mean": config.data.mean, "std": config.data.std, "criterion": F.cross_entropy}
    return _make(config.objective, OBJECTIVES, data), _make(config.momentum, MOMENTA, {})


def build_planned(name: str, num_classes: int, image_size: int) -> Objective:
    """The factory of an objective for planning: its head fits the image size; mean and deviation of pixels are 0.5."""
    half = (0.5, 0.5, 0.5)
    chosen = planned_objective(name, image_size)
    return _make(chosen, OBJECTIVES, {"num_classes": num_classes, "mean": half, "std": half})


def _make(chosen: Any, choices: dict[str, Method], data: dict[str, Any]) -> Any:
    if chosen.name == "none":
        return None
    factory = choices[chosen.name].factory
    options = {name: value for name, value in vars(chosen).items() if value is not None and name != "name"}
    wanted = {name: data[name] for name in inspect.signature(factory).parameters if name in data}
    return factory(**wanted, **options)


def build_optimizers(
    config: OptimConfig, blocks: Sequence[Block], *, fused: bool = True, capturable: bool = False
) -> list[torch.optim.Optimizer]:
    """One optimizer per block, over the block's trainable parameters.

    Args:
        config: name and settings of the optimizer.
        blocks: the blocks from `split`.
        fused: use the fused implementation, which does not take sharded parameters (DTensors).
        capturable: let AdamW be captured in a CUDA graph.
    """
    parameters = [block.trainable_parameters() for block in blocks]
    if config.name == "adamw":
        options: dict[str, Any] = {"betas": (config.momentum, 0.999), "capturable": capturable}
        kind: Any = torch.optim.AdamW
    else:  # SGD can always be captured, and has no such flag
        options = {"momentum": config.momentum, "nesterov": config.nesterov}
        kind = torch.optim.SGD
    return [kind(own, lr=config.lr, weight_decay=config.weight_decay, fused=fused, **options) for own in parameters]
