"""Contents of result files, one dataclass per kind: analyses, plans and step times. Runs have `runs.result.Result`.

A file is the JSON of one dataclass, preceded by its `kind` and `schema`. Files of the first versions have neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localgrad.config.schema import TrainConfig
from localgrad.runs.result import Result


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where and when a file was made; `runs.provenance.provenance` gives the values."""

    device: str
    """Name of the CPU or GPU."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of localgrad, Python, torch and others."""
    commit: str | None = None
    """Git commit of localgrad."""
    date: str | None = None
    """UTC date and time in ISO 8601."""


@dataclass(frozen=True)
class AnalysedRun:
    """A run that was analysed."""

    name: str
    """Name of the run folder."""
    num_blocks: int
    config: TrainConfig


@dataclass(frozen=True)
class AnalysedImages:
    """The images that a run was analysed on."""

    test_images: int
    """Number of test images."""
    source: str = ""
    test_split: str = ""
    class_names: list[str] | None = None
    """Names of the classes in order; None if the images have no class names."""


@dataclass(frozen=True, kw_only=True)
class Analysis(Provenance):
    """Fields of all analyses."""

    runs: list[AnalysedRun]
    """The analysed run, and the run that it is compared with, if any."""
    data: AnalysedImages
    units: list[str]
    """Names of the units, from the input to the output."""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty")


@dataclass(frozen=True, kw_only=True)
class Probe(Analysis):
    """Linear probes on every unit of a network."""

    blocks: list[int] = field(default_factory=list)
    """Number of each unit's block, from 1."""
    accuracies: list[float]
    """Accuracy in percent of the probe on each unit."""
    train_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self.accuracies, len(self.units), "accuracies")


@dataclass(frozen=True, kw_only=True)
class Alignment(Analysis):
    """CKA between the units of two networks."""

    other_units: list[str]
    alignment: list[list[float | None]]
    """CKA of each unit of the first network (rows) and of the second (columns); None for constant features."""
    mean_diagonal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self.runs, 2, "runs")
        _check_length(self.alignment, len(self.units), "alignment")
        for row in self.alignment:
            _check_length(row, len(self.other_units), "a row of alignment")


@dataclass(frozen=True, kw_only=True)
class Pictures(Analysis):
    """Activation maps of a few images, and features of many images projected to two dimensions."""

    blocks: list[int]
    image_labels: list[int]
    thumbnails: list[Any]
    """The images that the maps are of: height x width x 3, values 0 to 255."""
    maps: list[Any]
    """For each unit one map (height x width) per image; None for a unit whose features are no map."""
    point_labels: list[int]
    points: list[list[tuple[float, float]]]
    """For each unit the two coordinates of every image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blocks", "maps", "points"):
            _check_length(getattr(self, name), len(self.units), name)
        for points in self.points:
            _check_length(points, len(self.point_labels), "points")
        for maps in (self.thumbnails, *(each for each in self.maps if each is not None)):
            _check_length(maps, len(self.image_labels), "maps")


@dataclass(frozen=True)
class PlannedRow:
    """The predicted peak memory of a step with one number of blocks."""

    training: str
    """Momentum auxiliary network, such as `man, recomputed`."""
    num_blocks: int
    recompute: bool
    """Whether every unit uses activation checkpointing."""
    peak: int
    """Predicted peak in bytes."""
    cuts: tuple[str, ...] = ()
    """Names of the units at which the gradient is stopped."""
    fits: bool = True
    """Whether the peak is within the budget."""
    parts: int = 1
    """Number of micro-batches."""
    operations: float | None = None
    """Floating-point operations of a step, relative to end-to-end training with the whole batch."""


@dataclass(frozen=True, kw_only=True)
class Plan(Provenance):
    """Predicted peak memory of a network's training step for several numbers of blocks."""

    title: str
    """Network, batch, image size, precision, optimizer and objective."""
    budget: int | None = None
    """Memory budget in bytes."""
    rows: list[PlannedRow]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty")


@dataclass(frozen=True)
class TimedRow:
    """A training whose steps were timed. Benchmarks other than `localgrad time` may set only the first two fields."""

    row: str
    """Label of the training."""
    seconds_per_step: float
    """Seconds per step, median over the rounds."""
    ratio_to_first: float | None = None
    """Ratio of its time to that of the first row in the same round, median over the rounds."""
    num_blocks: int | None = None
    num_classes: int | None = None
    precision: str | None = None
    config: TrainConfig | None = None

    def __post_init__(self) -> None:
        if self.config is not None:
            for name in ("num_blocks", "num_classes", "precision"):
                if getattr(self, name) is None:
                    raise ValueError(f"a row with a config has no {name!r}")


@dataclass(frozen=True, kw_only=True)
class StepTimes(Provenance):
    """Seconds per step of several trainings that ran one step each in turn."""

    rows: list[TimedRow]
    settings: dict[str, Any] = field(default_factory=dict)
    """Network, batch size, rounds."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of the step in each round, by row."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty")


KINDS: dict[str, type] = {
    "run": Result,
    "probe": Probe,
    "cka": Alignment,
    "pictures": Pictures,
    "plan": Plan,
    "step-times": StepTimes,
}


def kind_name(content: Any) -> str:
    """The kind of an instance of one of the dataclasses in `KINDS`."""
    return next(name for name, kind in KINDS.items() if type(content) is kind)


def kind_of(values: dict[str, Any]) -> str | None:
    """The `kind` of a file. For files of the first versions, the kind that its fields match; None without a match."""
    if "kind" in values:
        return str(values["kind"])
    if "config" in values and "test_error" in values:
        return "run"
    if "analysis" in values:
        return str(values["analysis"])
    if _has_rows(values, "peak", "training", "num_blocks", "recompute") and "title" in values:
        return "plan"
    return "step-times" if _has_rows(values, "row", "seconds_per_step") else None


def _has_rows(values: dict[str, Any], *names: str) -> bool:
    rows = values.get("rows")
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and {*names} <= {*row} for row in rows)


def _check_length(values: Sequence[Any], length: int, name: str) -> None:
    if len(values) != length:
        raise ValueError(f"{name} must be a list of {length}, it has {len(values)}")
