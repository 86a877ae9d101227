"""Read the result files below a folder: runs, analyses, plans and step times."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from localgrad.config.typed import parse
from localgrad.errors import LocalGradError
from localgrad.results.kinds import KINDS, Alignment, Pictures, Plan, Probe, StepTimes, kind_of
from localgrad.runs.files import read_json
from localgrad.runs.result import Result, from_file

Values = TypeVar("Values")
MARKS = ("versions", "environment", "device", "torch", "task")
"""A file without a kind that has one of these fields is a result of a benchmark or an example."""
OTHERS = ("config.json", "images.json")
"""Files of a run folder that are not results."""


@dataclass(frozen=True)
class EpochError:
    """The fields of a line of `metrics.jsonl` that the report needs."""

    epoch: int
    test_error: float | None
    """Test error in percent; None for an epoch without evaluation."""


@dataclass(frozen=True)
class FinishedRun:
    """One finished run."""

    path: Path
    result: Result
    metrics: tuple[EpochError, ...]
    """One entry per epoch; empty if there is no file of metrics."""


@dataclass(frozen=True)
class File(Generic[Values]):
    """A result file of any other kind."""

    path: Path
    values: Values


@dataclass
class Results:
    """All results below a folder."""

    runs: list[FinishedRun] = field(default_factory=list)
    probes: list[File[Probe]] = field(default_factory=list)
    alignments: list[File[Alignment]] = field(default_factory=list)
    pictures: list[File[Pictures]] = field(default_factory=list)
    plans: list[File[Plan]] = field(default_factory=list)
    speeds: list[File[StepTimes]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Results of benchmarks and examples, which the report lists but does not show."""

    def __len__(self) -> int:
        return len(self.runs) + len(self.files)

    @property
    def files(self) -> list[File[Any]]:
        """All results but the runs."""
        return [*self.probes, *self.alignments, *self.pictures, *self.plans, *self.speeds]


def read_results(folder: Path, warn: Callable[[str], None]) -> Results:
    """Read every result file below a folder, in the order of their paths.

    Args:
        folder: folder to search for `*.json`, with all its subfolders.
        warn: called with one line for each file that is damaged or that only a later version can read, and with one
            line that lists all files that are not results.

    Raises:
        LocalGradError: there is no such folder, or it holds no results.
    """
    if not folder.is_dir():
        raise LocalGradError(f"{folder} is not a folder; give the one that holds the results")
    found = Results()
    unknown = []
    for path in _json_files(folder, warn):
        if path.name in OTHERS or (path.name == "table.json" and (path.parent / "curves.png").exists()):
            continue  # the table of the demo: its runs are read from their own folders
        try:
            if not _sort_in(found, path, read_json(path, finite=True), warn):
                unknown.append(str(path.relative_to(folder)))
        except LocalGradError as problem:
            warn(f"left out: {problem}")
    if unknown:
        warn(f"left out, no result that is known: {', '.join(unknown)}")
    if not len(found):
        raise LocalGradError(
            f"{folder} has no results: it needs run folders with result.json, or what analyse, plan --output or "
            "benchmarks/speed.py wrote"
        )
    return found


def read_result(path: Path) -> Result:
    """Read the result of a run.

    Raises:
        LocalGradError: the file is missing, damaged, or not the result of a run.
    """
    content = read_file(path)
    if not isinstance(content, Result):
        raise LocalGradError(f"{path} is no result of a run")
    return content


def read_file(path: Path) -> Any:
    """Read a result file of any kind into its dataclass; None for a file of no known kind.

    Raises:
        LocalGradError: the file is missing or damaged, or a later version wrote it.
    """
    values = read_json(path, finite=True)
    kind = kind_of(values) if isinstance(values, dict) else None
    return from_file(KINDS[kind], values, path) if kind in KINDS else None


def _json_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """All JSON files in the order of their paths, each once; follows links to folders."""
    found: list[Path] = []
    seen: set[str] = set()

    def cannot(error: OSError) -> None:
        warn(f"left out: {error.filename} cannot be read: {error.strerror or error}")

    for parent, folders, names in os.walk(folder, onerror=cannot, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above it, or to one that was searched already
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names if name.endswith(".json")]
    return sorted(found)


def _sort_in(found: Results, path: Path, values: Any, warn: Callable[[str], None]) -> bool:
    """Add a file to the results; return False for a file that is not a result."""
    if not isinstance(values, dict):
        return False
    kind = kind_of(values)
    if kind == "benchmark" or (kind is None and not values.keys().isdisjoint(MARKS)):
        found.others.append(path)
        return True
    if kind is None:
        return False
    if kind not in KINDS:
        raise LocalGradError(f"{path} has the kind {kind!r}: this version knows {', '.join(KINDS)}")
    content: Any = from_file(KINDS[kind], values, path)
    if isinstance(content, Result):
        run = FinishedRun(path, content, _metrics(path, values, warn))
        if not any(_same_run(run.result, other.result) for other in found.runs):
            found.runs.append(run)
        return True
    places: dict[type, list[Any]] = {
        Probe: found.probes,
        Alignment: found.alignments,
        Pictures: found.pictures,
        Plan: found.plans,
        StepTimes: found.speeds,
    }
    places[type(content)].append(File(path, content))
    return True


def _same_run(one: Result, other: Result) -> bool:
    """Whether two files, of a run folder and of a table, hold the same run; the path of the images may differ."""
    data = replace(other.config.data, source=one.config.data.source)
    moved = replace(other, config=replace(other.config, data=data), command=one.command, test_errors=one.test_errors)
    return one == moved


def _metrics(path: Path, values: dict[str, Any], warn: Callable[[str], None]) -> tuple[EpochError, ...]:
    """Test errors by epoch: from the result, if `reproduce` wrote them there, or from the metrics file beside it."""
    if values.get("test_errors") is not None:
        return tuple(EpochError(epoch, error) for epoch, error in enumerate(values["test_errors"], start=1))
    beside = path.with_name("metrics.jsonl") if path.name == "result.json" else path.with_suffix(".jsonl")
    if not beside.exists():
        return ()
    try:
        texts = beside.read_text(errors="replace").splitlines()
    except OSError as error:
        warn(f"left out: {beside} cannot be read: {error.strerror or error}")
        return ()
    lines = []
    for position, text in enumerate(texts, start=1):
        try:
            lines.append(parse(EpochError, json.loads(text)))
        except (ValueError, RecursionError) as error:  # invalid JSON, or other fields
            warn(f"left out: {beside}, line {position}, is damaged ({error})")
    return tuple(lines)
