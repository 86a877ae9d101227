"""The CIFAR-10, SVHN and STL-10 tables: CIFAR-type ResNets, SGD and a cosine for 400 epochs.

Every row is network x partition x local loss x momentum network. What the rows share and where it comes from:

* Partitions are stored as the names of the units after which they cut, since the papers' K is a label: with the stem
  joined to the first unit, the MAN paper's "K=16" is 15 blocks and its "K=55" is 54; `-stem` rows cut after the stem
  too, which is InfoPro's and AugLocal's K=16 and 55 (really 16 and 55 blocks), and what the MAN++ code does at every
  K (5, 9, 16, 33 and 55 blocks).
* 400 epochs, batch 1024, rate 0.8 (STL-10: batch 128, rate 0.1), as the MAN and MAN++ commands; InfoPro's own runs
  have 160 epochs (`--epochs 160`).
* The heads of `dgl` are the compact ones throughout, so rows of one partition differ in the momentum network alone;
  the MAN++ code has wide ones (`--objective.head wide`).
* InfoPro has the cross-entropy task loss with the 1c2f head; its weights are those of InfoPro's published commands,
  which are for the contrastive loss (AugLocal takes the same with cross-entropy at K=16, and publishes ResNet-110's at
  K=55 on CIFAR-10), interpolated over the block index. Where nothing is published for a K, the next smaller K's
  weights are taken; where nothing is published for ResNet-32 (SVHN, STL-10), ResNet-110's.
* The MAN paper's InfoPro+MAN was trained with other settings, as far as its code tells: `-released` rows have those
  (CIFAR-10, K=16 and 55, the two that have a published command): the 2c2f head, and weights that fall from 5 and 0.5 by
  the stage of the next unit where InfoPro counts blocks, `1 - stage / (K - 2)`, so they hardly fall.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.recipes.recipe import Recipe


@dataclass(frozen=True)
class Dataset:
    """What one of the three datasets changes."""

    images: Callable[[], data.DataConfig]
    lr: float
    batch_size: int
    infopro: dict[int, tuple[tuple[float, float], tuple[float, float]]]
    """Weights of InfoPro by K: reconstruction (first, last) and task (first, last)."""


DATASETS = {
    "cifar10": Dataset(
        data.cifar10,
        0.8,
        1024,
        {4: ((6, 1), (0, 2)), 8: ((5, 0), (0, 2)), 16: ((5, 0.2), (0.05, 0.5)), 32: ((5, 0.5), (0, 1))},
    ),
    "svhn": Dataset(data.svhn, 0.8, 1024, {4: ((5, 0.5), (0, 1)), 8: ((5, 0.5), (0, 2)), 16: ((5, 0.5), (0.2, 1))}),
    "stl10": Dataset(
        data.stl10, 0.1, 128, {4: ((20, 5), (0.2, 2)), 8: ((20, 5), (0.2, 1)), 16: ((20, 10), (0.5, 0.1))}
    ),
}


def _stages(*stages: str) -> tuple[str, ...]:
    """Unit names from a line of unit numbers a stage: `_stages("0 2", "1")` is layer1.0, layer1.2, layer2.1."""
    return tuple(f"layer{stage}.{unit}" for stage, units in enumerate(stages, start=1) for unit in units.split())


def _all_but_last(units: int) -> tuple[str, ...]:
    """Every unit of three equal stages except the last one."""
    return tuple(f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(units))[:-1]


PARTITIONS: dict[tuple[int, int], tuple[str, ...]] = {
    (32, 4): _stages("2", "1", "0"),
    (32, 8): _stages("0 2 4", "1 3", "0 2"),
    (32, 16): _all_but_last(5),
    (110, 32): _stages("1 2 4 5 7 9 11 13 14 16 17", "1 2 4 5 7 9 11 13 14 16 17", "1 3 4 6 7 9 11 13 15"),
    (110, 55): _all_but_last(18),
}
"""Cuts by depth and K, without the stem."""


PAPER_ERRORS: dict[tuple[str, int, str], float] = {
    ("cifar10", 32, "e2e"): 6.37,
    ("cifar10", 110, "e2e"): 5.42,
    ("cifar10", 32, "k8-dgl"): 11.63,
    ("cifar10", 32, "k16-dgl"): 14.08,
    ("cifar10", 110, "k32-dgl"): 12.51,
    ("cifar10", 110, "k55-dgl"): 14.45,
    ("cifar10", 32, "k8-dgl-man"): 8.42,
    ("cifar10", 32, "k16-dgl-man"): 9.11,
    ("cifar10", 110, "k32-dgl-man"): 9.65,
    ("cifar10", 110, "k55-dgl-man"): 9.73,
    ("cifar10", 32, "k8-infopro"): 11.51,
    ("cifar10", 32, "k16-infopro"): 12.93,
    ("cifar10", 110, "k32-infopro"): 12.26,
    ("cifar10", 110, "k55-infopro"): 13.22,
    ("cifar10", 32, "k8-infopro-man"): 9.32,
    ("cifar10", 32, "k16-infopro-man"): 9.65,
    ("cifar10", 110, "k32-infopro-man"): 9.06,
    ("cifar10", 110, "k55-infopro-man"): 9.77,
}
"""Test error in percent after 400 epochs, as the MAN paper's table has it."""


