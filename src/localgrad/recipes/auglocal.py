"""AugLocal on CIFAR-10, and the rows that it and MAN have to be compared with at equal cost.

* AugLocal's K is nominal: at depth d it has K - d blocks, of one layer each but for the last, which has d + 1. The stem
  is a layer. `-man` rows have the moving average and the trained copy of the next unit in front of its heads, `-ema`
  rows the average alone.
* `-pool2` rows: the heads see the mean of 2x2 squares, at a quarter of their cost.
* `-reach2` rows: each local loss trains its own block and the one before; `-reach3` rows two before.
* `k2`, `k4` and `k8` rows: fewer blocks, at InfoPro's cuts.
* `e2e-accumulate4` and `-checkpointed`: what end-to-end training does about memory.

Everything else is as in `cifar`: 400 epochs, batch 1024. Nothing is published for the rows of ResNet-32;
ResNet-110 at depth 6 is AugLocal's best row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from localgrad.config.schema import MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.recipes.ablation import ablation_recipes
from localgrad.recipes.cifar import PARTITIONS, cifar_recipes
from localgrad.recipes.recipe import Recipe

DEPTHS = {(32, 16): (1, 2, 3, 5), (110, 55): (3, 6)}
"""Depths of the heads by the network's depth and the nominal K."""

MOMENTA = {
    "": MomentumConfig(),
    "-man": MomentumConfig("man", decay=0.995),
    "-ema": MomentumConfig("man", decay=0.995, bias=False),
}

FEWER = {2: ("layer2.1",), 4: PARTITIONS[32, 4], 8: PARTITIONS[32, 8]}
"""Cuts of ResNet-32 by K."""

REACHING = (
    *("k16-dgl", "k16-dgl-man", "k16-dgl-man-pool2", "k8-dgl-man", "k4-dgl", "k8-dgl"),
    *("k16-auglocal-d1", "k16-auglocal-d2", "k16-auglocal-d5", "k16-auglocal-d2-ema", "k4-auglocal-d2"),
    *("k8-auglocal-d2", "k16-auglocal-d2-pool2", "k16-auglocal-d5-pool2"),
)
"""Rows that there are with reach 2 too."""

FURTHER = ("k16-dgl", "k16-auglocal-d2", "k16-auglocal-d2-pool2", "k16-auglocal-d5-pool2")
"""Rows that there are with reach 3 too."""

PAPER_ERRORS = {"cifar10-resnet110-k55-auglocal-d6": 6.04}
"""Test error in percent after 400 epochs, as AugLocal's table has it."""


def auglocal_recipes() -> dict[str, Callable[[], Recipe]]:
    """The rows, by name, as `cifar10-resnet32-k16-auglocal-d2-man`."""
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
    """The first K - d - 1 layers, the stem one of them."""
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
