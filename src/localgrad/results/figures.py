"""Figures of results by matplotlib, as wide as a phone's screen: PNG, or SVG in the text color of the page."""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from localgrad.config.methods import method_order
from localgrad.results.kinds import Plan, StepTimes
from localgrad.results.read import EpochError
from localgrad.results.tables import Row, Table, seconds_text
from localgrad.runs.files import atomic_write

WIDTH = 4.1
"""Width of a figure in inches. Scaled to a phone's screen, its text stays readable."""
INK = "#123321"
"""Placeholder for the page's text color: `as_svg` replaces it by `currentColor`. A PNG has black text."""
LONG = 24
"""Longest label, in characters, of which two fit side by side in a legend."""
COLORS = ("#2f7ed8", "#e0701a", "#1fa187", "#b05cc6", "#d6455d", "#8a7a2c", "#5f7f95", "#c4508f")
"""Colors of the series, readable on white and on black."""
MARKERS = "osD^vPX*"
MOST_CURVES = 7
"""Largest number of curves in a picture besides end-to-end. More are split into several pictures, by objective."""
COVERED = 0.004
"""Two curves that stay within this fraction of the axis of each other look like one."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "localgrad",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
}
styled = matplotlib.rc_context(STYLE)


def as_svg(figure: Figure, prefix: str, description: str) -> str:
    """A figure as an `<svg>` element for a page.

    Args:
        figure: the figure.
        prefix: prefix of all ids in it, different for each figure of a page.
        description: what the figure shows, for screen readers; plain text.
    """
    from html import escape

    with matplotlib.rc_context({**STYLE, "savefig.transparent": True}):
        _paint(figure, INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", _with_ids_once(svg, prefix))
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def _with_ids_once(svg: str, prefix: str) -> str:
    """Remove ids that nothing refers to (matplotlib uses some of them twice) and prefix the others."""
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    return re.sub(r' id="([^"]+)"', lambda id: f' id="{prefix}-{id[1]}"' if id[1] in wanted else "", svg)


def _paint(figure: Figure, color: str) -> None:
    """Draw all text and lines that are not data in one color."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_color() in ("black", "k"):
            text.set_color(color)
    for axes in figure.axes:
        axes.tick_params(which="both", color=color, labelcolor=color)
        for spine in axes.spines.values():
            spine.set_edgecolor(color)


def new_figure(height: float, title: str = "") -> Figure:
    """An empty figure with a title; the height is in inches."""
    figure = Figure(figsize=(WIDTH, height + 0.2 * bool(title)), layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(title, 62), fontsize=9)
    return figure


def with_legend(figure: Figure, axes: Axes, count: int) -> Figure:
    """Add a grid, and a legend below the axes, where it covers no data."""
    axes.grid()
    if count > 0:
        longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if count > 1 and longest <= LONG else 1
        figure.legend(loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.0)
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-count // columns))
    return figure


