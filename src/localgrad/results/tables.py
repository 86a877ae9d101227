"""Runs summed up: those that differ in their seed alone are one row, rows of one network and budget one table."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from localgrad.config import methods
from localgrad.config.methods import with_defaults
from localgrad.config.saved import flat, from_dict, to_dict
from localgrad.errors import LocalGradError
from localgrad.recipes import RECIPES, Recipe
from localgrad.results.read import FinishedRun

DATASETS = {
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
    "stl10": "STL-10",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "digits": "Digits",
}


BY_THE_WAY = (
    "seed",
    "accelerator",
    "devices",
    "evaluate_every",
    "local_heads",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skips",
    "tensorboard",
    "data.source",
    "data.name",
    "data.streaming",
    "data.workers",
)
"""Fields of a config that leave a run in its row."""


SAME_WEIGHTS = ("channels_last", "recompute", "step_each_block", "cuda_graph")
"""Fields that change time and memory, and so the row, but not what is trained: the paper's error is still its own."""


CLASSES = {"imagenet": 1000}
"""Classes of a set of images, where they are not ten."""


BUDGET = ("optim.epochs", "optim.batch_size", "optim.lr", "optim.warmup_epochs", "data.train_limit", "data.test_limit")
"""Fields that a table says once for all of its rows."""


SAME_STEP = ({*BUDGET} - {"optim.batch_size"}) | {
    "name",
    "optim.first_epoch",
    "data.subset",
    "data.train_split",
    "data.test_split",
}
"""Fields that leave a step what it is, besides those that leave a run in its row."""


@dataclass(frozen=True)
class Row:
    """Runs of one config with different seeds."""

    runs: tuple[FinishedRun, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].result.config

    @property
    def name(self) -> str:
        """Its recipe, or its folder where it has none."""
        path = self.runs[0].path
        return self.config["name"] or (path.parent.name if path.name == "result.json" else path.stem)

    @property
    def label(self) -> str:
        return method_label(self.config)

    @property
    def full_label(self) -> str:
        """Method, number of blocks, and what was set other than the recipe sets it."""
        return ", ".join([run_label(self.config, self.num_blocks), *self.changes])

    @property
    def num_blocks(self) -> int:
        return self.runs[0].result.num_blocks

    @property
    def num_classes(self) -> int:
        return _num_classes(self.runs[0])

    @property
    def place(self) -> tuple[Any, ...]:
        """What the rows of a table are sorted by."""
        return (*place(self.config, self.num_blocks), self.name)

    @property
    def precision(self) -> str:
        return self.runs[0].result.precision

    @cached_property
    def recipe(self) -> Recipe | None:
        make = RECIPES.get(self.config["name"])
        return make() if make else None

    @property
    def paper_error(self) -> float | None:
        """Test error in percent that the paper reports for this very config, its budget left aside."""
        return self.recipe.paper_error if self.recipe and not self.changes else None

    @cached_property
    def changes(self) -> list[str]:
        """What was set other than the recipe sets it, its budget left aside: `name value`, a field each."""
        if self.recipe is None:
            return []
        own, published = flat(_complete(self.config)), flat(to_dict(with_defaults(self.recipe.config)))
        aside = {*BY_THE_WAY, *BUDGET, *SAME_WEIGHTS, "data.subset", "precision"}
        if published["data.source"] == "digits":  # a set of images that is nowhere else
            aside.remove("data.source")
        changed = [
            f"{name} {'none' if value is None else value}"
            for name, value in own.items()
            if name not in aside and name in published and value != published[name]
        ]
        return changed + [f"{self.num_classes} classes"] * (self.num_classes != _usual_classes(self.config))

    def mean(self, name: str) -> float:
        """Mean over the runs of a field of their results."""
        return statistics.fmean(getattr(run.result, name) for run in self.runs)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the runs; None where one was too short to tell."""
        seconds = [run.result.seconds_per_step for run in self.runs]
        return None if None in seconds else statistics.fmean(each for each in seconds if each is not None)

    def deviation(self, name: str) -> float | None:
        """Standard deviation over the runs (n - 1); None for a single one."""
        return statistics.stdev(getattr(run.result, name) for run in self.runs) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Table:
    """Rows of one network on one set of images, trained at one budget in one precision."""

    rows: tuple[Row, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.rows[0].config

    @property
    def title(self) -> str:
        return f"{dataset_label(self.config)}, {network_label(self.config)}"

    @property
    def budget(self) -> str:
        """Epochs, images, batch size, rate and precision in words."""
        optim, images = self.config["optim"], self.config["data"].get("train_limit")
        tested = self.config["data"].get("test_limit")
        parts = [
            f"{optim['epochs']} epoch{'s' * (optim['epochs'] > 1)}",
            "all training images" if images is None else f"{images:,} training images",
            f"batch size {optim['batch_size']:,}",
        ]
        for name, words in (("lr", "learning rate"), ("warmup_epochs", "warm-up epochs")):
            value = optim.get(name)
            parts += [] if value is None else [f"{words} {value:g}"]
        parts += [] if tested is None else [f"{tested:,} test images"]
        return ", ".join([*parts, self.rows[0].precision])

    @cached_property
    def labels(self) -> list[str]:
        """What each row is called in a picture: method and blocks, and all that sets it apart where that is needed."""
        labels = [run_label(row.config, row.num_blocks) for row in self.rows]
        twice = {label for label, count in Counter(labels).items() if count > 1}
        return [row.full_label if label in twice else label for label, row in zip(labels, self.rows, strict=True)]

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(run.result.device for row in self.rows for run in row.runs))

    def on(self, device: str) -> dict[int, Row]:
        """The rows by position, with the runs on one device only, for times and memory of two cannot be compared."""
        parts = {p: tuple(run for run in row.runs if run.result.device == device) for p, row in enumerate(self.rows)}
        return {position: Row(runs) for position, runs in parts.items() if runs}

    @property
    def paper_epochs(self) -> list[int]:
        """Epochs that the papers' figures in it were trained for."""
        recipes = [row.recipe for row in self.rows if row.paper_error is not None]
        return sorted({recipe.config.optim.epochs for recipe in recipes if recipe})


