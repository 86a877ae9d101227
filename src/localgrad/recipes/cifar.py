"""The CIFAR-10, SVHN and STL-10 tables: CIFAR ResNets, SGD and a cosine schedule for 400 epochs.

Each row is a network, a partition, a local loss and a momentum network. The settings and their sources:

* Partitions are stored as the names of the units after which they cut, since the papers' K is only a label. With the
  stem joined to the first unit, the MAN paper's "K=16" has 15 blocks and its "K=55" has 54. `-stem` rows also cut after
  the stem. This is InfoPro's and AugLocal's K=16 and 55 (really 16 and 55 blocks), and the MAN++ code does it at every
  K (5, 9, 16, 33 and 55 blocks).
* 400 epochs, batch 1024, learning rate 0.8 (STL-10: batch 128, rate 0.1), as in the commands of MAN and MAN++.
  InfoPro's own runs have 160 epochs (`--epochs 160`).
* The heads of `dgl` are compact in every row, so rows of one partition differ in the momentum network alone. The MAN++
  code has wide heads (`--objective.head wide`).
* InfoPro has the cross-entropy task loss with the 1c2f head. Its loss weights are those of InfoPro's published
  commands, interpolated over the block index. Those commands are for the contrastive loss; AugLocal uses the same
  weights with cross-entropy at K=16, and publishes weights of ResNet-110 at K=55 on CIFAR-10. If nothing is published
  for a K, the weights of the next smaller K are used. If nothing is published for ResNet-32 (SVHN, STL-10), those of
  ResNet-110 are used.
* By its code, the MAN paper trained InfoPro+MAN with other settings. `-released` rows have them (CIFAR-10, K=16 and 55,
  which have a published command): the 2c2f head, and loss weights of 5 and 0.5 times `1 - stage / (K - 2)`. The factor
  has the stage of the next unit where InfoPro has the block index, so it hardly falls.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.recipes.recipe import Recipe


@dataclass(frozen=True)
class Dataset:
    """The settings that differ between the three data sets."""

    images: Callable[[], data.DataConfig]
    lr: float
    batch_size: int
    infopro: dict[int, tuple[tuple[float, float], tuple[float, float]]]
    """InfoPro's loss weights for each K: reconstruction (first, last block) and task (first, last block)."""


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
    """Unit names from the unit numbers of each stage: `_stages("0 2", "1")` is layer1.0, layer1.2, layer2.1."""
    return tuple(f"layer{stage}.{unit}" for stage, units in enumerate(stages, start=1) for unit in units.split())


def _all_but_last(units: int) -> tuple[str, ...]:
    """Names of all units of three stages with `units` units each, except the last unit."""
    return tuple(f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(units))[:-1]


PARTITIONS: dict[tuple[int, int], tuple[str, ...]] = {
    (32, 4): _stages("2", "1", "0"),
    (32, 8): _stages("0 2 4", "1 3", "0 2"),
    (32, 16): _all_but_last(5),
    (110, 32): _stages("1 2 4 5 7 9 11 13 14 16 17", "1 2 4 5 7 9 11 13 14 16 17", "1 3 4 6 7 9 11 13 15"),
    (110, 55): _all_but_last(18),
}
"""Cuts for each depth of the network and K, without the cut after the stem."""


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
"""Test error in percent after 400 epochs in the MAN paper's table."""


def cifar_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `cifar10-resnet32-k16-dgl-man`."""
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
    stages = [int(cut[len("layer")]) + (cut.partition(".")[2] == last) for cut in cuts]  # of the unit after each cut
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
