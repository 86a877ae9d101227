"""Pictures of results: what is drawn is what the files say."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

from helpers.results import DEVICE, make_config, read, write_run
from localgrad.results.analysis_figures import MOST_CLASSES, feature_clouds
from localgrad.results.figures import (
    covered,
    groups,
    learning_curves,
    local_heads,
    planned_peaks,
    rival,
    step_times,
    trade_off,
)
from localgrad.results.kinds import AnalysedImages, AnalysedRun, Pictures, Plan, PlannedRow, StepTimes, TimedRow
from localgrad.results.tables import tables


def test_the_trade_off_has_the_errors_of_the_table(tmp_path: Path) -> None:
    """Costs of two devices cannot be compared, errors can."""
    for number, (name, device) in enumerate((("dgl", DEVICE), ("dgl", "another"), ("dgl-man", DEVICE))):
        config = make_config(f"cifar10-resnet32-k16-{name}", seed=number)
        write_run(tmp_path / f"{number}.json", config, 10.0 * (number + 1), device=device)
    (table,) = tables(read(tmp_path)[0].runs)
    drawn = trade_off(table, DEVICE, {0: 0.5, 1: None}).figure.axes[0].collections
    assert [float(points.get_offsets()[0][1]) for points in drawn if hasattr(points, "get_sizes")] == [15.0, 30.0]  # pyright: ignore


def test_a_long_name_leaves_room_for_its_bar() -> None:
    name = "Digits, ResNet-14, DGL + MAN (bias only, fused, depth 2), 15 blocks, optim.weight_decay 0.01, batch size 8"
    figure = step_times(StepTimes(rows=[TimedRow(name, 1.0), TimedRow("e2e", 0.5)], device=DEVICE))
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.4
    assert " ".join(figure.axes[0].get_yticklabels()[0].get_text().split()) == name


def test_a_seed_without_metrics_does_not_take_the_curve_of_the_others(folder: Path, tmp_path: Path) -> None:
    for seed, errors in ((0, [9.0, 4.0]), (1, [])):
        write_run(tmp_path / f"{seed}.json", make_config("digits-e2e", seed=seed), 4.0, test_errors=errors)
    (table,) = tables(read(tmp_path)[0].runs)
    drawn = learning_curves(table)
    assert drawn is not None
    assert [line.get_ydata().tolist() for line in drawn.figure.axes[0].lines] == [[9.0, 4.0]]  # pyright: ignore


def test_a_curve_that_cannot_be_seen_is_named() -> None:
    curves = {"a": [1.0, 2.0], "b": [5.0, 6.0], "c": [1.0, 2.0], "short": [1.0]}
    assert covered(curves, span=10.0) == ["a lies under c."]
    assert covered({"a": [1.0, 2.0], "b": [1.01, 2.01]}, span=10.0) == ["a lies under b."]
    assert covered({"a": [1.0, 2.0], "b": [1.0, 3.0]}, span=10.0) == []
    gap = float("nan")
    assert covered({"a": [1.0, gap], "b": [1.0, 9.0]}, span=10.0) == ["a lies under b."]
    assert covered({"a": [1.0, 9.0], "b": [1.0, gap]}, span=10.0) == []


def test_equal_curves_of_runs_are_named(tmp_path: Path) -> None:
    config = make_config("digits-e2e")
    write_run(tmp_path / "kept.json", config, 4.0)
    write_run(tmp_path / "recomputed.json", replace(config, recompute=True), 4.0)
    (table,) = tables(read(tmp_path)[0].runs)
    drawn = learning_curves(table)
    assert drawn is not None
    assert drawn.remarks == ("End-to-end lies under End-to-end (checkpointed).",)


def test_many_curves_are_grouped_so_that_colors_stay_apart(tmp_path: Path) -> None:
    names = ["e2e", *(f"k16-{name}" for name in ("dgl", "dgl-man", "infopro", "infopro-man", "predsim", "predsim-man"))]
    configs = [make_config(f"cifar10-resnet32-{name}") for name in names]
    man = configs[2]
    configs += [replace(man, momentum=replace(man.momentum, decay=decay)) for decay in (0.1, 0.3, 0.5, 0.9)]
    for number, config in enumerate(configs):
        write_run(tmp_path / f"{number:02}.json", config, 10.0 + number)
    (table,) = tables(read(tmp_path)[0].runs)
    assert len(table.rows) == 11
    every = list(groups(table, range(11)))
    assert sorted({position for group in every for position in group}) == list(range(11))
    for group in every:
        drawn = learning_curves(table, group)
        assert drawn is not None
        colors = [line.get_color() for line in drawn.figure.axes[0].lines]
        assert len(colors) == len(set(colors)) == len(group)
        labels = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
        assert labels[0] == "End-to-end", "each picture has it for comparison"
    assert list(groups(table, range(8))) == [list(range(8))], "few are in one"
    assert list(groups(table, [])) == []


def test_rivals_in_memory_have_marks_of_their_own_and_points_numbers(tmp_path: Path) -> None:
    whole, local = make_config("cifar10-resnet32-e2e"), make_config("cifar10-resnet32-k16-dgl")
    configs = {
        "": whole,
        "checkpointed": replace(whole, recompute=True),
        "micro-batches": replace(whole, optim=replace(whole.optim, accumulate=4)),
        "fewer blocks": replace(local, cuts=(local.cuts or ())[:3]),
    }
    for number, config in enumerate([*configs.values(), local]):
        write_run(tmp_path / f"{number}.json", config, 10.0 + number)
    (table,) = tables(read(tmp_path)[0].runs)
    kinds = [rival(table, row) for row in table.rows]
    assert sorted(kinds) == sorted([*configs, ""])
    drawn = trade_off(table, DEVICE, dict.fromkeys(range(5)))
    axes = drawn.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5"]
    paths = {kind: points.get_paths()[0] for kind, points in zip(kinds, axes.collections, strict=True)}  # pyright: ignore
    assert len({path.vertices.tobytes() for path in paths.values()}) == 4


def test_charts_name_network_and_images(tmp_path: Path) -> None:
    write_run(tmp_path / "one.json", make_config("cifar10-resnet32-k16-dgl"), 4.0)
    (table,) = tables(read(tmp_path)[0].runs)
    for drawn in (learning_curves(table), local_heads(table), trade_off(table, DEVICE, {0: None})):
        assert drawn is not None
        assert drawn.figure.get_suptitle() == "CIFAR-10, ResNet-32"


def test_a_plan_has_its_budget_and_says_what_is_hidden() -> None:
    every = itertools.product("ab", (1, 2), (False, True))
    rows = [PlannedRow(training, count, recompute, 2**30) for training, count, recompute in every]
    drawn = planned_peaks(Plan(device=DEVICE, title="network", budget=2**29, rows=rows))
    labels = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert "budget" in labels
    assert "a lies under a, units checkpointed." in drawn.remarks


@pytest.mark.parametrize(("classes", "names"), [(2, ["cat", "dog"]), (3, None), (30, None)])
def test_a_cloud_of_features_says_which_color_is_which_class(classes: int, names: list[str] | None) -> None:
    config = make_config("digits-dgl")
    found = Pictures(
        device=DEVICE,
        runs=[AnalysedRun("run", 6, config)],
        data=AnalysedImages(classes, class_names=names),
        units=["a"],
        blocks=[1],
        image_labels=[],
        thumbnails=[],
        maps=[None],
        point_labels=list(range(classes)),
        points=[[(float(number), 0.0) for number in range(classes)]],
    )
    figure = feature_clouds(found)
    if classes > MOST_CLASSES:
        assert len(figure.axes) == 2, "a color bar"
        return
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == (names or [f"class {number}" for number in range(classes)])
    colors = figure.axes[0].collections[0].to_rgba(found.point_labels)  # pyright: ignore[reportAttributeAccessIssue]
    handles = figure.legends[0].legend_handles
    for color, handle in zip(colors, handles, strict=True):
        assert to_rgba(handle.get_color()) == pytest.approx(tuple(color))  # pyright: ignore
