"""From a config to objects: the model, its blocks, the optimizers."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from localgrad.config.methods import MOMENTA, OBJECTIVES, Method, planned_objective
from localgrad.config.schema import ModelConfig, OptimConfig, TrainConfig
from localgrad.core.block import Block
from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.core.split import split
from localgrad.errors import LocalGradError, closest
from localgrad.models import cifar_resnet, small_stem


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """A fresh network with random weights.

    Raises:
        LocalGradError: the name belongs to no network, or the extra that holds it is not installed.
    """
    if config.small_stem and not config.name.startswith("torchvision:"):
        raise LocalGradError(f"model.small_stem is on and model.name {config.name}: it takes a torchvision ResNet")
    if config.name == "cifar_resnet":
        return cifar_resnet(config.depth, num_classes=num_classes)
    library, _, name = config.name.partition(":")
    if library == "torchvision":
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        _check_model_name(name, names, library)
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        return small_stem(model) if config.small_stem else model
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise LocalGradError(f"{config.name} needs timm: pip install 'localgrad[timm]'") from None
        _check_model_name(name, timm.list_models(), library)
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
    raise LocalGradError(f"model.name is {config.name!r}; it must be cifar_resnet, torchvision:NAME or timm:NAME")


def _check_model_name(name: str, names: Sequence[str], library: str) -> None:
    if name not in names:
        raise LocalGradError(f"{library} has no model {name!r}{closest(name, names)}")


def build_blocks(config: TrainConfig, model: nn.Module, num_classes: int) -> list[Block]:
    """The blocks of a model, as the config cuts it; the last one's criterion is a cross-entropy."""
    objective, momentum = build_factories(config, num_classes)
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
    """The objective and the momentum auxiliary network of a config, as `split` and `plan` take them."""
    data = {"num_classes": num_classes, "mean": config.data.mean, "std": config.data.std}
    return _make(config.objective, OBJECTIVES, data), _make(config.momentum, MOMENTA, {})


def build_planned(name: str, num_classes: int, image_size: int) -> Objective:
    """The objective that `localgrad plan` takes for a network of images of that size."""
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
    """One optimizer a block, over the parameters that get gradients.

    Args:
        config: which optimizer.
        blocks: what `split` gave.
        fused: in one kernel, which shards have not.
        capturable: for CUDA graphs.
    """
    parameters = [block.trainable_parameters() for block in blocks]
    if config.name == "adamw":
        options: dict[str, Any] = {"betas": (config.momentum, 0.999), "capturable": capturable}
        kind: Any = torch.optim.AdamW
    else:  # SGD is capturable as it is
        options = {"momentum": config.momentum, "nesterov": config.nesterov}
        kind = torch.optim.SGD
    return [kind(own, lr=config.lr, weight_decay=config.weight_decay, fused=fused, **options) for own in parameters]