def cifar_recipes() -> dict[str, Callable[[], Recipe]]:
    """The rows, by name, as `cifar10-resnet32-k16-dgl-man`."""
    rows: dict[str, Callable[[], Recipe]] = {}
    for dataset in DATASETS:
        for depth in (32, 110):
            rows[f"{dataset}-resnet{depth}-e2e"] = partial(_end_to_end, dataset, depth)
        for depth, k in PARTITIONS:
            for stem in (False, True):
                for method in ("classifier", "predsim", "dgl", "infopro"):
                    for momentum in ("none", "man", "manpp"):
                        row = _row_name(k, stem, method, momentum)
                        rows[f"{dataset}-resnet{depth}-{row}"] = partial(
                            _local, dataset, depth, k, stem, method, momentum
                        )
    for depth, k in ((32, 16), (110, 55)):
        for momentum in ("none", "man"):
            row = f"{_row_name(k, False, 'infopro', momentum)}-released"
            rows[f"cifar10-resnet{depth}-{row}"] = partial(_released_infopro, depth, k, momentum)
    return rows


def _row_name(k: int, stem: bool, method: str, momentum: str) -> str:
    return "-".join([f"k{k}", *["stem"] * stem, method, *[momentum] * (momentum != "none")])


def _end_to_end(dataset: str, depth: int) -> Recipe:
    return _recipe(dataset, depth, "e2e", cuts=(), label="E2E")


def _local(dataset: str, depth: int, k: int, stem: bool, method: str, momentum: str) -> Recipe:
    return _recipe(
        dataset,
        depth,
        _row_name(k, stem, method, momentum),
        cuts=(*["conv1"] * stem, *PARTITIONS[depth, k]),
        objective=_objective(dataset, k, method),
        momentum=MomentumConfig(name=momentum, decay=None if momentum == "none" else 0.995),
        label=f"K={k}",
    )


def _released_infopro(depth: int, k: int, momentum: str) -> Recipe:
    made = _local("cifar10", depth, k, False, "infopro", momentum)
    cuts, last = PARTITIONS[depth, k], str((depth - 2) // 6 - 1)
    stages = [int(cut[len("layer")]) + (cut.partition(".")[2] == last) for cut in cuts]  # of the units after the cuts
    fall = [1 - stage / (k - 2) for stage in stages]
    objective = replace(
        made.config.objective,
        reconstruction=tuple(5 * share for share in fall),
        task=tuple(0.5 * share for share in fall),
        head="2c2f",
    )
    config = replace(made.config, name=f"{made.config.name}-released", objective=objective)
    return replace(made, config=config, paper_error=made.paper_error if momentum == "man" else None)


def _objective(dataset: str, k: int, method: str) -> ObjectiveConfig:
    if method == "predsim":
        return ObjectiveConfig(name=method, beta=0.99, max_features=512)
    if method == "dgl":
        return ObjectiveConfig(name=method, head="compact")
    if method == "infopro":
        weights = DATASETS[dataset].infopro
        reconstruction, task = weights[max(known for known in weights if known <= k)]
        return ObjectiveConfig(name=method, reconstruction=reconstruction, task=task, loss="cross_entropy", head="1c2f")
    return ObjectiveConfig(name=method)


def _recipe(
    dataset: str,
    depth: int,
    row: str,
    *,
    cuts: tuple[str, ...],
    label: str,
    objective: ObjectiveConfig | None = None,
    momentum: MomentumConfig | None = None,
) -> Recipe:
    chosen = DATASETS[dataset]
    config = TrainConfig(
        name=f"{dataset}-resnet{depth}-{row}",
        model=ModelConfig(depth=depth),
        data=chosen.images(),
        cuts=cuts,
        objective=objective or ObjectiveConfig(),
        momentum=momentum or MomentumConfig(),
        optim=OptimConfig(lr=chosen.lr, batch_size=chosen.batch_size, epochs=400),
    )
    return Recipe(config, label=label, paper_error=PAPER_ERRORS.get((dataset, depth, row)))
