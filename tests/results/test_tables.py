"""Rows and tables: what is averaged, what is kept apart, and in which order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.results import Cells, make_config, read, write_run
from localgrad.commands.main import main
from localgrad.config.methods import method_label
from localgrad.results.tables import tables


def test_runs_of_another_budget_stand_in_another_table(folder: Path) -> None:
    runs = read(folder)[0].runs
    long = replace(runs[0].result, config=make_config("cifar10-resnet32-k16-dgl-man", epochs=400))
    found = tables([*runs, replace(runs[0], result=long)])
    assert [(table.title, table.config.optim.epochs, len(table.rows)) for table in found] == [
        ("CIFAR-10, ResNet-32", 400, 1),
        ("CIFAR-10, ResNet-32", 10, 4),
        ("Digits, ResNet-14", 8, 1),
    ]


def test_precisions_do_not_mix(folder: Path) -> None:
    """What `auto` is depends on the device, so one config may have been trained in two."""
    runs = [run for run in read(folder)[0].runs if run.path.parent.name.startswith("cifar10")]
    halved = replace(runs[0], result=replace(runs[0].result, precision="bf16-mixed"))
    found = tables([halved, *runs[1:]])
    assert [table.budget.rpartition(", ")[2] for table in found] == ["32-true", "bf16-mixed"]
    assert [[len(row.runs) for row in table.rows] for table in found] == [[2], [1]]


def test_rows_come_in_the_order_of_the_papers(folder: Path) -> None:
    labels = [row.label for row in tables(read(folder)[0].runs)[0].rows]
    assert labels == ["End-to-end", "End-to-end (checkpointed)", "DGL + MAN", "DGL + MAN (decay 0.9)"]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "DGL + MAN"),
        ({"ema": False}, "DGL + MAN (bias only)"),
        ({"bias": False}, "DGL + MAN (EMA only)"),
        ({"bias": False, "decay": 0.0}, "DGL + MAN (EMA only, direct use)"),
        ({"form": "residual"}, "DGL + MAN (residual)"),
        ({"form": "fused", "initial": "random", "depth": 2}, "DGL + MAN (fused, random start, depth 2)"),
    ],
)
def test_labels_of_the_ablations(changes: dict[str, Any], label: str) -> None:
    config = make_config("cifar10-resnet32-k16-dgl-man")
    assert method_label(replace(config, momentum=replace(config.momentum, **changes))) == label


def test_a_seed_counts_once_in_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed, error in (("a", 0, 4.0), ("b", 1, 6.0), ("again", 0, 9.0)):
        values = write_run(tmp_path / name / "result.json", make_config("cifar10-resnet32-e2e", seed=seed), error)
        if name == "b":  # of a version without this field
            del values["config"]["cuda_graph"]
            (tmp_path / name / "result.json").write_text(json.dumps(values))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    again = tmp_path / "again" / "result.json"
    first = tmp_path / "a" / "result.json"
    assert f"left out: {again} has the settings and the seed of {first}; it counts once" in capsys.readouterr().err
    rows = {row[0]: row[1:] for row in Cells((tmp_path / "page.html").read_text()).rows}
    assert rows["End-to-end|cifar10-resnet32-e2e"][1] == "5.00 ± 1.41|n = 2"


def test_sets_of_images_are_rows_of_their_own(tmp_path: Path) -> None:
    digits, nameless = make_config("digits-e2e"), replace(make_config("cifar10-resnet32-e2e"), name="")
    for config, sources in ((digits, ("digits", "my/mnist")), (nameless, ("my/cifar10", "my/svhn"))):
        for error, source in enumerate(sources, start=4):
            write_run(tmp_path / f"{source}.json", replace(config, data=replace(config.data, source=source)), error)
    named = make_config("cifar10-resnet32-k16-dgl", seed=0)
    for seed, source in enumerate(("here/cifar10", "there/cifar10")):
        write_run(tmp_path / f"{seed}.json", replace(named, seed=seed, data=replace(named.data, source=source)), 5.0)
    found = read(tmp_path)[0].runs
    rows = [(table.title, len(row.runs)) for table in tables(found) for row in table.rows]
    assert sorted(rows) == [
        *(("CIFAR-10, ResNet-32", count) for count in (1, 2)),
        ("Digits, ResNet-14", 1),
        ("SVHN, ResNet-32", 1),
        ("mnist, ResNet-14", 1),
    ]


def test_what_does_not_change_the_weights_leaves_the_papers_figure(tmp_path: Path) -> None:
    config = make_config("cifar10-resnet32-k16-dgl")
    for seed, changes in enumerate(({"keep_checkpoints": 1}, {"max_skips": 3}, {"step_each_block": True})):
        write_run(tmp_path / f"{seed}.json", replace(config, seed=seed, **changes), 4.0)
    (table,) = tables(read(tmp_path)[0].runs)
    assert [(row.full_label, len(row.runs), row.paper_error) for row in table.rows] == [
        ("DGL, 15 blocks", 2, 14.08),
        ("DGL (block by block), 15 blocks", 1, 14.08),
    ]


@pytest.mark.parametrize(
    ("source", "error"), [("uoft-cs/cifar10", 6.37), ("data/cifar-10-python", 6.37), ("photos", None)]
)
def test_own_images_get_no_figure_of_the_paper(source: str, error: float | None, tmp_path: Path) -> None:
    config = make_config("cifar10-resnet32-e2e")
    write_run(tmp_path / "one.json", replace(config, data=replace(config.data, source=source)), 5.0)
    (table,) = tables(read(tmp_path)[0].runs)
    assert table.rows[0].paper_error == error
    assert ("images photos" in table.rows[0].changes) == (error is None)