def tables(runs: Sequence[FinishedRun]) -> list[Table]:
    """Every run in its row, every row in its table; the longest budget of a network first."""
    rows: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rows.setdefault(_row_key(run), []).append(run)
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for same in rows.values():
        row = Row(tuple(sorted(same, key=lambda run: run.result.config["seed"])))
        values = flat(row.config)
        key: tuple[Any, ...] = (dataset_label(row.config), network_label(row.config), row.precision)
        key += tuple(values.get(name) for name in BUDGET)
        grouped.setdefault(key, []).append(row)
    found = [Table(tuple(sorted(group, key=lambda row: row.place))) for group in grouped.values()]
    return sorted(found, key=lambda table: (table.title, -table.config["optim"]["epochs"], table.budget))


def one_a_seed(runs: Sequence[FinishedRun], warn: Callable[[str], None]) -> list[FinishedRun]:
    """The runs without those whose row has one of the same seed before them; `warn` is told which these are."""
    kept: dict[tuple[str, int], FinishedRun] = {}
    for run in runs:
        first = kept.setdefault((_row_key(run), run.result.config["seed"]), run)
        if first is not run:
            warn(f"left out: {run.path} has the settings and the seed of {first.path}; it counts once")
    return list(kept.values())


def _row_key(run: FinishedRun) -> str:
    """What the runs of a row have in common."""
    result = run.result
    own = own_fields(result.config) | {"precision": result.precision}  # auto is another one on another device
    own |= {"num_blocks": result.num_blocks, "num_classes": _num_classes(run), "images": _images(result.config)}
    return json.dumps(own, sort_keys=True, default=str)


def _images(config: dict[str, Any]) -> str:
    """What tells sets of images apart: a recipe's may be in any place, but for digits, which are in one alone."""
    make = RECIPES.get(config["name"])
    digits = make is not None and make().config.data.source == "digits"
    return config["data"]["source"] if digits else dataset_label(config)


