"""AugLocal on CIFAR-10, and the rows to compare with AugLocal and MAN at equal cost.

* AugLocal's K is nominal. With heads of depth d there are K - d blocks: each has one layer, the last one d + 1. The
  stem counts as a layer.
* `-man` rows have MAN's momentum network (moving average and trained copy of the next unit) before each head, `-ema`
  rows its moving average alone.
* `-pool2` rows: features are average-pooled 2x2 before the head, which then costs a quarter.
* `-reach2` rows: each local loss trains its own block and the one before. `-reach3` rows: also the second before.
* `k2`, `k4` and `k8` rows: fewer blocks, at InfoPro's cuts.
* `e2e-accumulate4` and `-checkpointed`: end-to-end training with gradient accumulation and activation checkpointing.

Everything else is as in `cifar`: 400 epochs, batch 1024. Nothing is published for the rows of ResNet-32. ResNet-110 at
depth 6 is AugLocal's best row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from localgrad.config.schema import MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.recipes.ablation import ablation_recipes
from localgrad.recipes.cifar import PARTITIONS, cifar_recipes
from localgrad.recipes.recipe import Recipe

DEPTHS = {(32, 16): (1, 2, 3, 5), (110, 55): (3, 6)}
"""Depths of the heads for each network (its depth) and nominal K."""

MOMENTA = {
    "": MomentumConfig(),
    "-man": MomentumConfig("man", decay=0.995),
    "-ema": MomentumConfig("man", decay=0.995, bias=False),
}

FEWER = {2: ("layer2.1",), 4: PARTITIONS[32, 4], 8: PARTITIONS[32, 8]}
"""Cuts of ResNet-32 for each K of the rows with fewer blocks."""

REACHING = (
    *("k16-dgl", "k16-dgl-man", "k16-dgl-man-pool2", "k8-dgl-man", "k4-dgl", "k8-dgl"),
    *("k16-auglocal-d1", "k16-auglocal-d2", "k16-auglocal-d5", "k16-auglocal-d2-ema", "k4-auglocal-d2"),
    *("k8-auglocal-d2", "k16-auglocal-d2-pool2", "k16-auglocal-d5-pool2"),
)
"""Rows of ResNet-32 that also exist with reach 2."""

FURTHER = ("k16-dgl", "k16-auglocal-d2", "k16-auglocal-d2-pool2", "k16-auglocal-d5-pool2")
"""Rows of ResNet-32 that also exist with reach 3."""

PAPER_ERRORS = {"cifar10-resnet110-k55-auglocal-d6": 6.04}
"""Test error in percent after 400 epochs in AugLocal's table."""


def auglocal_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `cifar10-resnet32-k16-auglocal-d2-man`."""
    rows: dict[str, Callable[[], Recipe]] = {}
    for (network, k), depths in DEPTHS.items():
        for depth in depths:
            for suffix in MOMENTA:
                row = f"cifar10-resnet{network}-k{k}-auglocal-d{depth}{suffix}"
                rows[row] = partial(_auglocal, row, network, k, depth, suffix)
            row = f"cifar10-resnet{network}-k{k}-auglocal-d{depth}-pool2"
            rows[row] = partial(_auglocal, row, network, k, depth, "", pool=2)
    for k, method in ((2, "dgl"), (2, "dgl-man"), (2, "auglocal"), (4, "auglocal"), (8, "auglocal")):
        row = f"cifar10-resnet32-k{k}-{method}" + "-d2" * (method == "auglocal")
        rows[row] = partial(_fewer, row, k, method)
    made = {**cifar_recipes(), **ablation_recipes(), **rows}
    for reach, names in ((2, REACHING), (3, FURTHER)):
        for row in names:
            rows[f"cifar10-resnet32-{row}-reach{reach}"] = partial(_reach, f"cifar10-resnet32-{row}", made, reach)
    for ending in ("accumulate4", "checkpointed", "accumulate4-checkpointed"):
        rows[f"cifar10-resnet32-e2e-{ending}"] = partial(_end_to_end, ending)
    return rows


def _cuts(network: int, k: int, depth: int) -> tuple[str, ...]:
    """Cuts after the first K - d - 1 layers, of which the stem is the first."""
    units = (network - 2) // 6
    layers = ["conv1", *(f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(units))]
    return tuple(layers[: k - depth - 1])


def _auglocal(row: str, network: int, k: int, depth: int, suffix: str, pool: int | None = None) -> Recipe:
    config = _changed(
        f"cifar10-resnet{network}-e2e",
        row,
        cuts=_cuts(network, k, depth),
        objective=ObjectiveConfig("auglocal", depth=depth, pyramid=0.5, pool=pool),
        momentum=MOMENTA[suffix],
    )
    return Recipe(config, label=f"K={k}", paper_error=PAPER_ERRORS.get(row))


def _fewer(row: str, k: int, method: str) -> Recipe:
    objective = ObjectiveConfig("dgl", head="compact")
    if method == "auglocal":
        objective = ObjectiveConfig("auglocal", depth=2, pyramid=0.5)
    momentum = MOMENTA["-man" if method.endswith("-man") else ""]
    config = _changed("cifar10-resnet32-e2e", row, cuts=FEWER[k], objective=objective, momentum=momentum)
    return Recipe(config, label=f"K={k}")


def _reach(row: str, made: dict[str, Callable[[], Recipe]], reach: int) -> Recipe:
    plain = made[row]()
    return Recipe(replace(plain.config, name=f"{row}-reach{reach}", reach=reach), label=plain.label)


def _end_to_end(ending: str) -> Recipe:
    config = _changed(
        "cifar10-resnet32-e2e", f"cifar10-resnet32-e2e-{ending}", recompute=ending.endswith("checkpointed")
    )
    parts = 4 if ending.startswith("accumulate4") else 1
    return Recipe(replace(config, optim=replace(config.optim, accumulate=parts)), label="E2E")


def _changed(row: str, name: str, **changes: object) -> TrainConfig:
    return replace(cifar_recipes()[row]().config, name=name, **changes)  # pyright: ignore[reportArgumentType]
