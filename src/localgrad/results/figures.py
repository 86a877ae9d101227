"""Pictures of results, drawn by matplotlib for a phone's width: as PNG, or as SVG that takes its ink from the page."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from localgrad.results.tables import Table, told_seconds

WIDTH = 4.1
"""Inches; at the width of a phone's screen the letters stay readable."""


INK = "#123321"
"""Stands for the page's text colour until `as_svg` puts `currentColor` in its place; a PNG has black instead."""


LONG = 24
"""Letters of a label that fits twice in a legend's line."""


COLORS = ("#2f7ed8", "#e0701a", "#1fa187", "#b05cc6", "#d6455d", "#8a7a2c", "#5f7f95", "#c4508f")
"""Readable on white and on black."""


MARKERS = "osD^vPX*"


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
        figure: what to draw.
        prefix: makes the ids of this picture different from those of every other one of the page.
        description: what it shows, for those who do not see it; plain text.
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
    """Leaves ids only where something refers to them: of the others, matplotlib gives some twice."""
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    return re.sub(r' id="([^"]+)"', lambda id: f' id="{prefix}-{id[1]}"' if id[1] in wanted else "", svg)


def _paint(figure: Figure, color: str) -> None:
    """Every letter and line that is not data in one color."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_color() in ("black", "k"):
            text.set_color(color)
    for axes in figure.axes:
        axes.tick_params(which="both", color=color, labelcolor=color)
        for spine in axes.spines.values():
            spine.set_edgecolor(color)


def new_figure(height: float) -> Figure:
    """An empty figure, so many inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def with_legend(figure: Figure, axes: Axes, count: int) -> Figure:
    """A grid, and a legend below the axes, where it covers nothing."""
    axes.grid()
    if count > 0:
        longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if count > 1 and longest <= LONG else 1
        figure.legend(loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.0)
        figure.set_figheight(figure.get_figheight() + 0.19 * -(-count // columns))
    return figure


def look_of(position: int) -> dict[str, Any]:
    """Color and marker of the series at this position."""
    return {
        "color": COLORS[position % len(COLORS)],
        "marker": MARKERS[(position + position // len(COLORS)) % len(MARKERS)],
    }


@styled
def learning_curves(table: Table) -> Figure | None:
    """Test error over epochs, one line a row: the mean of its seeds, and between the smallest and the largest."""
    figure = new_figure(3.0)
    axes = figure.subplots()
    drawn = 0
    for position, row in enumerate(table.rows):
        curves = [curve for curve in (_curve(run.metrics) for run in row.runs) if curve]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        if not epochs:
            continue
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        label = table.labels[position] + (f" (n={len(curves)})" if len(curves) > 1 else "")
        look = look_of(position)
        axes.plot(epochs, values.mean(0), label=label, markevery=max(1, len(epochs) // 8), **look)
        if len(curves) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)
        drawn += 1
    axes.set(xlabel="epoch", ylabel="test error (%)")
    axes.set_ylim(0, 1.05 * axes.dataLim.y1 if drawn else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return with_legend(figure, axes, drawn) if drawn else None


def _curve(metrics: Sequence[dict[str, Any]]) -> dict[int, float]:
    return {line["epoch"]: line["test_error"] for line in metrics if line["test_error"] is not None}


@styled
def local_heads(table: Table) -> Figure | None:
    """Test error of each block's own head after the last epoch, a line a row: the mean of its seeds."""
    figure = new_figure(3.0)
    axes = figure.subplots()
    drawn = 0
    for position, row in enumerate(table.rows):
        errors = [run.result.local_errors for run in row.runs if run.result.local_errors and row.num_blocks > 1]
        if not errors:
            continue
        values = np.array(errors, dtype=float)  # None, of a block without a class head, becomes a gap
        label = table.labels[position] + (f" (n={len(errors)})" if len(errors) > 1 else "")
        axes.plot(range(1, row.num_blocks + 1), values.mean(0), label=label, **look_of(position))
        drawn += 1
    axes.set(xlabel="block", ylabel="test error of its head (%)")
    axes.set_ylim(0, 1.05 * axes.dataLim.y1 if drawn else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return with_legend(figure, axes, drawn) if drawn else None


@styled
def trade_off(table: Table, device: str, seconds: Mapping[int, float | None]) -> Figure:
    """Memory of a step against test error; the area of a point is the time of a step; a line joins the best ones.

    Memory is that on one device, and the error that of all runs, as in the table of errors.

    Args:
        table: the rows.
        device: name of the device.
        seconds: of a step on it, by the position of the row; None where nothing is known.
    """
    figure = new_figure(3.2)
    axes = figure.subplots()
    rows = table.on(device)
    longest = max((each for each in seconds.values() if each), default=1.0)
    errors = {position: table.rows[position].mean("test_error") for position in rows}
    points = {p: (row.mean("peak_memory_bytes") / 2**20, errors[p]) for p, row in rows.items()}
    best = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
    axes.plot(*zip(*best, strict=True), color="#808080", linewidth=1, linestyle=":", zorder=1)
    for position in rows:
        known = seconds[position]
        label = table.labels[position] + (f", {told_seconds(known)} s" if known else "")
        size = 30 + 130 * (known or 0.0) / longest
        axes.scatter(*points[position], s=size, alpha=0.85, linewidth=0, label=label, **look_of(position))
        deviation = table.rows[position].deviation("test_error")
        if deviation is not None:
            axes.errorbar(*points[position], yerr=deviation, color=look_of(position)["color"], linewidth=1, capsize=2)
    axes.set(xlabel="peak memory of a step (MiB)", ylabel="test error (%)")
    axes.margins(0.14)
    axes.set_xlim(left=0)
    figure = with_legend(figure, axes, len(rows))
    for handle in figure.legends[0].legend_handles:
        handle.set_sizes([28])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return figure


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point is at least as good in both, and not the same."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@styled
def planned_peaks(values: dict[str, Any]) -> Figure:
    """Predicted peak over the number of blocks, kept and checkpointed."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    trainings = list(dict.fromkeys(row["training"] for row in values["rows"]))
    counts = sorted({row["num_blocks"] for row in values["rows"]})
    for position, training in enumerate(trainings):
        for recompute in (False, True):
            rows = [row for row in values["rows"] if row["training"] == training and row["recompute"] is recompute]
            rows.sort(key=lambda row: row["num_blocks"])
            label = training + (", units checkpointed" if recompute else "")
            peaks = [row["peak"] / 2**30 for row in rows]
            style = "--" if recompute else "-"
            axes.plot([row["num_blocks"] for row in rows], peaks, linestyle=style, label=label, **look_of(position))
    axes.set_xscale("log", base=2)
    apart = [count for count in counts[:-1] if 1.2 * count < counts[-1]] + counts[-1:]
    axes.set_xticks(apart, [str(count) for count in apart])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="blocks (1 is end-to-end)", ylabel="predicted peak of a step (GiB)")
    return with_legend(figure, axes, 2 * len(trainings))


@styled
def step_times(values: dict[str, Any]) -> Figure:
    """Seconds a step as bars, with their figures."""
    rows = values["rows"]
    labels = [textwrap.fill(row["row"], 36) for row in rows]
    lines = sum(1 + label.count("\n") for label in labels)
    figure = new_figure(0.6 + 0.12 * len(rows) + 0.2 * lines)
    axes = figure.subplots()
    seconds = [row["seconds_per_step"] for row in rows]
    bars = axes.barh(range(len(rows)), seconds, tick_label=labels, color=COLORS[0], height=0.62)
    axes.bar_label(bars, [f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for value in seconds], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(xlabel="seconds a step")
    axes.tick_params(axis="y", length=0)
    return figure
