"""Figures of analyses, drawn by matplotlib from the analyses' result files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from localgrad.results.figures import WIDTH, Drawn, covered, look_of, new_figure, styled, with_legend
from localgrad.results.kinds import Alignment, AnalysedRun, Analysis, Pictures, Probe
from localgrad.results.names import run_label, where

MOST_CLASSES = 20
"""Largest number of classes that a legend names one by one; with more, a color bar shows their numbers."""


def label_of(run: AnalysedRun) -> str:
    """Method and number of blocks of an analysed run."""
    return run_label(run.config, run.num_blocks)


def title_of(analysis: Analysis) -> str:
    """Data set and network."""
    return where(analysis.runs[0].config)


@styled
def probe_curves(title: str, units: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]]) -> Drawn:
    """Accuracy of the probe on each unit, one line per label: mean over its runs, band from minimum to maximum."""
    figure = new_figure(3.2, title)
    axes = figure.subplots()
    positions = range(len(units))
    means: dict[str, list[float]] = {}
    for number, (label, runs) in enumerate(series.items()):
        values = np.array(runs)
        look = look_of(number)
        name = label + (f" (n={len(runs)})" if len(runs) > 1 else "")
        axes.plot(positions, values.mean(0), label=name, markevery=max(1, len(units) // 20), **look)
        if len(runs) > 1:
            axes.fill_between(positions, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)
        means[label] = values.mean(0).tolist()
    _name_units(axes.xaxis, units, rotation=60)
    axes.set(ylabel="accuracy of the linear probe (%)")
    span = float(np.ptp(axes.get_ylim()))
    return Drawn(with_legend(figure, axes, len(series)), tuple(covered(means, span)))


def _name_units(axis: Any, units: Sequence[str], rotation: float = 0) -> None:
    """Label an axis with at most sixteen of the units' names."""
    step = -(-len(units) // 16)
    shown = range(0, len(units), step)
    axis.set_ticks(list(shown), [units[index] for index in shown], rotation=rotation)
    for text in axis.get_ticklabels():
        text.set_fontsize(7)


@styled
def alignment_map(found: Alignment) -> Figure:
    """CKA of every unit of the first network (vertical axis) with every unit of the second (horizontal axis)."""
    matrix = np.array(found.alignment, dtype=float)  # None, for a unit with constant features, becomes a gap
    figure = new_figure(3.5, title_of(found))
    axes = figure.subplots()
    picture = axes.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    _name_units(axes.yaxis, found.units)
    _name_units(axes.xaxis, found.other_units, rotation=90)
    first, second = map(label_of, found.runs)
    axes.set(ylabel=first, xlabel=second)
    if max(matrix.shape) <= 10:
        for (row, column), value in np.ndenumerate(matrix):
            color = "#ffffff" if value < 0.6 else "#111111"
            axes.text(column, row, f"{value:.2f}", color=color, ha="center", va="center")
            axes.texts[-1].set_fontsize(7)
    figure.colorbar(picture, shrink=0.8, label="CKA").outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


@styled
def activation_pictures(found: Pictures) -> Figure | None:
    """One row per image: the image, then the mean over the channels after each unit, from black (minimum) to yellow."""
    shown = [index for index, maps in enumerate(found.maps) if maps is not None]
    if not shown:
        return None
    images, columns = len(found.image_labels), len(shown) + 1
    figure = new_figure(images * WIDTH / columns + 1.0, _whose(found))
    grid = figure.subplots(images, columns, squeeze=False)
    for image in range(images):
        grid[image, 0].imshow(np.array(found.thumbnails[image], dtype=np.uint8), interpolation="nearest")
        for axes, index in zip(grid[image, 1:], shown, strict=True):
            axes.imshow(np.array((found.maps[index] or [])[image]), cmap="inferno", interpolation="nearest")
    for axes, title in zip(grid[0], ["image", *(_panel_title(found, index) for index in shown)], strict=True):
        axes.set_title(title, fontsize=7, rotation=90)
    for axes in grid.flat:
        axes.axis("off")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # pyright: ignore
    return figure


@styled
def feature_clouds(found: Pictures) -> Figure:
    """The features of each unit in two dimensions: one panel per unit, one color per class."""
    count = len(found.points)
    columns = min(2 if count <= 4 else 3, count)
    rows = -(-count // columns)
    figure = new_figure(rows * (WIDTH / columns + 0.2), _whose(found))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.axis("off")
    labels = np.array(found.point_labels)
    look: dict[str, Any] = {"c": labels, "vmin": 0, "s": 7, "linewidth": 0}
    look["cmap"] = "tab10" if labels.max() < 10 else "nipy_spectral"
    look["vmax"] = 9 if labels.max() < 10 else labels.max()
    for index, points in enumerate(found.points):
        axes = grid.flat[index]
        axes.scatter(*np.array(points).T, **look)
        axes.collections[0].set_rasterized(True)
        axes.set_title(_panel_title(found, index), fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    _name_classes(figure, grid.flat[0], found)
    return figure


def _name_classes(figure: Figure, axes: Axes, found: Pictures) -> None:
    """Add a legend with the color of each class, or a color bar if there are many classes."""
    points, classes = axes.collections[0], sorted(set(found.point_labels))
    if len(classes) > MOST_CLASSES:
        figure.colorbar(points, ax=figure.axes, location="bottom", shrink=0.8, aspect=40, label="class")
        return
    marks = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color=points.cmap(points.norm(each)))  # pyright: ignore
        for each in classes
    ]
    names = [class_name(found, each) for each in classes]
    columns = 5 if max(map(len, names)) <= 9 else 2
    figure.legend(marks, names, loc="outside lower center", ncols=columns, handletextpad=0.1, columnspacing=0.8)
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(classes) // columns))


def class_name(found: Pictures, label: int) -> str:
    """The name of a class, or its number if the file has no class names."""
    names = found.data.class_names
    return names[label] if names and label < len(names) else f"class {label}"


def _whose(found: Pictures) -> str:
    return f"{title_of(found)}, {label_of(found.runs[0])}"


def _panel_title(found: Pictures, index: int) -> str:
    name = found.units[index]
    return f"{name} (block {found.blocks[index]})" if found.runs[0].num_blocks > 1 else name


def of_analysis(found: Analysis) -> dict[str, Figure]:
    """The figures of one analysis, by the suffix of their file names."""
    if isinstance(found, Probe):
        return {"": probe_curves(title_of(found), found.units, {label_of(found.runs[0]): [found.accuracies]}).figure}
    if isinstance(found, Alignment):
        return {"": alignment_map(found)}
    assert isinstance(found, Pictures)
    maps = activation_pictures(found)
    return {**({"-maps": maps} if maps else {}), "-features": feature_clouds(found)}