def look_of(position: int) -> dict[str, Any]:
    """Color and marker of the series with this position."""
    return {
        "color": COLORS[position % len(COLORS)],
        "marker": MARKERS[(position + position // len(COLORS)) % len(MARKERS)],
    }


def groups(table: Table, positions: Sequence[int]) -> Iterator[list[int]]:
    """Rows of each picture: all rows in one, or one picture per objective with end-to-end training for comparison."""
    if len(positions) <= MOST_CURVES + 1:
        yield from [list(positions)] if positions else []
        return
    whole = [position for position in positions if not table.rows[position].is_local]
    local = [position for position in positions if table.rows[position].is_local]
    names = dict.fromkeys(table.rows[position].config.objective.name for position in local)
    for name in names:
        own = [position for position in local if table.rows[position].config.objective.name == name]
        for begin in range(0, len(own), MOST_CURVES):
            yield [*whole[:1], *own[begin : begin + MOST_CURVES]]
    if len(whole) > 1:
        yield whole[: MOST_CURVES + 1]


def covered(curves: Mapping[str, Sequence[float]], span: float) -> list[str]:
    """Sentences that name the curves that are hidden under a later curve.

    Args:
        curves: values by label, in drawing order, all over the same positions.
        span: largest minus smallest value of the axis.
    """
    values = {label: np.array(curve, dtype=float) for label, curve in curves.items()}
    said = []
    for number, label in enumerate(values):
        for other in list(values)[number + 1 :]:
            if _lies_under(values[label], values[other], COVERED * span):
                said.append(f"{label} lies under {other}.")
                break
    return said


def _lies_under(first: Any, second: Any, distance: float) -> bool:
    """Whether the second curve is within this distance of the first wherever the first has a value."""
    if first.shape != second.shape:
        return False
    there = np.isfinite(first)
    return bool(there.any() and np.isfinite(second[there]).all() and np.abs(first - second)[there].max() <= distance)


@dataclass(frozen=True)
class Drawn:
    """A figure, and sentences to add to its caption."""

    figure: Figure
    remarks: tuple[str, ...] = ()


@styled
def learning_curves(table: Table, positions: Sequence[int] | None = None) -> Drawn | None:
    """Test error by epoch, one line per row: the mean over its seeds, with a band from minimum to maximum.

    Args:
        table: the rows.
        positions: positions of the rows to draw; all if None.

    Returns:
        The figure; None if no row has metrics.
    """
    figure = new_figure(3.0, table.title)
    axes = figure.subplots()
    drawn: dict[str, list[float]] = {}
    for position in range(len(table.rows)) if positions is None else positions:
        row = table.rows[position]
        curves = [curve for curve in (_curve(run.metrics) for run in row.runs) if curve]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        if not epochs:
            continue
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        label = table.labels[position] + (f" (n={len(curves)})" if len(curves) > 1 else "")
        look = look_of(len(drawn))
        axes.plot(epochs, values.mean(0), label=label, markevery=max(1, len(epochs) // 8), **look)
        if len(curves) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)
        drawn[table.labels[position]] = values.mean(0).tolist()
    if not drawn:
        return None
    top = _error_axis(axes, "epoch", "test error (%)")
    return Drawn(with_legend(figure, axes, len(drawn)), tuple(covered(drawn, top)))


def _curve(metrics: Sequence[EpochError]) -> dict[int, float]:
    return {line.epoch: line.test_error for line in metrics if line.test_error is not None}


def _error_axis(axes: Axes, x: str, y: str) -> float:
    """Labels the axes and starts the vertical one at 0; returns its upper end."""
    axes.set(xlabel=x, ylabel=y)
    top = 1.05 * axes.dataLim.y1 or 1.0
    axes.set_ylim(0, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return top


@styled
def local_heads(table: Table, positions: Sequence[int] | None = None) -> Drawn | None:
    """Test error of each block's own head after the last epoch, one line per row: the mean over its seeds.

    Args and returns as in `learning_curves`.
    """
    figure = new_figure(3.0, table.title)
    axes = figure.subplots()
    drawn: dict[str, list[float]] = {}
    for position in range(len(table.rows)) if positions is None else positions:
        row = table.rows[position]
        errors = [run.result.local_errors for run in row.runs if run.result.local_errors and row.is_local]
        if not errors:
            continue
        values = np.array(errors, dtype=float)  # None, for a block without a class head, becomes a gap
        label = table.labels[position] + (f" (n={len(errors)})" if len(errors) > 1 else "")
        axes.plot(range(1, row.num_blocks + 1), values.mean(0), label=label, **look_of(len(drawn)))
        drawn[table.labels[position]] = values.mean(0).tolist()
    if not drawn:
        return None
    top = _error_axis(axes, "block", "test error of its head (%)")
    return Drawn(with_legend(figure, axes, len(drawn)), tuple(covered(drawn, top)))


RIVALS = {
    "": ("o", ""),
    "checkpointed": ("s", "square"),
    "micro-batches": ("^", "triangle"),
    "fewer blocks": ("D", "diamond"),
}
"""Markers of the trade-off figure and their names, by what saves memory in a row besides local losses."""


def rival(table: Table, row: Row) -> str:
    """What saves memory in a row besides local losses, or `fewer blocks` if others have more: a key of `RIVALS`."""
    same = (other.num_blocks for other in table.rows if other.label == row.label and other.is_local)
    if row.config.recompute or row.config.momentum.recompute:
        return "checkpointed"
    if row.config.optim.accumulate > 1:
        return "micro-batches"
    return "fewer blocks" if row.is_local and row.num_blocks < max(same) else ""


@styled
def trade_off(table: Table, device: str, seconds: Mapping[int, float | None]) -> Drawn:
    """Test error against the peak memory of a step; the area of a point is the time of a step.

    A dotted line joins the points that no other point beats in both. The color of a point is its objective, the number
    its row. Memory is the mean over the runs on one device. The error is the mean over all runs of the row, as in the
    table of errors.

    Args:
        table: the rows, of which those without a measured peak are left out.
        device: name of the device.
        seconds: time of a step on the device, by position of the row; None if it is not known.
    """
    figure = new_figure(3.2, table.title)
    axes = figure.subplots()
    rows = table.peaks_on(device)
    longest = max((each for each in seconds.values() if each), default=1.0)
    errors = {position: table.rows[position].mean("test_error") for position in rows}
    points = {position: (peak / 2**20, errors[position]) for position, peak in rows.items()}
    best = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
    axes.plot(*zip(*best, strict=True), color="#808080", linewidth=1, linestyle=":", zorder=1)
    for number, position in enumerate(rows, start=1):
        row, known = table.rows[position], seconds[position]
        label = f"{number}  {table.labels[position]}" + (f", {seconds_text(known)} s" if known else "")
        color = COLORS[method_order(row.config)[0] % len(COLORS)]
        size = 30 + 130 * (known or 0.0) / longest
        marker = RIVALS[rival(table, row)][0]
        axes.scatter(*points[position], s=size, alpha=0.8, linewidth=0, label=label, color=color, marker=marker)
        axes.annotate(str(number), points[position], xytext=(5, 5), textcoords="offset points", fontsize=8)
        deviation = row.deviation("test_error")
        if deviation is not None:
            axes.errorbar(*points[position], yerr=deviation, color=color, linewidth=1, capsize=2)
    axes.set(xlabel="peak memory of a step (MiB)", ylabel="test error (%)")
    axes.margins(0.14)
    axes.set_xlim(left=0)
    figure = with_legend(figure, axes, len(rows))
    for handle in figure.legends[0].legend_handles:
        handle.set_sizes([28])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return Drawn(figure, tuple(_overlaps(axes, points, table.labels)))


def _overlaps(axes: Axes, points: Mapping[int, tuple[float, float]], labels: Sequence[str]) -> Iterator[str]:
    """Sentences that name the points that are hidden under a later point."""
    spans = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    places = {position: (x / spans[0], y / spans[1]) for position, (x, y) in points.items()}
    for first in places:
        for second in places:
            if first < second and np.hypot(*np.subtract(places[first], places[second])) < 0.015:
                yield f"{labels[first]} lies under {labels[second]}."


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point is at least as good as the other in both coordinates, and not equal to it."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@styled
def planned_peaks(plan: Plan) -> Drawn:
    """Predicted peak against the number of blocks, with and without activation checkpointing, and the budget."""
    figure = new_figure(3.2, plan.title)
    axes = figure.subplots()
    trainings = list(dict.fromkeys(row.training for row in plan.rows))
    counts = sorted({row.num_blocks for row in plan.rows})
    drawn: dict[str, dict[int, float]] = {}
    for position, training in enumerate(trainings):
        for recompute in (False, True):
            rows = [
                row for row in plan.rows if row.training == training and row.recompute is recompute and row.parts == 1
            ]
            if not rows:
                continue
            label = training + (", units checkpointed" if recompute else "")
            drawn[label] = {row.num_blocks: row.peak / 2**30 for row in sorted(rows, key=lambda row: row.num_blocks)}
            style = "--" if recompute else "-"
            axes.plot(*zip(*drawn[label].items(), strict=True), linestyle=style, label=label, **look_of(position))
    if plan.budget:
        axes.axhline(plan.budget / 2**30, color="#808080", linewidth=1, label="budget")
    axes.set_xscale("log", base=2)
    apart = [count for count in counts[:-1] if 1.2 * count < counts[-1]] + counts[-1:]
    axes.set_xticks(apart, [str(count) for count in apart])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="blocks (1 is end-to-end)", ylabel="predicted peak of a step (GiB)")
    curves = {label: [values.get(count, np.nan) for count in counts] for label, values in drawn.items()}
    remarks = covered(curves, axes.get_ylim()[1])
    return Drawn(with_legend(figure, axes, len(drawn) + bool(plan.budget)), tuple(remarks))


@styled
def step_times(times: StepTimes, title: str = "") -> Figure:
    """Bars of the seconds per step, labelled with their values."""
    labels = [textwrap.fill(row.row, 36) for row in times.rows]
    lines = sum(1 + label.count("\n") for label in labels)
    figure = new_figure(0.6 + 0.12 * len(labels) + 0.2 * lines, title)
    axes = figure.subplots()
    seconds = [row.seconds_per_step for row in times.rows]
    bars = axes.barh(range(len(labels)), seconds, tick_label=labels, color=COLORS[0], height=0.62)
    axes.bar_label(bars, [f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for value in seconds], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(xlabel="seconds a step")
    axes.tick_params(axis="y", length=0)
    return figure


def save_png(figure: Figure, path: Path, dots_per_inch: int = 200) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        LocalGradError: the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dots_per_inch)
