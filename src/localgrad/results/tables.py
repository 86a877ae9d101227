"""Group runs into rows (runs that differ only in their seed) and tables (rows of one network and budget)."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from localgrad.config.methods import method_label, method_order, with_defaults
from localgrad.config.saved import flat, to_dict
from localgrad.config.schema import TrainConfig
from localgrad.recipes import Recipe
from localgrad.results.names import dataset_label, network_label, recipe_of, run_label, where
from localgrad.results.read import FinishedRun

SAME_ROW = (
    "seed",
    "accelerator",
    "devices",
    "evaluate_every",
    "local_heads",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skips",
    "keep_best",
    "tensorboard",
    "data.source",
    "data.name",
    "data.streaming",
    "data.workers",
)
"""Fields of a config that do not distinguish experiments: runs that differ only in these are averaged in one row."""
SAME_WEIGHTS = ("channels_last", "recompute", "step_each_block", "cuda_graph")
"""Fields that change time and memory, and so make another row, but not the weights: the paper's error still applies."""
CLASSES = {"imagenet": 1000}
"""Number of classes of the recipes' data sets that have not ten."""
BUDGET = ("optim.epochs", "optim.batch_size", "optim.lr", "optim.warmup_epochs", "data.train_limit", "data.test_limit")
"""Fields that all rows of a table share; its heading shows them."""
SAME_STEP = ({*BUDGET} - {"optim.batch_size"}) | {
    "name",
    "optim.first_epoch",
    "data.subset",
    "data.train_split",
    "data.test_split",
}
"""Fields that do not change the work of a step, besides `SAME_ROW`."""


@dataclass(frozen=True)
class Row:
    """Runs of one config with different seeds."""

    runs: tuple[FinishedRun, ...]

    @property
    def config(self) -> TrainConfig:
        return self.runs[0].result.config

    @property
    def name(self) -> str:
        """Name of the recipe; without one, of the run folder or the result file."""
        path = self.runs[0].path
        return self.config.name or (path.parent.name if path.name == "result.json" else path.stem)

    @property
    def label(self) -> str:
        return method_label(self.config)

    @property
    def full_label(self) -> str:
        """Method, number of blocks, and the fields that differ from the recipe."""
        return ", ".join([run_label(self.config, self.num_blocks), *self.changes])

    @property
    def num_blocks(self) -> int:
        return self.runs[0].result.num_blocks

    @property
    def num_classes(self) -> int:
        return _num_classes(self.runs[0])

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """The order of rows within a table."""
        return (*sort_key(self.config, self.num_blocks), self.name)

    @property
    def precision(self) -> str:
        return self.runs[0].result.precision

    @property
    def is_local(self) -> bool:
        """Whether it has more than one block."""
        return self.num_blocks > 1

    @cached_property
    def recipe(self) -> Recipe | None:
        return recipe_of(self.config)

    @property
    def paper_error(self) -> float | None:
        """Test error in percent that the paper reports for this config; the budget may differ."""
        return self.recipe.paper_error if self.recipe and not self.changes else None

    @cached_property
    def changes(self) -> list[str]:
        """The fields that differ from the recipe, without the budget, as `name value`."""
        if self.recipe is None:
            return []
        own, published = _fields(self.config), _fields(self.recipe.config)
        aside = {*SAME_ROW, *BUDGET, *SAME_WEIGHTS, "data.subset", "precision"}
        changed = [
            f"{name} {'none' if value is None else value}"
            for name, value in own.items()
            if name not in aside and name in published and value != published[name]
        ]
        images = dataset_label(self.config)
        changed += [f"images {images}"] * (images != dataset_label(self.recipe.config))
        return changed + [f"{self.num_classes} classes"] * (self.num_classes != _usual_classes(self.config))

    def values(self, name: str) -> list[float]:
        """One field of the results of all runs."""
        return [getattr(run.result, name) for run in self.runs]

    def mean(self, name: str) -> float:
        """Mean over the runs of a field of their results."""
        return statistics.fmean(self.values(name))

    @property
    def peak_memory_bytes(self) -> float | None:
        """Mean over the runs; None if it was not measured in a run."""
        return mean_or_none([run.result.peak_memory_bytes for run in self.runs])

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the runs; None if a run was too short to measure it."""
        return mean_or_none([run.result.seconds_per_step for run in self.runs])

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation (n - 1) over the runs; None for a single run."""
        return statistics.stdev(self.values(name)) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Table:
    """Rows of one network on one set of images, trained at one budget in one precision."""

    rows: tuple[Row, ...]

    @property
    def config(self) -> TrainConfig:
        return self.rows[0].config

    @property
    def title(self) -> str:
        return where(self.config)

    @property
    def budget(self) -> str:
        """Epochs, images, batch size, learning rate, warm-up and precision as text."""
        optim, data = self.config.optim, self.config.data
        parts = [
            f"{optim.epochs} epoch{'s' * (optim.epochs > 1)}",
            "all training images" if data.train_limit is None else f"{data.train_limit:,} training images",
            f"batch size {optim.batch_size:,}",
            f"learning rate {optim.lr:g}",
            f"warm-up epochs {optim.warmup_epochs:g}",
        ]
        parts += [] if data.test_limit is None else [f"{data.test_limit:,} test images"]
        return ", ".join([*parts, self.rows[0].precision])

    @cached_property
    def labels(self) -> list[str]:
        """Label of each row in a figure: method and blocks; with equal labels, also the changes from the recipe."""
        labels = [run_label(row.config, row.num_blocks) for row in self.rows]
        twice = {label for label, count in Counter(labels).items() if count > 1}
        return [row.full_label if label in twice else label for label, row in zip(labels, self.rows, strict=True)]

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(run.result.device for row in self.rows for run in row.runs))

    @property
    def main_device(self) -> str:
        """The device with the most rows; with equally many rows, the one with the most runs."""
        rows = {device: self.on(device).values() for device in self.devices}
        return max(rows, key=lambda device: (len(rows[device]), sum(len(row.runs) for row in rows[device])))

    def on(self, device: str) -> dict[int, Row]:
        """Rows by position, with their runs on one device: time and memory on different devices cannot be compared."""
        parts = {p: tuple(run for run in row.runs if run.result.device == device) for p, row in enumerate(self.rows)}
        return {position: Row(runs) for position, runs in parts.items() if runs}

    def peaks_on(self, device: str) -> dict[int, float]:
        """Peak memory of a step in bytes by position, for the rows that have it on the device."""
        peaks = {position: row.peak_memory_bytes for position, row in self.on(device).items()}
        return {position: peak for position, peak in peaks.items() if peak is not None}

    @property
    def paper_epochs(self) -> list[int]:
        """Numbers of epochs behind the papers' errors in this table."""
        recipes = [row.recipe for row in self.rows if row.paper_error is not None]
        return sorted({recipe.config.optim.epochs for recipe in recipes if recipe})


