"""Plan a model by name, and show the plan: a table, a JSON file, and a picture of peak memory against K."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localgrad.config.build import build_model, build_planned
from localgrad.config.methods import MOMENTA, OBJECTIVES
from localgrad.config.schema import ModelConfig
from localgrad.data.config import MAX_IMAGE_SIZE
from localgrad.errors import LocalGradError, closest
from localgrad.planning.plan import Planner, PlanRow
from localgrad.planning.simulation import Precision
from localgrad.results.kinds import Plan, PlannedRow
from localgrad.results.terminal import print_table
from localgrad.runs.files import make_folder, write_json
from localgrad.runs.provenance import provenance
from localgrad.runs.result import as_file

UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Sheet:
    """Rows of a plan with one choice of momentum network."""

    label: str
    rows: list[PlanRow]


def parse_bytes(text: str) -> int:
    """Number of bytes of a size such as `8GiB`, `500MB` or `1.5 gib`.

    Raises:
        LocalGradError: the text is not a positive size with a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = found and UNITS.get(found[2].lower())
    if not found or not unit or not 0 < float(found[1]) * unit < 2**63:
        raise LocalGradError(f"budget is {text!r}: give a size with its unit, such as 8GiB or 500MB")
    return round(float(found[1]) * unit)


def plan_model(
    name: str,
    *,
    depth: int,
    num_classes: int,
    batch_size: int,
    image_size: int,
    objective: str,
    momentum: str,
    budget: int | None,
    num_blocks: Sequence[int] | None,
    precision: Precision = "32-true",
    reach: int = 1,
    step_each_block: bool = False,
) -> list[Sheet]:
    """Plan a model by name without momentum and, unless it is `none`, with it: with and without checkpointed branches.

    Raises:
        LocalGradError: an argument is out of range, a name is unknown, or nothing fits the budget.
    """
    sizes = {"batch_size": batch_size, "image_size": image_size, "num_classes": num_classes}
    limits = {"batch_size": (1, 2**20 - 1), "image_size": (1, MAX_IMAGE_SIZE), "num_classes": (2, 2**20 - 1)}
    wrong = [
        f"{key} is {value}, it must be from {limits[key][0]} to {limits[key][1]}"
        for key, value in sizes.items()
        if not limits[key][0] <= value <= limits[key][1]
    ]
    for kind, given, known in (("objective", objective, OBJECTIVES), ("momentum", momentum, {"none": 0, **MOMENTA})):
        if given not in known:
            wrong.append(f"{kind} is {given!r}{closest(given, list(known))}; it is one of {', '.join(known)}")
    if wrong:
        raise LocalGradError("; ".join(wrong))
    model = build_model(ModelConfig(name=name, depth=depth), num_classes)
    example = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    factory = build_planned(objective, num_classes, image_size)
    choices = {"no momentum": None}
    if momentum != "none":
        choices[momentum] = MOMENTA[momentum].factory()
        choices[f"{momentum}, recomputed"] = MOMENTA[momentum].factory(recompute=True)
    sheets: list[Sheet] = []
    refusals: list[tuple[int, LocalGradError]] = []
    known: dict[Any, Any] = {}
    for label, choice in choices.items():
        planner = Planner(
            model,
            example,
            known=known,
            objective=factory,
            momentum=choice,
            precision=precision,
            reach=reach,
            step_each_block=step_each_block,
        )
        rows = planner.rows(num_blocks, budget)
        sheets.append(Sheet(label, rows))
        refusals.append((min(row.peak for row in rows), planner.nothing_fits(rows, budget or 0)))
    if not any(row.fits for sheet in sheets for row in sheet.rows):
        raise min(refusals, key=lambda refusal: refusal[0])[1]
    return sheets


def show_sheets(title: str, sheets: Sequence[Sheet], budget: int | None) -> None:
    """Print the peaks, with and without checkpointing, by number of blocks and micro-batches; then the best cuts."""
    size, unit = (2**30, "GiB") if max(row.peak for sheet in sheets for row in sheet.rows) >= 2**30 else (2**20, "MiB")
    lines = []
    ways = sorted({(row.num_blocks, row.parts) for sheet in sheets for row in sheet.rows})
    for count, parts in ways:
        cells: list[str] = []
        for number, sheet in enumerate(sheets):
            rows = [row for row in sheet.rows if (row.num_blocks, row.parts) == (count, parts)]
            figures = [
                f"{row.peak / size:.2f}{'*' if budget and row.fits else ''} ({row.operations:.2f})" for row in rows
            ]
            cells.append(" | ".join(figures) if count > 1 or number == 0 else "")
        blocks = "end-to-end" if count == 1 else str(count)
        lines.append((f"{blocks}, {parts} micro-batches" if parts > 1 else blocks, *cells))
    print_table(
        ["blocks", *(sheet.label for sheet in sheets)],
        lines,
        title=f"{title}: peak {unit} of a step (operations to end-to-end), activations kept | units checkpointed",
        left=(),
    )
    if budget:
        print(f"* fits {budget / size:.2f} {unit}")
    for heading, row in _choices(sheets, budget).items():
        how = f"{row.num_blocks} blocks{', units checkpointed' if row.recompute else ''}"
        print(f"{heading}: {how}, {row.peak / size:.2f} {unit}")
        print(f"  cuts {' '.join(row.cuts)}")


def _choices(sheets: Sequence[Sheet], budget: int | None) -> dict[str, PlanRow]:
    """For each momentum network: the local row with the fewest blocks that fits, without checkpointing if possible.

    Rows of micro-batches are not chosen, because they change batch norm and losses of a whole batch. Without a budget,
    or if no local row fits, it is the local row with the smallest peak.
    """
    choices = {}
    for sheet in sheets:
        local = [row for row in sheet.rows if row.num_blocks > 1 and row.parts == 1]
        fitting = [row for row in local if row.fits]
        if budget and fitting:
            best = min(fitting, key=lambda row: (row.recompute, row.num_blocks))
            kept = ", checkpointed" if best.recompute else ""
            choices[f"fewest blocks that fit{kept}, no micro-batches, {sheet.label}"] = best
        elif local:
            choices[f"least memory, no micro-batches, {sheet.label}"] = min(local, key=lambda row: row.peak)
    return choices


def write_sheets(folder: Path, title: str, sheets: Sequence[Sheet], budget: int | None) -> None:
    """Write `plan.json` and `plan.png` into the folder.

    Raises:
        LocalGradError: the folder cannot be written.
    """
    from localgrad.results.figures import planned_peaks, save_png

    make_folder(folder, "give another --output")
    rows = [
        PlannedRow(sheet.label, row.num_blocks, row.recompute, row.peak, row.cuts, row.fits, row.parts, row.operations)
        for sheet in sheets
        for row in sheet.rows
    ]
    plan = Plan(title=title, budget=budget, rows=rows, **provenance(torch.device("cpu")))
    write_json(folder / "plan.json", as_file("plan", plan))
    save_png(planned_peaks(plan).figure, folder / "plan.png")
