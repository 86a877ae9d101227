"""Pictures of analyses, drawn by matplotlib from what their JSON files hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from localgrad.results.figures import WIDTH, look_of, new_figure, styled, with_legend
from localgrad.results.tables import run_label


@styled
def probe_curves(units: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Accuracy of the probe on each unit, a line a label: the mean of its runs, and between smallest and largest."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    positions = range(len(units))
    for number, (label, runs) in enumerate(series.items()):
        values = np.array(runs)
        look = look_of(number)
        name = label + (f" (n={len(runs)})" if len(runs) > 1 else "")
        axes.plot(positions, values.mean(0), label=name, markevery=max(1, len(units) // 20), **look)
        if len(runs) > 1:
            axes.fill_between(positions, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)
    _name_units(axes.xaxis, units, rotation=60)
    axes.set(ylabel="accuracy of the linear probe (%)")
    return with_legend(figure, axes, len(series))


def _name_units(axis: Any, units: Sequence[str], rotation: float = 0) -> None:
    """At most sixteen of the units' names along an axis."""
    step = -(-len(units) // 16)
    shown = range(0, len(units), step)
    axis.set_ticks(list(shown), [units[index] for index in shown], rotation=rotation)
    for text in axis.get_ticklabels():
        text.set_fontsize(7)


@styled
def alignment_map(values: dict[str, Any]) -> Figure:
    """CKA of every unit of one network (up) with every unit of the other (right)."""
    matrix = np.array([[np.nan if value is None else value for value in row] for row in values["alignment"]])
    figure = new_figure(3.5)
    axes = figure.subplots()
    picture = axes.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    _name_units(axes.yaxis, values["units"])
    _name_units(axes.xaxis, values["other_units"], rotation=90)
    first, second = (run_label(run["config"], run["num_blocks"]) for run in values["runs"])
    axes.set(ylabel=first, xlabel=second)
    if max(matrix.shape) <= 10:
        for (row, column), value in np.ndenumerate(matrix):
            color = "#ffffff" if value < 0.6 else "#111111"
            axes.text(column, row, f"{value:.2f}", color=color, ha="center", va="center")
            axes.texts[-1].set_fontsize(7)
    figure.colorbar(picture, shrink=0.8, label="CKA").outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


@styled
def activation_pictures(values: dict[str, Any]) -> Figure | None:
    """A row an image: the image, then the mean over channels after each unit, black to yellow from least to most."""
    shown = [index for index, maps in enumerate(values["maps"]) if maps is not None]
    if not shown:
        return None
    images, columns = len(values["image_labels"]), len(shown) + 1
    figure = new_figure(images * WIDTH / columns + 1.0)
    grid = figure.subplots(images, columns, squeeze=False)
    for image in range(images):
        grid[image, 0].imshow(np.array(values["thumbnails"][image], dtype=np.uint8), interpolation="nearest")
        for axes, index in zip(grid[image, 1:], shown, strict=True):
            axes.imshow(np.array(values["maps"][index][image]), cmap="inferno", interpolation="nearest")
    for axes, title in zip(grid[0], ["image", *(_panel_title(values, index) for index in shown)], strict=True):
        axes.set_title(title, fontsize=7, rotation=90)
    for axes in grid.flat:
        axes.axis("off")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)  # pyright: ignore
    return figure


@styled
def feature_clouds(values: dict[str, Any]) -> Figure:
    """The features of each unit in two dimensions, a panel a unit, a color a class."""
    count = len(values["points"])
    columns = min(2 if count <= 4 else 3, count)
    rows = -(-count // columns)
    figure = new_figure(rows * (WIDTH / columns + 0.2))
    labels = np.array(values["point_labels"])
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.axis("off")
    for index, points in enumerate(values["points"]):
        axes = grid.flat[index]
        x, y = np.array(points).T
        axes.scatter(x, y, c=labels, cmap="tab10" if labels.max() < 10 else "nipy_spectral", s=7, linewidth=0)
        axes.collections[0].set_rasterized(True)
        axes.set_title(_panel_title(values, index), fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    return figure


def _panel_title(values: dict[str, Any], index: int) -> str:
    name = values["units"][index]
    return f"{name} (block {values['blocks'][index]})" if values["runs"][0]["num_blocks"] > 1 else name


def of_analysis(values: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of one analysis, by what is added to the name of its file."""
    if values["analysis"] == "probe":
        run = values["runs"][0]
        return {
            "": probe_curves(values["units"], {run_label(run["config"], run["num_blocks"]): [values["accuracies"]]})
        }
    if values["analysis"] == "cka":
        return {"": alignment_map(values)}
    maps = activation_pictures(values)
    return {**({"-maps": maps} if maps else {}), "-features": feature_clouds(values)}