def tables(runs: Sequence[FinishedRun]) -> list[Table]:
    """Group all runs into rows, and the rows into tables; of one network, the table with the most epochs is first."""
    rows: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rows.setdefault(_row_key(run), []).append(run)
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for same in rows.values():
        row = Row(tuple(sorted(same, key=lambda run: run.result.config.seed)))
        grouped.setdefault((*setting(row.config), row.precision), []).append(row)
    found = [Table(tuple(sorted(group, key=lambda row: row.sort_key))) for group in grouped.values()]
    return sorted(found, key=lambda table: (table.title, -table.config.optim.epochs, table.budget))


def setting(config: TrainConfig) -> tuple[Any, ...]:
    """Key of a table: data set, network and budget."""
    values = _fields(config)
    return (dataset_label(config), network_label(config), *(values[name] for name in BUDGET))


def one_a_seed(runs: Sequence[FinishedRun], warn: Callable[[str], None]) -> list[FinishedRun]:
    """The runs without duplicates of a row and seed; calls `warn` with a line for each duplicate."""
    kept: dict[tuple[str, int], FinishedRun] = {}
    for run in runs:
        first = kept.setdefault((_row_key(run), run.result.config.seed), run)
        if first is not run:
            warn(f"left out: {run.path} has the settings and the seed of {first.path}; it counts once")
    return list(kept.values())


def _row_key(run: FinishedRun) -> str:
    """Key of a row: its runs have equal keys."""
    result = run.result
    own = own_fields(result.config) | {"precision": result.precision}  # what `auto` chooses depends on the device
    own |= {"num_blocks": result.num_blocks, "num_classes": _num_classes(run), "images": dataset_label(result.config)}
    return json.dumps(own, sort_keys=True)


def _usual_classes(config: TrainConfig) -> int:
    """Number of classes of the data set that the config's name starts with."""
    return CLASSES.get(config.name.partition("-")[0], 10)


def _num_classes(run: FinishedRun) -> int:
    """Number of classes; results of the first versions lack it and have the usual number."""
    return run.result.num_classes or _usual_classes(run.result.config)


def step_key(config: TrainConfig, num_blocks: int, num_classes: int, precision: str) -> str:
    """Key of a step's work: runs with equal keys do the same in a step, so their step times can be compared."""
    own = {name: value for name, value in own_fields(config).items() if name not in SAME_STEP}
    own |= {"num_blocks": num_blocks, "num_classes": num_classes, "precision": precision, "devices": config.devices}
    if limit := config.data.train_limit:
        own["optim.batch_size"] = min(config.optim.batch_size, limit)
    return json.dumps(own, sort_keys=True)


def own_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that distinguish experiments, by dotted name."""
    return {name: value for name, value in _fields(config).items() if name not in SAME_ROW}


@lru_cache(maxsize=4096)
def _fields(config: TrainConfig) -> dict[str, Any]:
    """All fields by dotted name, with the methods' defaults."""
    return flat(to_dict(with_defaults(config)))


def sort_key(config: TrainConfig, num_blocks: int) -> tuple[Any, ...]:
    """The order of trainings: by number of blocks, then by method."""
    return (num_blocks, *method_order(config), method_label(config))


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None if one of the values was not measured."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± std` with the sample standard deviation, for every table."""
    return f"{statistics.fmean(values):.{digits}f}{spread(values, digits)}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """` ± std`, the sample standard deviation (n - 1); empty for a single value."""
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def mebibytes_text(size: float | None, digits: int = 1) -> str:
    """MiB with thousands separators; a dash if it was not measured."""
    return "-" if size is None else f"{size / 2**20:,.{digits}f}"


def seconds_text(seconds: float | None) -> str:
    """Three significant digits, with trailing zeros; a dash if a run was too short to measure it."""
    return "-" if seconds is None else f"{seconds:#.3g}".removesuffix(".")


def parameters_text(row: Row) -> str:
    """Number of parameters of the network, plus that of the auxiliary networks, such as `0.46M + 14k`."""
    counted = row.runs[0].result.parameters
    auxiliary = counted["auxiliary"]
    return _short(counted["backbone"]) + (f" + {_short(auxiliary)}" if auxiliary else "")


def _short(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"
