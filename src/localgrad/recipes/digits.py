"""A small example without a download: scikit-learn's digits at 16x16, a CIFAR ResNet-14, seconds on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.recipes.recipe import Recipe

CUTS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0")


def digits_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name: end-to-end, DGL's local loss, and DGL with MAN's momentum network."""
    return {
        "digits-e2e": partial(_digits, "digits-e2e", "none", "none"),
        "digits-dgl": partial(_digits, "digits-dgl", "dgl", "none"),
        "digits-dgl-man": partial(_digits, "digits-dgl-man", "dgl", "man"),
    }


def _digits(name: str, objective: str, momentum: str) -> Recipe:
    cuts = () if objective == "none" else CUTS
    config = TrainConfig(
        name=name,
        model=ModelConfig(depth=14),
        data=replace(data.digits(), image_size=16, padding=1),
        cuts=cuts,
        objective=ObjectiveConfig(name=objective, head="compact" if objective == "dgl" else None),
        momentum=MomentumConfig(name=momentum, decay=None if momentum == "none" else 0.995),
        optim=OptimConfig(lr=0.1, batch_size=64, epochs=8, warmup_epochs=1),
    )
    return Recipe(config, label=f"K={len(cuts) + 1}")
