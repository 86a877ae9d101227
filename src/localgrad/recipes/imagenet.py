"""The ImageNet table (ResNets with InfoPro, SGD and a cosine schedule for 90 epochs), and Imagenette, a small ImageNet.

* Partitions: `k2` and `k4` are from the MAN repository (K=4 only from its history: the same three cuts for all three
  networks). `k2b` is InfoPro's own cut of ResNeXt-101, `k4b` are the MAN++ repository's cuts. The stem belongs to the
  first block, and no cut is at the end of a stage.
* Batch 128, learning rate 0.05, no warm-up, as in the MAN command for one GPU. The commands of InfoPro and MAN++ are
  for eight GPUs (`--batch-size 1024 --lr 0.4 --devices 8`).
* InfoPro has the cross-entropy task loss with the released ImageNet head, and its published loss weights:
  reconstruction 5, task 0.75 (ResNet-152: 1), the same at every block. The MAN code has 0.75 for ResNet-152 too.
* Imagenette (10 classes, 128 px) has ImageNet's settings. No paper cuts ResNet-50: here each block has four units. DGL
  has the head "light", since at 512 and more channels the papers' heads are larger than the network. Nothing is
  published for these rows.
* Imagenette at 64 px: ResNet-18 with a stem for small images, four blocks, 60 epochs, learning rate 0.1, warm-up of two
  epochs. InfoPro's loss weights and head are those of ImageNet. Nothing is published for these rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.recipes.recipe import Recipe

NETWORKS = {
    "resnet50": "torchvision:resnet50",
    "resnet101": "torchvision:resnet101",
    "resnet152": "torchvision:resnet152",
    "resnext101": "torchvision:resnext101_32x8d",
}


CUTS = {
    ("resnet50", "k4"): "2.0 3.0 3.4",
    ("resnet101", "k2"): "2.0",
    ("resnet101", "k4"): "3.0 3.9 3.17",
    ("resnet101", "k4b"): "2.2 3.8 3.16",
    ("resnet152", "k2"): "2.5",
    ("resnet152", "k4"): "3.0 3.9 3.17",
    ("resnet152", "k4b"): "2.6 3.13 3.25",
    ("resnext101", "k2"): "2.0",
    ("resnext101", "k2b"): "2.2",
    ("resnext101", "k4"): "3.0 3.9 3.17",
    ("resnext101", "k4b"): "2.2 3.8 3.16",
}
"""Stage and unit of each cut, for each network and partition: "2.0" is layer2.0."""


PAPER_ERRORS: dict[tuple[str, str], float] = {
    ("resnet101", "e2e"): 22.03,
    ("resnet152", "e2e"): 21.60,
    ("resnext101", "e2e"): 20.64,
    ("resnet101", "k2-infopro"): 21.85,
    ("resnet152", "k2-infopro"): 21.45,
    ("resnext101", "k2b-infopro"): 20.35,
    ("resnet101", "k4-infopro"): 22.81,
    ("resnet152", "k4-infopro"): 22.21,
    ("resnet101", "k4-infopro-man"): 21.73,
    ("resnet152", "k4-infopro-man"): 20.78,
}
"""Top-1 error in percent on ImageNet after 90 epochs: K=4 from the MAN paper's table, K=2 from InfoPro's."""


def imagenet_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `imagenet-resnet101-k4-infopro-man`."""
    rows: dict[str, Callable[[], Recipe]] = {}
    for network in ("resnet101", "resnet152", "resnext101"):
        rows |= _rows("imagenet", network, {"infopro": ("none", "man", "manpp")})
    return rows


def imagenette_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `imagenette-resnet50-k4-dgl-man`."""
    rows: dict[str, Callable[[], Recipe]] = {}
    for network in ("resnet50", "resnet101"):
        rows |= _rows("imagenette", network, {"infopro": ("none", "man"), "dgl": ("none", "man")}, ("k4",))
    return rows


def imagenette64_recipes() -> dict[str, Callable[[], Recipe]]:
    """The recipes by name, such as `imagenette64-resnet18-k4-dgl-man`."""
    rows = ("e2e", "k4-dgl", "k4-dgl-man", "k4-infopro", "k4-infopro-man", "k4-auglocal")
    return {f"imagenette64-resnet18-{row}": partial(_small, row) for row in rows}


def _small(row: str) -> Recipe:
    _, method, momentum = (*row.split("-"), "none", "none")[:3]
    objective = _objective("resnet18", method)
    if method == "auglocal":
        objective = ObjectiveConfig("auglocal", depth=2, pyramid=0.5)
    images = replace(data.imagenette(), image_size=64, resize=64, padding=8)
    config = TrainConfig(
        name=f"imagenette64-resnet18-{row}",
        model=ModelConfig("torchvision:resnet18", small_stem=True),
        data=images,
        cuts=() if row == "e2e" else ("layer1.1", "layer2.1", "layer3.1"),
        objective=objective,
        momentum=MomentumConfig(momentum, decay=None if momentum == "none" else 0.995),
        optim=OptimConfig(lr=0.1, batch_size=128, epochs=60, warmup_epochs=2),
    )
    return Recipe(config, label="E2E" if row == "e2e" else "K=4")


def _rows(
    dataset: str, network: str, methods: dict[str, tuple[str, ...]], only: tuple[str, ...] = ()
) -> dict[str, Callable[[], Recipe]]:
    rows: dict[str, Callable[[], Recipe]] = {f"{dataset}-{network}-e2e": partial(_recipe, dataset, network, "e2e")}
    for partition in [name for owner, name in CUTS if owner == network and name in (only or [name])]:
        for method, momenta in methods.items():
            for momentum in momenta:
                row = "-".join([partition, method, *[momentum] * (momentum != "none")])
                rows[f"{dataset}-{network}-{row}"] = partial(
                    _recipe, dataset, network, row, partition, method, momentum
                )
    return rows


def _recipe(
    dataset: str, network: str, row: str, partition: str = "", method: str = "none", momentum: str = "none"
) -> Recipe:
    config = TrainConfig(
        name=f"{dataset}-{network}-{row}",
        model=ModelConfig(NETWORKS[network]),
        data=data.imagenet() if dataset == "imagenet" else data.imagenette(),
        cuts=tuple(f"layer{unit}" for unit in CUTS[network, partition].split()) if partition else (),
        objective=_objective(network, method),
        momentum=MomentumConfig(momentum, decay=None if momentum == "none" else 0.995),
        optim=OptimConfig(lr=0.05, batch_size=128, epochs=90, warmup_epochs=0, first_epoch=0),
    )
    error = PAPER_ERRORS.get((network, row)) if dataset == "imagenet" else None
    return Recipe(config, label=f"K={partition[1]}" if partition else "E2E", paper_error=error)


def _objective(network: str, method: str) -> ObjectiveConfig:
    if method == "infopro":
        task = 1.0 if network == "resnet152" else 0.75
        return ObjectiveConfig(
            method, reconstruction=(5.0, 5.0), task=(task, task), loss="cross_entropy", head="imagenet"
        )
    return ObjectiveConfig(method, head="light" if method == "dgl" else None)
