"""The ablations: DGL+MAN on CIFAR-10 with ResNet-32; each row changes one or two settings of the momentum network.

They are compared with `cifar10-resnet32-k16-dgl` (no momentum network) and `cifar10-resnet32-k16-dgl-man` (both
branches, decay 0.995, form "sum", weights copied initially, depth 1). At K=16 the next block is a single unit, so there
is no second unit to copy. Depth is therefore compared at K=4, where the next block has four.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from localgrad.recipes.cifar import cifar_recipes
from localgrad.recipes.recipe import Recipe

CHANGES: dict[str, dict[str, Any]] = {
    "k16-dgl-man-ema-only": {"bias": False},
    "k16-dgl-man-bias-only": {"ema": False},
    "k16-dgl-man-direct": {"bias": False, "decay": 0.0},
    "k16-dgl-man-decay0.9": {"decay": 0.9},
    "k16-dgl-man-decay0.99": {"decay": 0.99},
    "k16-dgl-man-decay0.999": {"decay": 0.999},
    "k16-dgl-man-fused": {"form": "fused"},
    "k16-dgl-man-random": {"initial": "random"},
    "k16-dgl-man-conv1x1": {"bias_form": "conv1x1"},
    "k16-dgl-man-pool2": {"pool": 2},
    "k16-dgl-man-pool2-ema-only": {"pool": 2, "bias": False},
    "k16-dgl-man-pool2-bias-only": {"pool": 2, "ema": False},
    "k16-dgl-man-pool2-conv1x1": {"pool": 2, "bias_form": "conv1x1"},
    "k16-dgl-man-pool2-fused": {"pool": 2, "form": "fused"},
    "k4-dgl-man-depth2": {"depth": 2},
    "k4-dgl-man-depth3": {"depth": 3},
}
"""The changed settings of each row. `direct` uses the next unit's own weights, `ema-only` their moving average."""


PAPER_ERRORS = {"k16-dgl-man-ema-only": 11.07}
"""Test error in percent after 400 epochs in the MAN paper's ablation, whose "bias only" cell is empty."""


def ablation_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `cifar10-resnet32-k16-dgl-man-ema-only`."""
    return {f"cifar10-resnet32-{row}": partial(_ablation, row) for row in CHANGES}


def _ablation(row: str) -> Recipe:
    full = cifar_recipes()[f"cifar10-resnet32-{row.partition('-man')[0]}-man"]()
    config = replace(
        full.config, name=f"cifar10-resnet32-{row}", momentum=replace(full.config.momentum, **CHANGES[row])
    )
    return Recipe(config, label=full.label, paper_error=PAPER_ERRORS.get(row))
