"""Tables of error, operations, peak memory and seconds from `results/`; `documents.py` writes them.

A row is a recipe of ResNet-32 on CIFAR-10, named without the prefix of data set and network. Its errors are those of a
schedule of ten epochs. Runs on a CPU are complete; runs on a GPU may have been cut off.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localgrad.results.tables import mean_std

NETWORK = "cifar10-resnet32-"
EPOCHS = 10
"""Length of the schedule in epochs."""
COMPARED = 8
"""The epoch at which rows are compared: the last that most of the runs on the GPU reached."""


@dataclass
class Row:
    """Costs of a row, and its test errors by epoch.

    Attributes:
        operations: operations of the forward and backward passes of a step, relative to end-to-end.
        peak: peak memory of a float32 step of 128 images, relative to end-to-end.
        milliseconds: milliseconds of a step on the GPU, with a CUDA graph.
        seconds: time of a step on a CPU, relative to end-to-end.
        cpu: test errors in percent after each epoch on a CPU, one list per seed.
        gpu: test errors in percent after each epoch of the longest run on a GPU.
    """

    name: str
    blocks: int
    operations: float
    peak: float
    milliseconds: float | None = None
    seconds: float | None = None
    cpu: list[list[float]] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)

    @property
    def reach(self) -> int:
        """Number of blocks that each local loss trains."""
        before, _, number = self.name.partition("reach")
        return int(number) if before != self.name else 1

    def errors(self, epoch: int) -> list[float]:
        """Errors after this epoch on a CPU, one per seed."""
        return [errors[epoch - 1] for errors in self.cpu]

    def error(self, epoch: int) -> float | None:
        """Mean error after this epoch on a CPU; without runs there, the error on the GPU."""
        if self.cpu:
            return statistics.mean(self.errors(epoch))
        return self.gpu[epoch - 1] if len(self.gpu) >= epoch else None


def rows(root: Path) -> list[Row]:
    """All rows with counted operations, the smallest error first; rows that were not trained come last."""
    found = {
        row["row"]: Row(row["row"], row["blocks"], row["operations_to_e2e"], row["peak_to_e2e"])
        for row in _read(root / "results" / "operations.json")["rows"]
    }
    for row in _read(root / "results" / "gpu" / "speed.json")["rows"]:
        if row["graph"] and row["row"].removeprefix(NETWORK) in found:
            found[row["row"].removeprefix(NETWORK)].milliseconds = 1000 * row["seconds_per_step"]
    folder = root / "results" / "cifar10-ten-epochs"
    for row in _read(folder / "step-times.json")["rows"]:
        found[_name(row["config"])].seconds = row["ratio_to_first"]
    for path in sorted(folder.glob("*-seed*.json")):
        run = _read(path)
        found[_name(run["config"])].cpu.append(run["test_errors"])
    whole, checkpointed = found["e2e"].cpu, found["e2e-checkpointed"]
    if checkpointed.cpu and all(errors in whole for errors in checkpointed.cpu):
        checkpointed.cpu = whole  # the same gradients: with the same seed, equal errors in every epoch
    for run in cut_off(root, EPOCHS):
        row = found[run["recipe"].removeprefix(NETWORK)]
        row.gpu = max(row.gpu, run["test_errors"], key=len)
    return sorted(found.values(), key=_order)


def cut_off(root: Path, epochs: int) -> list[dict[str, Any]]:
    """The runs on a GPU that were planned for this number of epochs."""
    runs = _read(root / "results" / "gpu" / "trainings.json")["rows"]
    return [run for run in runs if run["epochs_planned"] == epochs]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _name(config: dict[str, Any]) -> str:
    """Name of the row; a recipe with `--recompute` gets the suffix `-checkpointed`."""
    return config["name"].removeprefix(NETWORK) + ("-checkpointed" if config.get("recompute") else "")


def _order(row: Row) -> tuple[bool, float, float]:
    """Sort key: the error; rows that were not trained follow, by operations."""
    error = row.error(COMPARED)
    return not (row.cpu or row.gpu), 100.0 if error is None else error, row.operations


def front(every: Sequence[Row], cost: Callable[[Row], float | None]) -> list[Row]:
    """The Pareto front: rows for which no other row is at least as good in error and cost, and better in one.

    Rows without this cost or without an error are left out.
    """
    points = [
        (error, price, row)
        for row in every
        if (error := row.error(COMPARED)) is not None and (price := cost(row)) is not None
    ]
    return [
        row
        for error, price, row in points
        if not any(e <= error and c <= price and (e, c) != (error, price) for e, c, _ in points)
    ]


def accuracy_table(root: Path) -> str:
    """Costs and errors of the trained rows, and costs of end-to-end rows that were not trained."""
    every = [row for row in rows(root) if row.cpu or row.gpu or row.name.startswith("e2e")]
    fronts = {"peak": front(every, lambda row: row.peak), "operations": front(every, lambda row: row.operations)}
    fronts["CPU"] = front(every, lambda row: row.seconds)
    lines = [
        "| row | blocks | reach | operations | peak | GPU, ms | CPU | error after 8 | after 10 | n | front |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in every:
        error = row.error(COMPARED)
        eight = mean_std(row.errors(COMPARED)) if row.cpu else "" if error is None else f"{error:.2f}"
        cells = [*_costs(row), "" if row.seconds is None else f"{row.seconds:.2f}", eight]
        cells += [mean_std(row.errors(EPOCHS)) if row.cpu else ""]
        cells += [str(len(row.cpu)) if row.cpu else "1, GPU" if row.gpu else "0"]
        cells += [", ".join(name for name, best in fronts.items() if row in best)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _costs(row: Row) -> list[str]:
    """The cells with name and costs of a row."""
    milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.1f}"
    shares = f"{row.operations:.2f}", f"{row.peak:.2f}"
    return [f"`{row.name}`", str(row.blocks), str(row.reach), *shares, milliseconds]


def epochs_table(root: Path) -> str:
    """Errors by epoch on both devices, for the rows that ran on the GPU."""
    epochs = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    lines = [f"| row | on | n | {' | '.join(map(str, epochs))} |", f"|---|---|--:|{'--:|' * len(epochs)}"]
    for row in (row for row in rows(root) if row.gpu):
        cpu = [f"{row.error(epoch):.1f}" for epoch in epochs] if row.cpu else []
        gpu = [f"{error:.1f}" for error in row.gpu]
        for device, n, errors in (("CPU", len(row.cpu), cpu), ("GPU", 1, gpu)):
            if errors:
                cells = [f"`{row.name}`", device, str(n), *errors, *[""] * (len(epochs) - len(errors))]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_table(root: Path) -> str:
    """Costs of the rows that have not been trained."""
    lines = ["| row | blocks | reach | operations | peak | GPU, ms |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows(root):
        if not (row.cpu or row.gpu or row.name.startswith("e2e")):
            lines.append(f"| {' | '.join(_costs(row))} |")
    return "\n".join(lines)


def thirty_table(root: Path) -> str:
    """Errors of the runs of thirty epochs, up to the epoch where they were cut off."""
    epochs = (2, 4, 6, 8)
    heads = [f"after {number}" for number in epochs]
    lines = [f"| row | blocks | epochs | {' | '.join(heads)} | last |", f"|---|{'--:|' * (len(epochs) + 3)}"]
    for run in sorted(cut_off(root, 30), key=lambda run: run["test_errors"][5]):
        errors = run["test_errors"]
        cells = [f"`{run['recipe'].removeprefix(NETWORK)}`", str(run["num_blocks"]), str(len(errors))]
        cells += [f"{errors[epoch - 1]:.2f}" if len(errors) >= epoch else "" for epoch in epochs]
        lines.append(f"| {' | '.join([*cells, f'{errors[-1]:.2f}'])} |")
    return "\n".join(lines)


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Functions that make the tables, by the name of their marks in the documents."""
    return {
        "accuracy": lambda: accuracy_table(root),
        "epochs": lambda: epochs_table(root),
        "costs": lambda: costs_table(root),
        "thirty": lambda: thirty_table(root),
    }
