"""A small job that needs no download: scikit-learn's handwritten digits, a CIFAR-type ResNet-14, a minute of a CPU."""

from collections.abc import Callable
from functools import partial

from .. import data
from ..config import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from .row import Recipe

CUTS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0")


def digits_recipes() -> dict[str, Callable[[], Recipe]]:
    """The rows, by name: end-to-end, a local loss alone, and the same with a momentum auxiliary network."""
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
        data=data.digits(),
        cuts=cuts,
        objective=ObjectiveConfig(name=objective, head="compact" if objective == "dgl" else None),
        momentum=MomentumConfig(name=momentum, decay=None if momentum == "none" else 0.995),
        optim=OptimConfig(lr=0.1, batch_size=128, epochs=10, warmup_epochs=2),
    )
    return Recipe(config, label=f"K={len(cuts) + 1}")
