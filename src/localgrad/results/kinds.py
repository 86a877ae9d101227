"""What result files hold, a dataclass each: analyses, plans and step times. Runs have `runs.result.Result`.

A file is one of these as JSON, behind its `kind` and the `schema` of its fields. Files from before say neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localgrad.config.schema import TrainConfig
from localgrad.runs.result import Result


@dataclass(frozen=True, kw_only=True)
class Origin:
    """On what a file was made."""

    device: str
    """Name of the processor or GPU."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of localgrad, Python, torch and others."""
    commit: str | None = None
    """Commit of localgrad's code."""
    date: str | None = None
    """Day and time, in UTC, by ISO 8601."""


@dataclass(frozen=True)
class AnalysedRun:
    """A run that was analysed."""

    name: str
    """Name of its folder."""
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
    """Names of the classes in order, where the images have such."""


@dataclass(frozen=True, kw_only=True)
class Analysis(Origin):
    """What all analyses have."""

    runs: list[AnalysedRun]
    """The run that was analysed, and the one that it was compared with."""
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
    """Number of the block that each unit belongs to."""
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
    """A row a unit of the first network; None where a unit's features do not vary."""
    mean_diagonal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self.runs, 2, "runs")
        _check_length(self.alignment, len(self.units), "alignment")
        for row in self.alignment:
            _check_length(row, len(self.other_units), "a row of alignment")


@dataclass(frozen=True, kw_only=True)
class Pictures(Analysis):
    """Activation maps of some images, and features of many in two dimensions."""

    blocks: list[int]
    image_labels: list[int]
    thumbnails: list[Any]
    """The images of the maps: height x width x 3, from 0 to 255."""
    maps: list[Any]
    """For each unit a map (height x width) an image; None for a unit without height and width."""
    point_labels: list[int]
    points: list[list[tuple[float, float]]]
    """For each unit the positions of all images."""

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
    """The predicted peak of a step with so many blocks."""

    training: str
    """Which auxiliary network, as `man, recomputed`."""
    num_blocks: int
    recompute: bool
    """Whether units are checkpointed."""
    peak: int
    """Bytes."""
    cuts: tuple[str, ...] = ()
    """Units after which gradients are isolated."""
    fits: bool = True
    """Whether the peak is within the budget."""
    parts: int = 1
    """Number of micro-batches."""
    operations: float | None = None
    """Floating-point operations, over those of end-to-end training with the whole batch."""


@dataclass(frozen=True, kw_only=True)
class Plan(Origin):
    """Predicted peaks of a network's step over the number of blocks."""

    title: str
    """Network, batch, image size, precision, optimizer and objective."""
    budget: int | None = None
    """Bytes."""
    rows: list[PlannedRow]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty")


@dataclass(frozen=True)
class TimedRow:
    """A training whose steps were timed. Benchmarks other than `localgrad time` leave out all but the first two."""

    row: str
    """What it is called."""
    seconds_per_step: float
    """Median over the rounds."""
    ratio_to_first: float | None = None
    """Median over the rounds of its time over that of the first row."""
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
class StepTimes(Origin):
    """Seconds of the steps of several trainings that took turns."""

    rows: list[TimedRow]
    settings: dict[str, Any] = field(default_factory=dict)
    """Network, batch size, rounds."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of every round, by row."""

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
    """The kind of a dataclass of `KINDS`."""
    return next(name for name, kind in KINDS.items() if type(content) is kind)


def kind_of(values: dict[str, Any]) -> str | None:
    """The kind that a file says; of files from before, the one that its fields have. None for other benchmarks."""
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