def _usual_classes(config: dict[str, Any]) -> int:
    """Classes of the set of images that the config's name begins with."""
    return CLASSES.get(config["name"].partition("-")[0], 10)


def _num_classes(run: FinishedRun) -> int:
    """Classes of the images; results of the first versions do not say."""
    return run.result.num_classes or _usual_classes(run.result.config)


def step_key(config: dict[str, Any], num_blocks: int, num_classes: int, precision: str) -> str:
    """What runs have in common whose steps take the same time on one kind of device."""
    own = {name: value for name, value in own_fields(config).items() if name not in SAME_STEP}
    own |= {"num_blocks": num_blocks, "num_classes": num_classes, "precision": precision}
    own |= {"devices": config.get("devices", 1)}
    if limit := config["data"].get("train_limit"):
        own["optim.batch_size"] = min(config["optim"]["batch_size"], limit)
    return json.dumps(own, sort_keys=True, default=str)


def told_seconds(seconds: float | None) -> str:
    """To three digits, zeros at their end too; a dash where a run was too short to tell."""
    return "-" if seconds is None else f"{seconds:#.3g}".removesuffix(".")


def own_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What a config has in common with the others of its row, by dotted name."""
    return {name: value for name, value in flat(_complete(config)).items() if name not in BY_THE_WAY}


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the fields that came later; as it is where it is none of this version's."""
    try:
        return to_dict(from_dict(config))
    except LocalGradError:
        return config


def place(config: dict[str, Any], num_blocks: int) -> tuple[Any, ...]:
    """What to sort by: the number of blocks, then the method as the papers' tables have it."""
    order = methods.method_order(config["objective"]["name"], config["momentum"]["name"])
    return (num_blocks, *order, method_label(config))


def method_label(config: dict[str, Any]) -> str:
    """What a config trains, in the papers' words, as `DGL + MAN (EMA only)`."""
    objective: str = config["objective"]["name"]
    momentum: dict[str, Any] = config["momentum"]
    name = methods.method_label(objective, momentum["name"])
    decay = momentum.get("decay")
    parts = [
        "bias only" if momentum.get("ema") is False else "",
        "EMA only" if momentum.get("bias") is False else "",
        "fused" if momentum.get("form") == "fused" else "",
        "direct use" if decay == 0 else "" if decay in (None, 0.995) else f"decay {decay}",
        "random start" if momentum.get("initial") == "random" else "",
        f"depth {momentum['depth']}" if (momentum.get("depth") or 1) > 1 else "",
        "1x1 bias" if momentum.get("bias_form") == "conv1x1" else "",
        f"pooled {momentum['pool']}" if (momentum.get("pool") or 1) > 1 else "",
        f"d={config['objective']['depth']}" if config["objective"].get("depth") else "",
        f"reach {config['reach']}" if config.get("reach", 1) > 1 else "",
        f"{config['optim']['accumulate']} parts" if config.get("optim", {}).get("accumulate", 1) > 1 else "",
        "checkpointed" if config.get("recompute") else "",
        "block by block" if config.get("step_each_block") else "",
        "CUDA graph" if config.get("cuda_graph") else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f"{name} ({said})" if said else name


def run_label(config: dict[str, Any], num_blocks: int) -> str:
    """Method and number of blocks."""
    return method_label(config) + (f", {num_blocks} blocks" if num_blocks > 1 else "")


def dataset_label(config: dict[str, Any]) -> str:
    """The recipe's set of images, or the last part of where they came from."""
    first: str = config["name"].partition("-")[0]
    if config["name"] in RECIPES or first in DATASETS:
        return DATASETS.get(first, first)
    source: str = config["data"].get("name") or config["data"]["source"].rstrip("/").rpartition("/")[2]
    return DATASETS.get(source, source)


def network_label(config: dict[str, Any]) -> str:
    """The network's name, with its depth where that is no part of it."""
    name: str = config["model"]["name"]
    return f"ResNet-{config['model']['depth']}" if name == "cifar_resnet" else name.partition(":")[2] or name
