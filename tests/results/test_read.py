"""Reading result files: what is damaged is named and left out, alone."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.results import UNITS, Cells, about, make_config, read, write_run
from localgrad.commands.main import main
from localgrad.errors import LocalGradError
from localgrad.results.report import page


def _damaged(folder: Path) -> dict[str, str]:
    """Files of many kinds of damage, and what is said of each."""
    good = write_run(folder / "good.json", make_config("digits-e2e"), 4.0)
    texts = {
        "cut.json": json.dumps(good)[:100],
        "nan.json": json.dumps({**good, "test_error": float("nan")}),
        "text.json": json.dumps({**good, "test_error": "4.0"}),
        "lacks.json": json.dumps({name: value for name, value in good.items() if name != "device"}),
        "list.json": json.dumps({**good, "config": [1]}),
        "large.json": json.dumps({**good, "test_error": 10**400}),
        "heads.json": json.dumps({**good, "local_errors": [1.0, 2.0]}),
        "probe.json": json.dumps({"analysis": "probe", **about("digits-e2e"), "units": UNITS, "accuracies": [1.0]}),
        "kind.json": json.dumps({"analysis": "umap", **about("digits-e2e"), "units": UNITS}),
        "plan.json": json.dumps(
            {"title": "x", "rows": [{"peak": None, "training": "", "num_blocks": 1, "recompute": 0}]}
        ),
    }
    texts["times.json"] = json.dumps({"rows": [{"row": "x", "seconds_per_step": 1.0, "config": {"name": ""}}]})
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe{}")
    return {
        "cut.json": "JSON",
        "nan.json": "NaN is no number of JSON",
        "text.json": "test_error is '4.0'",
        "lacks.json": "it has no 'device'",
        "list.json": "config is [1]",
        "probe.json": "accuracies",
        "kind.json": "has the kind 'umap'",
        "plan.json": "rows.0.peak is None",
        "times.json": "rows.0: a row with a config has no 'num_blocks'",
        "bytes.json": "JSON",
        "large.json": "test_error is 1",
        "heads.json": "local_errors",
    }


def test_damaged_files_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = _damaged(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("[1, 2]")
    output = tmp_path / "pages" / "report.html"
    assert main(["report", str(tmp_path), "-o", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {output}\n"
    lines = said.err.splitlines()
    assert len(lines) == len(expected) + 1
    for name, reason in expected.items():
        (line,) = [line for line in lines if str(tmp_path / name) in line]
        assert line.startswith("localgrad: left out: ")
        assert reason in line
    assert lines[-1] == "localgrad: left out, no result that is known: other.json"
    rows = {row[0]: row[1:] for row in Cells(output.read_text()).rows}
    assert rows["End-to-end|digits-e2e"][1] == "4.00|n = 1"
    assert len(read(tmp_path)[0].runs) == 1


@pytest.mark.parametrize(("field", "value"), [("device", None), ("local_errors", {"a": 1}), ("config.optim.lr", "a")])
def test_a_field_that_cannot_be_drawn_costs_its_own_file_only(
    field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "whole.json", make_config("digits-dgl"), 5.5)
    values = write_run(tmp_path / "other.json", make_config("digits-dgl-man"), 4.25)
    *parents, last = field.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    part[last] = value
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert f"left out: {tmp_path / 'other.json'} is damaged" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text()
    assert "5.50" in text
    assert "4.25" not in text


def test_a_damaged_line_of_metrics_costs_that_line_only(tmp_path: Path) -> None:
    write_run(tmp_path / "run" / "result.json", make_config("digits-e2e"), 4.0)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "test_er')
    found, warnings = read(tmp_path)
    assert [line.epoch for line in found.runs[0].metrics] == [1, 2, 3]
    assert len(warnings) == 1
    assert "metrics.jsonl, line 4, is damaged" in warnings[0]


def test_a_copy_of_a_run_is_counted_once(tmp_path: Path) -> None:
    write_run(tmp_path / "run" / "result.json", make_config("digits-e2e"), 4.0)
    shutil.copy(tmp_path / "run" / "result.json", tmp_path / "copy.json")
    moved = json.loads((tmp_path / "copy.json").read_text())
    moved["config"]["data"]["source"] = "where/the/images/lie/elsewhere"
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    found, warnings = read(tmp_path)
    assert [run.path.name for run in found.runs] == ["copy.json"]
    assert warnings == []


def test_results_in_linked_folders_are_found_once(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "run" / "result.json", make_config("digits-e2e"), 4.0)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "results" / "loop").symlink_to(tmp_path / "results")
    found, warnings = read(tmp_path / "results")
    assert [run.path for run in found.runs] == [tmp_path / "results" / "link" / "result.json"]
    assert warnings == []


def test_names_and_metrics_that_cannot_be_read_cost_nothing_else(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.json")
    write_run(tmp_path / name, make_config("digits-e2e"), 4.0)
    (tmp_path / name).with_suffix(".jsonl").unlink()
    (tmp_path / name).with_suffix(".jsonl").mkdir()
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "<b>4.00</b>" in (tmp_path / "page.html").read_text()


def test_errors_by_epoch_may_be_in_the_result_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "one.json", make_config("digits-e2e"), 4.0, test_errors=[9.0, None, 4.0])
    found, _ = read(tmp_path)
    assert [(line.epoch, line.test_error) for line in found.runs[0].metrics] == [(1, 9.0), (2, None), (3, 4.0)]
    assert "Learning curves" in page(found, tmp_path)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_to_show_is_an_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path / name), "-o", str(output)]) == 2
    assert ("has no results" if name == "empty" else "is not a folder") in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(LocalGradError):
        read(tmp_path / name)
