"""Draw the pictures of the documents from the files in `results/`; a test fails if they disagree.

    python benchmarks/pictures.py

The script writes the SVG itself, so that equal results give equal files, and that the text follows the reader's light
or dark theme.
"""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from accuracy_tables import COMPARED, Row, rows

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


DRAWN: dict[str, Callable[[], str]] = {"accuracy.svg": accuracy, "memory.svg": memory}


if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (PICTURES / name).write_text(draw())
