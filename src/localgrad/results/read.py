"""Result files below a folder, read back: runs, analyses, plans and step times."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from localgrad.errors import LocalGradError
from localgrad.runs.files import read_json
from localgrad.runs.result import Result

CONFIG_TEXTS = {"": ("name",), "model": ("name",), "data": ("source",), "objective": ("name",), "momentum": ("name",)}


CONFIG_NUMBERS = {"": ("seed",), "model": ("depth",), "optim": ("epochs", "batch_size")}
"""Fields of a config that are read here, by part."""


@dataclass(frozen=True)
class FinishedRun:
    """One finished run."""

    path: Path
    result: Result
    metrics: list[dict[str, Any]]
    """One line an epoch; empty where there is no file of them."""


@dataclass(frozen=True)
class Sheet:
    """Any other result: an analysis, a plan, or a table of step times, as its file has it."""

    path: Path
    values: dict[str, Any]


@dataclass
class Results:
    """Everything that was found."""

    runs: list[FinishedRun] = field(default_factory=list)
    probes: list[Sheet] = field(default_factory=list)
    alignments: list[Sheet] = field(default_factory=list)
    pictures: list[Sheet] = field(default_factory=list)
    plans: list[Sheet] = field(default_factory=list)
    speeds: list[Sheet] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(getattr(self, each.name)) for each in fields(self))


def read_results(folder: Path, warn: Callable[[str], None]) -> Results:
    """Reads every result file below a folder, in the order of their paths.

    Args:
        folder: searched with all its subfolders for `*.json`.
        warn: told, in one line each, which files are damaged or hold nothing that is known, and left out.

    Raises:
        LocalGradError: there is no such folder, or nothing to show in it.
    """
    if not folder.is_dir():
        raise LocalGradError(f"{folder} is not a folder; give the one that holds the results")
    found = Results()
    unknown = []
    for path in _json_files(folder, warn):
        if path.name == "config.json" or (path.name == "table.json" and (path.parent / "curves.png").exists()):
            continue  # of a run or of the demo, whose results have it too
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


def _json_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """All of them in order of their paths, in linked folders too, each once."""
    found: list[Path] = []
    seen: set[str] = set()

    def cannot(error: OSError) -> None:
        warn(f"left out: {error.filename} cannot be read: {error.strerror or error}")

    for parent, folders, names in os.walk(folder, onerror=cannot, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that is above it, or was found already
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names if name.endswith(".json")]
    return sorted(found)


def _sort_in(found: Results, path: Path, values: Any, warn: Callable[[str], None]) -> bool:
    """Adds a file to the results; False if it holds nothing that is known."""
    if not isinstance(values, dict):
        return False
    try:
        if "config" in values and "test_error" in values:
            run = FinishedRun(path, checked_result(values), _metrics(path, values, warn))
            if not any(_same_run(run.result, other.result) for other in found.runs):
                found.runs.append(run)
        elif "analysis" in values:
            kinds = {"probe": found.probes, "cka": found.alignments, "pictures": found.pictures}
            kinds[values["analysis"]].append(Sheet(path, _checked_analysis(values)))
        elif _has_rows(values, "peak", "training", "num_blocks", "recompute") and "title" in values:
            found.plans.append(Sheet(path, _checked_rows(values, "peak", "num_blocks")))
        elif _has_rows(values, "row", "seconds_per_step"):
            found.speeds.append(Sheet(path, _checked_rows(values, "seconds_per_step")))
        else:
            return "versions" in values  # another benchmark's, for which there is no section
    except KeyError as error:
        raise LocalGradError(f"{path} is damaged: it has no {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise LocalGradError(f"{path} is damaged: {error}") from None
    return True


def _same_run(one: Result, other: Result) -> bool:
    """Whether two files are of one run: the run folder's, and a table's, where its images may have another path."""
    sources = [result.config["data"]["source"] for result in (one, other)]
    moved = replace(other, config={**other.config, "data": {**other.config["data"], "source": sources[0]}})
    return one == moved


def _has_rows(values: dict[str, Any], *names: str) -> bool:
    rows = values.get("rows")
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and {*names} <= {*row} for row in rows)


def _checked_rows(values: dict[str, Any], *names: str) -> dict[str, Any]:
    for row in values["rows"]:
        for name in names:
            number(row[name], name)
        if "config" in row:
            for name in ("num_blocks", "num_classes"):
                number(row[name], name)
            if not isinstance(row["precision"], str):
                raise ValueError(f"precision is {row['precision']!r}, not a text")
            _check_config(row["config"])
    return values


def checked_result(values: dict[str, Any]) -> Result:
    """The result of a run, as its file has it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: a field is missing, or not what it should be.
    """
    result = Result(
        **{each.name: values[each.name] for each in fields(Result) if each.name in values or each.default is MISSING}
    )
    for name in ("test_error", "best_test_error", "best_epoch", "num_blocks", "peak_memory_bytes"):
        number(getattr(result, name), name)
    if result.local_errors is not None:
        _check_length(result.local_errors, int(result.num_blocks), "local_errors")
    if result.seconds_per_step is not None:  # of a run of two steps or fewer
        number(result.seconds_per_step, "seconds_per_step")
    number(result.wall_seconds, "wall_seconds")
    for name in ("backbone", "auxiliary"):
        number(result.parameters[name], f"parameters.{name}")
    if not isinstance(result.precision, str):
        raise ValueError(f"precision is {result.precision!r}, not a text")
    _check_config(result.config)
    return result


def _check_config(config: dict[str, Any]) -> None:
    for part, names in CONFIG_TEXTS.items():
        for name in names:
            value = (config[part] if part else config)[name]
            if not isinstance(value, str):
                raise ValueError(f"config.{part}.{name} is {value!r}, not a text")
    for part, names in CONFIG_NUMBERS.items():
        for name in names:
            number((config[part] if part else config)[name], f"config.{part}.{name}")


def _checked_analysis(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an analysis, if they have the form that `localgrad analyse` writes."""
    runs, units = values["runs"], values["units"]
    for run in runs:
        number(run["num_blocks"], "num_blocks")
        _check_config(run["config"])
    number(values["data"]["test_images"], "test_images")
    if values["analysis"] == "probe":
        _check_length(values["accuracies"], len(units), "accuracies")
        for value in values["accuracies"]:
            number(value, "accuracy")
    elif values["analysis"] == "cka":
        _check_length(runs, 2, "runs")
        _check_length(values["alignment"], len(units), "alignment")
        for row in values["alignment"]:
            _check_length(row, len(values["other_units"]), "a row of alignment")
            for value in row:
                number(0 if value is None else value, "alignment")
    else:
        for part in ("maps", "points"):
            _check_length(values[part], len(units), part)
        for points in values["points"]:
            _check_length(points, len(values["point_labels"]), "points")
        for maps in (values["thumbnails"], *(each for each in values["maps"] if each is not None)):
            _check_length(maps, len(values["image_labels"]), "maps")
    return values


