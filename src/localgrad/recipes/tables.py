"""The papers' tables and ours: lists of recipes by name, for `localgrad reproduce`."""

from dataclasses import dataclass

from localgrad.errors import LocalGradError, closest
from localgrad.recipes import RECIPES
from localgrad.recipes.auglocal import FURTHER, REACHING


@dataclass(frozen=True)
class Table:
    """Recipes that one table compares."""

    title: str
    """What the table compares."""
    rows: tuple[str, ...]
    """Names of recipes."""


def _main(dataset: str, depth: int, k: int) -> list[str]:
    """Recipes of one partition: end-to-end, and each of the papers' local losses alone, with MAN and with MAN++."""
    rows = [
        f"k{k}-{method}{momentum}" for method in ("predsim", "dgl", "infopro") for momentum in ("", "-man", "-manpp")
    ]
    return [f"{dataset}-resnet{depth}-{row}" for row in ("e2e", *rows)]


def _main_tables() -> dict[str, Table]:
    """One table per data set, and one for each of its networks and partitions."""
    tables: dict[str, Table] = {}
    for dataset, title in (("cifar10", "CIFAR-10"), ("svhn", "SVHN"), ("stl10", "STL-10")):
        parts = {(depth, k): _main(dataset, depth, k) for depth, k in ((32, 8), (32, 16), (110, 32), (110, 55))}
        whole = dict.fromkeys(row for rows in parts.values() for row in rows)
        tables[dataset] = Table(f"{title}: the four partitions below", tuple(whole))
        for (depth, k), rows in parts.items():
            tables[f"{dataset}-k{k}"] = Table(
                f"{title}, ResNet-{depth}, K={k}: PredSim, DGL and InfoPro, with MAN, MAN++", tuple(rows)
            )
    return tables


def _ablation_tables() -> dict[str, Table]:
    """One table per question of the DGL ablation, one with all their rows, and one of InfoPro's settings."""
    k4, k16 = "cifar10-resnet32-k4-dgl", "cifar10-resnet32-k16-dgl"
    man = f"{k16}-man"
    parts = {
        "parts": ("neither part of MAN, the EMA, the bias, both", (k16, f"{man}-ema-only", f"{man}-bias-only", man)),
        "use": ("the next unit not used, used directly, averaged", (k16, f"{man}-direct", f"{man}-ema-only")),
        "decay": ("momentum of the average", (f"{man}-decay0.9", f"{man}-decay0.99", man, f"{man}-decay0.999")),
        "form": ("two branches, or one and an additive bias", (man, f"{man}-fused")),
        "initial": ("branches that begin as copies, or at random", (man, f"{man}-random")),
        "depth": ("one, two and three units copied, K=4", (k4, f"{k4}-man", f"{k4}-man-depth2", f"{k4}-man-depth3")),
    }
    every = dict.fromkeys(row for _, rows in parts.values() for row in rows)
    tables = {f"ablation-{name}": Table(f"DGL, ResNet-32: {title}", rows) for name, (title, rows) in parts.items()}
    released = tuple(f"cifar10-resnet32-k16-infopro{row}" for row in ("", "-man", "-released", "-man-released"))
    return {
        "ablation": Table("CIFAR-10: the ablations of DGL below", tuple(every)),
        **tables,
        "ablation-infopro": Table("InfoPro, ResNet-32: weights as published, and as released with MAN", released),
    }


def _equal_cost_tables() -> dict[str, Table]:
    """AugLocal with MAN, and at equal cost: MAN, reach, fewer blocks, end-to-end with accumulation or checkpointing."""
    rows = ["e2e", "e2e-accumulate4", "e2e-checkpointed", "e2e-accumulate4-checkpointed"]
    rows += [f"k{k}-dgl{end}" for k in (2, 4, 8, 16) for end in ("", "-man")]
    rows += [f"k16-auglocal-d{depth}{end}" for depth in (1, 2, 3, 5) for end in ("", "-man", "-pool2")]
    rows += [f"k16-dgl-man-{form}" for form in ("ema-only", "conv1x1", "pool2")]
    rows += [f"k16-dgl-man-pool2-{form}" for form in ("ema-only", "bias-only", "conv1x1", "fused")]
    rows += [f"{row}-reach2" for row in REACHING] + [f"{row}-reach3" for row in FURTHER]
    return {
        "auglocal": Table(
            "CIFAR-10, ResNet-110, K=55: AugLocal, with MAN",
            ("cifar10-resnet110-e2e", *(row for row in RECIPES if row.startswith("cifar10-resnet110-k55-auglocal"))),
        ),
        "equal-cost": Table(
            "CIFAR-10, ResNet-32: AugLocal, MAN, gradients over two blocks, fewer blocks, accumulation, checkpoints",
            tuple(f"cifar10-resnet32-{row}" for row in rows),
        ),
    }


def _network_tables() -> dict[str, Table]:
    """One table for each network on ImageNet and Imagenette, with all its recipes."""
    titles = {
        "imagenette64-resnet18": "Imagenette at 64 px, ResNet-18: DGL, InfoPro and AugLocal at K=4, with MAN",
        "imagenette-resnet50": "Imagenette at 128 px, ResNet-50: InfoPro and DGL at K=4, with MAN",
        "imagenette-resnet101": "Imagenette at 128 px, ResNet-101: InfoPro and DGL at K=4, with MAN",
        "imagenet-resnet101": "ImageNet, ResNet-101: InfoPro at K=2 and K=4, with MAN, MAN++",
        "imagenet-resnet152": "ImageNet, ResNet-152: InfoPro at K=2 and K=4, with MAN, MAN++",
        "imagenet-resnext101": "ImageNet, ResNeXt-101 32x8d: InfoPro at K=2 and K=4, with MAN, MAN++",
        "imagenet-vit": "ImageNet, ViT-T/S/B at K=4, with MAN, MAN++",
    }
    return {
        name: Table(title, tuple(row for row in RECIPES if row.startswith(f"{name}-")))
        for name, title in titles.items()
    }


TABLES: dict[str, Table] = {
    "digits": Table("scikit-learn's digits, for a first try", ("digits-e2e", "digits-dgl", "digits-dgl-man")),
    "first": Table(
        "CIFAR-10, ResNet-32, K=16: PredSim, DGL and InfoPro with MAN, and DGL with MAN++",
        tuple(row for row in _main("cifar10", 32, 16) if "manpp" not in row or "dgl" in row),
    ),
    **_main_tables(),
    **_ablation_tables(),
    **_equal_cost_tables(),
    **_network_tables(),
}


def table(name: str) -> Table:
    """The table of a name.

    Raises:
        LocalGradError: there is no such table; the message proposes similar names.
    """
    if name not in TABLES:
        raise LocalGradError(f"there is no table {name!r}{closest(name, list(TABLES))}; see `localgrad reproduce`")
    return TABLES[name]
