"""The demo: nine small trainings, one table, one picture."""

import itertools
import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from localgrad.commands import demo_table as demo
from localgrad.commands.demo_time import predicted_seconds
from localgrad.commands.main import main

FAST = ["--epochs", "1", "--train-limit", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--run-dir", str(folder), "--seeds", "0", "1", *FAST]) == 0
    return folder


def _shown(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", "--run-dir", str(folder), *arguments, *FAST]) == 0
    return capsys.readouterr().out


def test_its_table_has_mean_and_deviation_of_the_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*-seed*/*")}
    said = _shown(folder, capsys, "--seeds", "0", "1")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*-seed*/*")}, "kept"
    kept = json.loads((folder / "table.json").read_text())
    for name, label in (("digits-e2e", "End-to-end"), ("digits-dgl", "DGL"), ("digits-dgl-man", "DGL + MAN")):
        results = [json.loads((folder / f"{name}-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
        errors = [result["test_error"] for result in results]
        (line,) = re.findall(rf"^ *{re.escape(label)}  +\d.*$", said, re.MULTILINE)
        assert f" {statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} (2) " in line
        assert [result["test_error"] for result in kept[label]] == errors
        assert [result["config"]["seed"] for result in kept[label]] == [0, 1]


def test_it_draws_a_curve_a_row(folder: Path) -> None:
    with Image.open(folder / "curves.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 3


def test_one_seed_of_them_is_shown_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _shown(folder, capsys, "--seeds", "1")
    assert said.count("(1)") == 3
    assert "±" not in said.partition("Test error")[0]


def test_other_settings_do_not_go_into_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--run-dir", str(folder), "--seeds", "0", "--epochs", "2", "--train-limit", "40"]) == 2
    said = capsys.readouterr().err
    assert "digits-e2e-seed0 holds a demo of other settings; give another --run-dir, or remove it" in said


def test_a_damaged_result_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "demo"
    shutil.copytree(folder, damaged)
    result = damaged / "digits-e2e-seed0" / "result.json"
    (result.parent / "analysis").mkdir()
    times = {"rows": [{"row": "a", "seconds_per_step": 1.0}], "device": "abacus"}
    (result.parent / "analysis" / "speed.json").write_text(json.dumps(times))
    result.write_text("{")
    assert main(["demo", "--run-dir", str(damaged), "--seeds", "0", *FAST]) == 2
    said = capsys.readouterr().err
    assert "result.json" in said
    assert "digits-e2e-seed0 has no result that can be read; remove it, or give another --run-dir" in said


def test_it_says_at_once_what_it_does_and_after_a_few_steps_how_long_that_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--run-dir", str(tmp_path), "--seeds", "0", *FAST]) == 0
    first, second, third, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("localgrad: trains one small network three ways, 1 seed each, on digits that need no down")
    assert second == "localgrad: times a few steps of each training first, to say how long they take here"
    assert re.fullmatch(r"localgrad: about [\d.]+ (s|min) to the end on this machine", third)
    assert any("digits-e2e: 1 block" in line for line in rest)
    assert main(["demo", "--run-dir", str(tmp_path), "--seeds", "0", *FAST]) == 0
    assert "to the end" not in capsys.readouterr().err  # nothing is left to do


def test_what_is_predicted_grows_with_epochs_steps_and_runs() -> None:
    """Here all that is timed takes 100 s: building, the first step, each other one, and an evaluation."""
    clock = itertools.count(0, 100).__next__
    config = demo._config("digits-dgl", 3, 130, 0)  # two full batches and a part
    steps = -(-130 // config.optim.batch_size)
    one = predicted_seconds([config], clock)
    assert one == 100 + 100 + 3 * (100 * steps + 100)
    assert predicted_seconds([config, replace(config, seed=1)], clock) == 2 * one
    assert predicted_seconds([]) == 0.0


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_its_table_keeps_its_figures_at_any_width(
    columns: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    table = demo.run_demo(folder, epochs=1, train_limit=40, seeds=(0, 1))
    capsys.readouterr()
    demo.show(table)
    said = capsys.readouterr().out
    result = table.rows[2].runs[0].result
    assert "…" not in said
    assert f"{table.rows[2].mean('peak_memory_bytes') / 2**20:.1f} MiB" in said
    assert all(f"{row.mean('test_error'):.2f} ±" in said for row in table.rows)
    shown = f"{result.parameters['backbone'] / 1e3:.0f}k + {result.parameters['auxiliary'] / 1e3:.0f}k" in said
    assert shown == (columns >= 80)