def _check_length(values: Any, length: int, name: str) -> None:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{name} must be a list of {length}")


def number(value: Any, name: str) -> float:
    """The value, if it is a finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return value
    except OverflowError:  # of an integer beyond every float
        raise ValueError(f"{name} is far too large") from None
    raise ValueError(f"{name} is {value!r}, not a number")


def _metrics(path: Path, values: dict[str, Any], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Lines of metrics: from the errors by epoch in the result, as `reproduce` keeps them, or the file beside it."""
    if "test_errors" in values:
        errors = enumerate(values["test_errors"], start=1)
        return [_metric({"epoch": epoch, "test_error": error}) for epoch, error in errors]
    beside = path.with_name("metrics.jsonl") if path.name == "result.json" else path.with_suffix(".jsonl")
    if not beside.exists():
        return []
    try:
        texts = beside.read_text(errors="replace").splitlines()
    except OSError as error:
        warn(f"left out: {beside} cannot be read: {error.strerror or error}")
        return []
    lines = []
    for position, text in enumerate(texts, start=1):
        try:
            lines.append(_metric(json.loads(text)))
        except (ValueError, TypeError, KeyError) as error:
            warn(f"left out: {beside}, line {position}, is damaged ({error})")
    return lines


def _metric(line: dict[str, Any]) -> dict[str, Any]:
    number(line["epoch"], "epoch")
    if line["test_error"] is not None:
        number(line["test_error"], "test_error")
    return line
