"""Draw the pictures of the documents from the files in `results/`; a test fails if they disagree.

    python benchmarks/pictures.py

The script writes the SVG itself, so that equal results give equal files, and that the text follows the reader's light
or dark theme.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_tables import COMPARED, Row, rows
from task_tables import SETTINGS, Result, frozen, results

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
STYLE = """
text { font: 12px sans-serif; fill: #1f2328; } .title { font-weight: bold; } .small { font-size: 11px; }
line { stroke: #8c959f; stroke-width: 1; } .grid { stroke-opacity: 0.35; } .rival { stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }
"""
COLORS = {"end-to-end": "#6e7781", "DGL": "#2f7ed8", "MAN": "#e0701a", "AugLocal": "#1fa187", "other": "#b05cc6"}
"""Color by family of methods; readable on white and on black."""
LEFT, WIDTH, HEIGHT = 46, 350, 330
RIGHT = WIDTH + 30
"""Left edge of the second column of panels."""
CURVES = {
    "e2e": ("end-to-end", "end-to-end", ""),
    "l2": ("end-to-end, two layers", "end-to-end", "rival"),
    "k3-readout": ("three blocks, readout", "DGL", ""),
    "k3-depth1": ("the same, one fresh layer", "AugLocal", ""),
    "k3-man": ("the same, MAN", "MAN", ""),
}
"""Rows of a language setting to draw: label, color, and class of the line."""
PLANNED = (
    *((1, checkpointed, parts) for checkpointed in (False, True) for parts in (1, 4)),
    *((blocks, False, 1) for blocks in (2, 4, 8, 16)),
    *((4, checkpointed, 4) for checkpointed in (False, True)),
)
"""The rows without momentum to draw: number of blocks, whether units are checkpointed, number of micro-batches."""


def svg(width: int, height: int, description: str, body: Sequence[str]) -> str:
    """An SVG file with these elements."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [f'{head} role="img" aria-label="{escape(description)}">', f"<style>{STYLE}</style>", *body, "</svg>"]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "small") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def family(name: str) -> str:
    """Key in `COLORS` of a row."""
    if name.startswith("e2e"):
        return "end-to-end"
    if "auglocal" in name:
        return "AugLocal"
    if "infopro" in name or "predsim" in name:
        return "other"
    return "MAN" if "man" in name else "DGL"


def accuracy() -> str:
    """Error after epoch `COMPARED` against operations, peak memory and time: one numbered point per row."""
    every = rows(ROOT)
    trained = [row for row in every if row.error(COMPARED) is not None]
    body = []
    for row in every:
        if row.name.startswith("e2e-accumulate4"):  # not trained, so without an error
            x = RIGHT + LEFT + row.peak / 1.1 * (WIDTH - LEFT)
            body += [line(x, 34, x, HEIGHT - 4, "rival")]
            body += [text(x + 3, HEIGHT - 10 - 12 * ("check" in row.name), row.name)]
    body += _panel(0, 0, "operations of a step, relative to end-to-end", trained, lambda row: row.operations, 3.6, 0.5)
    body += _panel(RIGHT, 0, "peak memory of a step, relative to end-to-end", trained, lambda row: row.peak, 1.1, 0.2)
    label = "time of a step on a CPU, relative to end-to-end"
    body += _panel(0, HEIGHT + 50, label, trained, lambda row: row.seconds, 4.5, 0.5)
    for position, row in enumerate(trained):
        y = HEIGHT + 68 + 17 * position
        runs = f"n = {len(row.cpu)}" if row.cpu else "GPU, n = 1"
        body += [_point(RIGHT + 26, y - 4, row), text(RIGHT + 14, y, str(position + 1), "end")]
        body += [text(RIGHT + 38, y, f"{row.name} ({runs})")]
    height = max(2 * HEIGHT + 90, HEIGHT + 68 + 17 * len(trained))
    costs = "the operations, the peak memory and the time of a step"
    description = f"Test error after {COMPARED} of ten epochs against {costs}"
    return svg(RIGHT + WIDTH + 10, height, description, body)


def _panel(
    left: float,
    upper: float,
    label: str,
    trained: Sequence[Row],
    cost: Callable[[Row], float | None],
    most: float,
    step: float,
) -> list[str]:
    """One panel: axes from 0, grid, labels and points; rows without this cost are left out."""
    top, bottom, worst = upper + 34, upper + HEIGHT - 4, 45.0
    across, down = (WIDTH - LEFT) / most, (bottom - top) / worst
    x, y = left + LEFT, bottom
    body = [text(left + 8, upper + 20, f"test error after {COMPARED} of 10 epochs, %", kind="title")]
    for error in range(0, int(worst) + 1, 5):
        body += [line(x, y - error * down, left + WIDTH, y - error * down, "grid")]
        body += [text(x - 6, y - error * down + 4, str(error), "end")]
    for tick in range(int(most / step + 1e-9) + 1):
        body += [text(x + tick * step * across, y + 16, f"{tick * step:.1f}", "middle")]
    body += [text(left + (LEFT + WIDTH) / 2, y + 34, label, "middle", "title")]
    places: list[tuple[float, float, int, Row]] = []
    for position, row in enumerate(trained):
        error, price = row.error(COMPARED), cost(row)
        if error is not None and price is not None:
            places.append((x + price * across, y - error * down, position + 1, row))
    points = [_point(u, v, row) for u, v, _, row in places]
    return [*body, *points, *_numbers(places)]


def _numbers(places: Sequence[tuple[float, float, int, Row]]) -> list[str]:
    """The number of each point beside it, on the side that is the farthest from other points and numbers."""
    taken = [(x, y) for x, y, _, _ in places]
    body: list[str] = []
    for x, y, number, _ in places:
        sides = [(x + dx, y + dy) for dx, dy in ((13, 0), (-13, 0), (0, -12), (0, 12), (10, -10), (-10, -10))]
        others = [point for point in taken if point != (x, y)]
        u, v = max(sides, key=lambda side: min([20.0, *(math.dist(side, other) for other in others)]))
        taken.append((u, v))
        body.append(text(u, v + 4, str(number), "middle"))
    return body


def _point(x: float, y: float, row: Row) -> str:
    """A point: filled for runs on a CPU, hollow for runs on a GPU that were cut off."""
    color = COLORS[family(row.name)]
    fill = color if row.cpu else "none"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>'


def planned(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Label and row of end-to-end and local trainings in a plan, the largest peak first."""
    kinds = {
        ("no momentum", blocks, checkpointed, parts): f"{'end-to-end' if blocks == 1 else f'DGL, {blocks} blocks'}"
        f"{', checkpointed' * checkpointed}{f', {parts} micro-batches' * (parts > 1)}"
        for blocks, checkpointed, parts in PLANNED
    }
    kinds |= {("man", blocks, False, 1): f"DGL+MAN, {blocks} blocks" for blocks in (2, 4, 8, 16)}
    rows = json.loads(path.read_text())["rows"]
    kind = [(row["training"], row["num_blocks"], row["recompute"], row["parts"]) for row in rows]
    found = [(kinds[key], row) for key, row in zip(kind, rows, strict=True) if key in kinds]
    return sorted(found, key=lambda labelled: -labelled[1]["peak"])


def memory() -> str:
    """Bars of the peak memory of a ResNet-101 step, labelled with peak and operations."""
    found = planned(ROOT / "results" / "plan-resnet101" / "plan.json")
    left, width, step = 280, 760, 25
    scale = (width - left - 190) / found[0][1]["peak"]
    body = [text(8, 20, "ResNet-101, batch 128, 224 px, float32: peak memory of a training step", kind="title")]
    for position, (label, row) in enumerate(found):
        y = 34 + step * position
        length = row["peak"] * scale
        color = COLORS["end-to-end" if row["num_blocks"] == 1 else "MAN" if row["training"] == "man" else "DGL"]
        body += [text(left - 8, y + 13, label, "end", "")]
        body += [f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{step - 7}" fill="{color}"/>']
        costs = f"{row['peak'] / 2**30:.1f} GiB, {row['operations']:.2f} x the operations"
        body += [text(left + length + 6, y + 13, costs)]
    return svg(width, 34 + step * len(found) + 6, "Peak memory and operations of a training step of ResNet-101", body)


class Curve(NamedTuple):
    """Mean and standard deviation over seeds, by step; the deviation of one seed is 0."""

    label: str
    color: str
    kind: str
    steps: list[int]
    means: list[float]
    deviations: list[float]


def curves(runs: dict[str, list[Result]], *, differences: bool) -> list[Curve]:
    """Validation losses by step; with `differences`, minus those of end-to-end training of the same seed."""
    whole = {run["settings"]["seed"]: run["curve"] for run in runs["e2e"]}
    found = []
    for name, (label, color, kind) in CURVES.items():
        seeds = [run for run in runs.get(name, []) if run["settings"]["seed"] in whole or not differences]
        if not seeds or (differences and name == "e2e"):
            continue
        means, deviations = [], []
        for position in range(len(seeds[0]["curve"])):
            losses = [run["curve"][position][1] for run in seeds]
            if differences:
                losses = [v - whole[run["settings"]["seed"]][position][1] for v, run in zip(losses, seeds, strict=True)]
            means.append(statistics.fmean(losses))
            deviations.append(statistics.stdev(losses) if len(losses) > 1 else 0.0)
        steps = [step for step, _ in seeds[0]["curve"]]
        found.append(Curve(f"{label}{frozen(seeds)} (n = {len(seeds)})", COLORS[color], kind, steps, means, deviations))
    return found


def language() -> str:
    """Validation loss by step, setting by setting, and below it the difference to end-to-end training."""
    body = []
    folder = ROOT / "results" / "tasks" / "language"
    drawn = [(setting, title) for setting, title in SETTINGS.items() if (folder / f"{setting}-e2e-seed0.json").exists()]
    for column, (setting, title) in enumerate(drawn):
        runs = {name.removeprefix(f"{setting}-"): row for name, row in results(folder, f"{setting}-.*").items()}
        left = column * RIGHT
        body += _curves(left, 0, f"{title}: validation loss", curves(runs, differences=False), 0.1)
        body += _curves(left, HEIGHT + 50, "the same, minus end-to-end's", curves(runs, differences=True), 0.02)
    return svg(len(drawn) * RIGHT, 2 * HEIGHT + 90, "Validation loss of the language model by training step", body)


def _curves(left: float, upper: float, title: str, drawn: Sequence[Curve], step: float) -> list[str]:
    """One panel: axes, grid, curves with bands of one standard deviation, and a legend."""
    top, bottom, x = upper + 34 + 15 * len(drawn), upper + HEIGHT - 4, left + LEFT
    ends = [
        m + sign * d for curve in drawn for m, d in zip(curve.means, curve.deviations, strict=True) for sign in (-1, 1)
    ]
    low, high = math.floor(min(ends) / step), max(0 if min(ends) < 0 else 1, math.ceil(max(ends) / step))
    last = max(curve.steps[-1] for curve in drawn)
    across, down = (WIDTH - LEFT) / last, (bottom - top) / (high - low)
    body = [text(left + 8, upper + 20, title, kind="title")]
    for tick in range(low, high + 1):
        y = bottom - (tick - low) * down
        body += [
            line(x, y, left + WIDTH, y, "" if tick == 0 else "grid"),
            text(x - 6, y + 4, f"{tick * step:g}", "end"),
        ]
    body += [text(x + at * across, bottom + 16, f"{at:,}", "middle") for at in drawn[0].steps]
    body += [text(left + (LEFT + WIDTH) / 2, bottom + 34, "steps", "middle", "title")]
    for position, curve in enumerate(drawn):
        style, y = (
            f'fill="none" stroke-width="2" stroke="{curve.color}" class="{curve.kind}"',
            upper + 38 + 15 * position,
        )
        places = [x + at * across for at in curve.steps]
        edges = [
            [bottom - ((m + sign * d) / step - low) * down for m, d in zip(curve.means, curve.deviations, strict=True)]
            for sign in (-1, 0, 1)
        ]
        under, middle, over = ([f"{u:.1f},{v:.1f}" for u, v in zip(places, edge, strict=True)] for edge in edges)
        if any(curve.deviations):
            body += [f'<polygon points="{" ".join(under + over[::-1])}" fill="{curve.color}" fill-opacity="0.2"/>']
        body += [f'<polyline points="{" ".join(middle)}" {style}/>']
        body += [
            f'<polyline points="{x + 8:.1f},{y - 4:.1f} {x + 34:.1f},{y - 4:.1f}" {style}/>',
            text(x + 42, y, curve.label),
        ]
    return body


DRAWN: dict[str, Callable[[], str]] = {"accuracy.svg": accuracy, "memory.svg": memory, "language.svg": language}


if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (PICTURES / name).write_text(draw())
