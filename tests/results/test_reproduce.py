"""Reproducing tables: what is run, that it is run once and to the same bits, and what is said of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from localgrad.commands.main import main
from localgrad.commands.reproduce import _tell_failures
from localgrad.config.saved import to_dict
from localgrad.data.fingerprint import Fingerprint
from localgrad.errors import LocalGradError, closest
from localgrad.recipes import recipe
from localgrad.recipes.tables import TABLES, table
from localgrad.results import reproduce
from localgrad.results.cells import Cell, plan_cells
from localgrad.results.reproduce import run_cells
from localgrad.results.reproduce_table import show_table
from localgrad.results.table_images import RowImages, images_of, other_images
from localgrad.results.tables import mean_std
from localgrad.runs.files import write_json
from localgrad.runs.result import Result, as_file
from localgrad.training.interrupts import InterruptedRun
from localgrad.training.trainer import fit

EPOCHS = 8
CHANGES: dict[str, Any] = {
    "data.train_limit": 40,
    "data.test_limit": 20,
    "optim.epochs": EPOCHS,
    "optim.batch_size": 20,
    "accelerator": "cpu",
    "precision": "32-true",
}
FLAGS = f"--train-limit 40 --test-limit 20 --epochs {EPOCHS} --batch-size 20 --accelerator cpu --precision 32-true"


def _cells(output: Path, seeds: tuple[int, ...] = (0,), rows: tuple[str, ...] = (), **changes: Any) -> list[Cell]:
    return plan_cells("digits", seeds=seeds, rows=rows, changes=CHANGES | changes, output=output)


def _store(cell: Cell, test_error: float, best: float = 1.0) -> None:
    """A result file as a finished run leaves it."""
    result = Result(
        config=cell.config,
        test_error=test_error,
        best_test_error=best,
        best_epoch=1,
        local_errors=None,
        cuts=list(cell.config.cuts or ()),
        num_blocks=len(cell.config.cuts or ()) + 1,
        parameters={"backbone": 1, "auxiliary": 0, "trainable": 1},
        peak_memory_bytes=3 * 2**20,
        seconds_per_step=0.1,
        wall_seconds=90.0,
        device="abacus",
        precision="32-true",
        versions={},
        commit=None,
    )
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.result, as_file("run", result))


def _program(monkeypatch: pytest.MonkeyPatch, path: Path, script: str) -> None:
    """Makes a shell script run instead of Python, for what is about processes alone."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def _until(condition: str) -> str:
    """Shell that waits for a condition, ten seconds at most."""
    return f"n=0; until [ {condition} ] || [ $n -ge 1000 ]; do n=$((n + 1)); sleep 0.01; done"


def _interrupt_when(condition: Callable[[], bool]) -> threading.Thread:
    """Sends this process a Ctrl-C once the condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


# Real runs


def _assert_is_the_run_of(cell: Cell, tmp_path: Path) -> None:
    """Weights and errors are those of an uninterrupted training in this process, with as many threads."""
    own = tmp_path / "reference" / cell.name
    fit(cell.config, own, quiet=True)
    expected = json.loads((own / "result.json").read_text())
    assert cell.run.model.read_bytes() == (own / "model.safetensors").read_bytes()
    stored = json.loads(cell.result.read_text())
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    assert stored["test_errors"] == [line["test_error"] for line in lines]
    same = ("config", "test_error", "best_test_error", "best_epoch", "cuts", "num_blocks", "parameters", "versions")
    assert {name: stored[name] for name in same} == {name: expected[name] for name in same}
    assert stored["command"] == f"localgrad {' '.join(cell.command)}"
    assert stored["device"] and stored["wall_seconds"] > 0 and stored["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_a_table_from_an_interrupt_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table"
    e2e, dgl = _cells(output, rows=("digits-e2e", "digits-dgl"))
    command = ["reproduce", "digits", *FLAGS.split(), "--output", str(output), "--rows", "digits-dgl"]
    watch = _interrupt_when(lambda: dgl.run.metrics.exists() and dgl.run.metrics.read_text().count("\n") >= 1)
    assert main(command) == 130
    watch.join()
    assert capsys.readouterr().err.endswith("localgrad: interrupted; the same command goes on from there\n")
    assert dgl.state == "started"
    assert 1 <= len(dgl.run.metrics.read_text().splitlines()) < EPOCHS
    assert f"{dgl.run.path} --resume" in dgl.log.read_text()

    command.append("digits-e2e")
    assert main([*command, "--jobs", "2"]) == 0
    assert "digits-e2e-seed0: starts\ndigits-dgl-seed0: goes on after epoch" in capsys.readouterr().err
    _assert_is_the_run_of(e2e, tmp_path)
    _assert_is_the_run_of(dgl, tmp_path)

    monkeypatch.setattr(subprocess, "Popen", _no_process)
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "digits-e2e " in said.out


def _no_process(*arguments: object, **options: object) -> None:
    raise OSError(0, "no process may be started")


# Processes


def test_a_row_that_fails_is_named_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, stored, ran = tmp_path / "table", tmp_path / "stored", tmp_path / "ran"
    cells = _cells(output)
    stored.mkdir()
    for cell in cells:
        _store(cell, 5.0)
        cell.result.rename(stored / cell.config.name)
    works = f'echo $4 >> {ran}; for folder; do :; done; mkdir -p "$folder"; cp {stored}/$4 "$folder/result.json"'
    broken = 'case "$*" in *" digits-dgl "*) echo "localgrad: broken, of course"; exit 2;; esac'
    command = ["reproduce", "digits", *FLAGS.split(), "--output", str(output)]

    _program(monkeypatch, tmp_path / "program", f"{broken}; {works}")
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.err.endswith("localgrad: digits-dgl-seed0 failed: broken, of course (exit code 2)\n")
    assert f"digits-dgl-seed0: failed: broken, of course (exit code 2); see {cells[1].log}" in said.err
    assert [cell.state for cell in cells] == ["done", "new", "done"]

    ran.unlink()
    _program(monkeypatch, tmp_path / "program", works)
    assert main(command) == 0
    assert capsys.readouterr().err.startswith("2 of 3 runs are done\ndigits-dgl-seed0: starts\n")
    assert ran.read_text().split() == ["digits-dgl"]


@pytest.mark.parametrize(("jobs", "order"), [(1, "start end start end"), (2, "start start end end")])
def test_so_many_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, order: str) -> None:
    said = tmp_path / "said"
    waits = _until(f"$(grep -c start {said}) -ge {jobs}")
    _program(monkeypatch, tmp_path / "program", f"echo start >> {said}; {waits}; echo end >> {said}; echo why; exit 3")
    failures = run_cells(_cells(tmp_path / "table")[:2], jobs=jobs)
    assert said.read_text().split() == order.split()
    assert failures == dict.fromkeys(("digits-e2e-seed0", "digits-dgl-seed0"), "why (exit code 3)")


def test_threads_are_divided_between_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    _program(monkeypatch, tmp_path / "program", "echo $OMP_NUM_THREADS threads; kill -9 $$")
    cells = _cells(tmp_path / "table")
    assert run_cells(cells, jobs=9) == {cell.name: "ended by SIGKILL" for cell in cells}
    assert [cell.log.read_text() for cell in cells] == ["2 threads\n"] * 3, "no more shares than runs"


def test_the_folder_is_held_until_the_last_process_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(monkeypatch, tmp_path / "program", "exec sleep 60")
    cells = _cells(tmp_path / "table")
    with reproduce._locked(cells[0].output) as lock:
        process = reproduce._start(cells[0], {"OMP_NUM_THREADS": "1"}, lock)
    try:
        with pytest.raises(LocalGradError, match="are going on; wait for them, or give another --output"):
            run_cells(cells)
    finally:
        reproduce._stop([process])
    assert process.returncode == -signal.SIGTERM
    with reproduce._locked(cells[0].output):
        pass


def test_a_second_interrupt_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    notes = f"trap 'echo term >> {said}' TERM; echo ready >> {said}"
    _program(monkeypatch, tmp_path / "program", f"{notes}; {_until(f'$(grep -c term {said}) -ge 2')}")

    def lines() -> int:
        return said.read_text().count("\n") if said.exists() else 0

    cells = _cells(tmp_path / "table")[:1]
    first = _interrupt_when(lambda: lines() == 1)
    second = _interrupt_when(lambda: lines() == 2)
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells)
    first.join()
    second.join()
    assert said.read_text().split() == ["ready", "term", "term"]


def test_a_run_that_ended_uncollected_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = _cells(tmp_path)[0]
    cell.run.start(cell.config, 0)
    _store(cell, 5.0)
    cell.result.rename(cell.run.result)
    cell.run.append_metrics({"test_error": 5.0})
    monkeypatch.setattr(subprocess, "Popen", _no_process)
    assert cell.state == "started"
    assert run_cells([cell]) == {}
    assert json.loads(cell.result.read_text())["test_errors"] == [5.0]


def test_results_without_what_was_added_later_are_results(tmp_path: Path) -> None:
    cell = _cells(tmp_path)[0]
    _store(cell, 5.0)
    values = json.loads(cell.result.read_text())
    del values["num_classes"], values["skipped"]
    cell.result.write_text(json.dumps(values))
    assert _cells(tmp_path)[0].state == "done"


def test_finished_runs_may_have_found_their_images_elsewhere(tmp_path: Path) -> None:
    cell = _cells(tmp_path)[0]
    _store(cell, 5.0)
    values = json.loads(cell.result.read_text())
    values["config"]["data"]["source"] = "another/place"
    cell.result.write_text(json.dumps(values))
    cell.run.path.mkdir(parents=True)
    write_json(cell.run.path / "config.json", values["config"])
    assert _cells(tmp_path)[0].state == "done"
    values["config"]["data"]["padding"] = 3
    cell.result.write_text(json.dumps(values))
    with pytest.raises(LocalGradError, match=r"holds runs of other settings .* data.padding: 3 -> 1"):
        _cells(tmp_path)


def test_damaged_files_of_started_runs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, cell = _cells(tmp_path)[:2]
    damaged.run.path.mkdir(parents=True)
    write_json(damaged.run.path / "config.json", to_dict(damaged.config))
    stored = tmp_path / "stored"
    _store(cell, 5.0)
    cell.result.rename(stored)
    _program(monkeypatch, tmp_path / "program", f"mkdir {cell.run.path}; cp {stored} {cell.run.result}")
    for text in (b'{"epoch": 1, "te\n', b"\xff\n"):
        damaged.run.metrics.write_bytes(text)
        ((name, reason),) = run_cells([damaged, cell]).items()
        assert name == damaged.name
        assert re.search(r"metrics.jsonl is damaged .*: remove .* to run it anew", reason)
        assert cell.state == "done", "the others are run"
        cell.result.unlink()
    write_json(damaged.run.path / "config.json", {"a": 1})
    with pytest.raises(LocalGradError, match=rf"{damaged.run.path / 'config.json'}: this saved configuration"):
        _cells(tmp_path)


def test_sigterm_leaves_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(monkeypatch, tmp_path / "program", f"kill -TERM {os.getpid()}; exec sleep 30")
    command = ["reproduce", "digits", *FLAGS.split(), "--output", str(tmp_path / "table"), "--rows", "digits-dgl"]
    assert main(command) == 143


def test_runs_at_the_same_time_share_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("digits-dgl").config
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reproduce.environment(config, 1, 3) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [reproduce.environment(config, place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert reproduce.environment(config, 1, 2)["CUDA_VISIBLE_DEVICES"] == "5"
    assert "CUDA_VISIBLE_DEVICES" not in reproduce.environment(replace(config, devices=2), 0, 1)


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", _no_process)
    with pytest.raises(LocalGradError, match="digits-e2e-seed0 cannot be started: no process may be"):
        run_cells(_cells(tmp_path))


# What is run


def test_every_row_with_the_first_seed_comes_first(tmp_path: Path) -> None:
    names = [f"{row}-seed{seed}" for seed in (3, 0) for row in table("digits").rows]
    assert [cell.name for cell in _cells(tmp_path, seeds=(3, 0))] == names


def test_the_command_of_a_cell_trains_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"data.source": "some/folder", "optim.lr": 0.3, "optim.warmup_epochs": 0, "local_heads": True}
    changes |= CHANGES | {"evaluate_every": 2, "checkpoint_every": 5}
    rows = ("cifar10-resnet32-e2e", "cifar10-resnet32-k16-dgl-manpp")
    for cell in plan_cells("first", seeds=[7], rows=rows, changes=changes, output=tmp_path):
        assert main([*cell.command, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out) == to_dict(cell.config)
        assert cell.config.local_heads and cell.config.seed == 7 and cell.config.optim.lr == 0.3


def test_dry_run_says_what_would_be_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "digits", "--epochs", "3", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"new      localgrad train {row} --seed 0 --optim.epochs 3" for row in table("digits").rows]
    assert list(tmp_path.iterdir()) == []

    done, started, _ = plan_cells("digits", seeds=[0], changes={"optim.epochs": 3}, output=Path("results/digits"))
    _store(done, 1.0)
    started.run.start(started.config, 0)
    assert main(["reproduce", "digits", "--epochs", "3", "--dry-run"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "started", "new"]


def test_without_a_table_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[2:] == [[name, str(len(one.rows))] for name, one in TABLES.items()]


# What is refused


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    stored, started, _ = _cells(tmp_path, seeds=(4,))
    _store(stored, 5.0)
    with pytest.raises(LocalGradError, match=r"digits-e2e-seed4.json, .*optim.epochs: 8 -> 9\); give another --output"):
        _cells(tmp_path, **{"optim.epochs": 9})
    stored.result.unlink()
    started.run.start(started.config, 0)
    with pytest.raises(LocalGradError, match=r"runs/digits-dgl-seed4/config.json, .*optim.lr: 0.1 -> 0.2\)"):
        _cells(tmp_path, rows=("digits-e2e",), **{"optim.lr": 0.2})
    assert len(_cells(tmp_path, seeds=(0, 1))) == 6, "other seeds and rows may be added"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("digit", f"'digit'{closest('digit', ['digits'])}"),
        ("digits --rows digits-dlg", "table digits has no row 'digits-dlg' ("),
        ("digits --seeds 1 1", "seeds are (1, 1): give one or more different ones"),
        ("digits --seeds -1", "seed is -1"),
        ("digits --epochs 0 --lr -1", "; optim.epochs is 0"),
        ("digits --train-limit 0", "--data.train-limit 0"),
        ("digits --accelerator abacus", "accelerator is 'abacus'"),
        ("digits --jobs 0", "jobs is 0: it must be at least 1"),
        ("digits --output file", "file/runs cannot"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["reproduce", *flags.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_result_in_a_run_folder_is_not_collected(tmp_path: Path) -> None:
    cell = _cells(tmp_path)[0]
    _store(cell, 5.0)
    values = json.loads(cell.result.read_text())
    cell.result.unlink()
    cell.run.path.mkdir(parents=True)
    for broken, why in (
        ({"kind": "run"}, "it has no"),
        ([], "no result"),
        (values | {"wall_seconds": None}, "wall_seconds is None"),
    ):
        write_json(cell.run.result, broken)
        ((name, reason),) = run_cells([cell]).items()
        assert name == cell.name
        assert f"{cell.run.result} is " in reason
        assert why in reason
        assert not cell.result.exists()


def test_a_result_under_another_seed_is_refused(tmp_path: Path) -> None:
    cell = _cells(tmp_path)[0]
    _store(cell, 5.0)
    copy = cell.result.with_name(cell.result.name.replace("seed0", "seed1"))
    copy.write_bytes(cell.result.read_bytes())
    with pytest.raises(LocalGradError, match=rf"{copy} holds the result of {cell.config.name} with seed 0"):
        _cells(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", ".*JSON"), ("[]", "is no result of a run")])
def test_a_damaged_result_is_named_and_kept(tmp_path: Path, text: str, message: str) -> None:
    cell = _cells(tmp_path)[0]
    cell.result.write_text(text)
    with pytest.raises(LocalGradError, match=f"digits-e2e-seed0.json {message}"):
        _cells(tmp_path)
    assert cell.result.read_text() == text


# What is said


def test_the_table_has_mean_deviation_number_and_the_papers_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = plan_cells("first", seeds=[0, 10], changes={"optim.epochs": 10}, output=tmp_path)
    found = {cell.name: cell for cell in cells}
    for name, error in (("e2e-seed0", 30.0), ("e2e-seed10", 34.0), ("k16-dgl-seed0", 40.0)):
        _store(found[f"cifar10-resnet32-{name}"], error, error - 1)
    show_table("first", tmp_path)
    first, header, *lines = filter(str.strip, capsys.readouterr().out.splitlines())
    assert first == f"{TABLES['first'].title}; results in {tmp_path}"
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert header.split()[:3] == ["row", "label", "blocks"]
    expected = ["E2E", "1", "32.00", "±", "2.83", "(2)", "31.00", "±", "2.83", "(2)", "6.37", "3", "1.5"]
    assert rows["cifar10-resnet32-e2e"] == expected
    assert rows["cifar10-resnet32-k16-dgl"] == ["K=16", "15", "40.00", "(1)", "39.00", "(1)", "14.08", "3", "1.5"]
    assert rows["cifar10-resnet32-k16-dgl-man"] == ["K=16", "15", "-", "-", "9.11", "-", "-"]
    assert lines[-1] == "not as in the recipe: optim.epochs: 400 -> 10"
    assert sum(line.startswith("not as") for line in lines) == 1


def test_mean_and_deviation_of_a_sample() -> None:
    assert mean_std([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert mean_std([5.0]) == "5.00"


# What is said of a table


def test_equal_failures_are_one_message_and_keep_all_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = plan_cells("digits", seeds=(0, 1), changes={}, output=tmp_path)
    cells[0].log.parent.mkdir(parents=True)
    cells[0].log.write_text("epoch 1/8\nlocalgrad: 2 of 30 files are damaged\n  a.jpg (empty)\n  Repair them.\n")
    reason = reproduce._reason(cells[0], 2)
    assert reason == "2 of 30 files are damaged a.jpg (empty) Repair them. (exit code 2)"
    _tell_failures({cell.name: reason for cell in cells})
    said = capsys.readouterr().err
    assert said == f"localgrad: {cells[0].name} and {len(cells) - 1} more failed: {reason}\n"


def test_images_that_cannot_be_had_are_said_once_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    cells = plan_cells("first", seeds=(0,), changes={"data.source": "owner/absent"}, output=tmp_path)
    with pytest.raises(LocalGradError, match=r"^--data owner/absent"):
        run_cells(cells)
    assert not [*tmp_path.iterdir()]


def test_rows_of_a_table_are_trained_on_the_same_images(tmp_path: Path) -> None:
    one, other = plan_cells("digits", seeds=(0,), changes={}, output=tmp_path)[:2]
    known = {images_of(one.config.name): RowImages("first", Fingerprint("train", 40, 10, "abc"))}
    data, optim = replace(other.config.data, train_limit=40), replace(other.config.optim, epochs=1)
    fit(replace(other.config, data=data, optim=optim), other.run.path, quiet=True)
    assert "its images are not those of first: 1,437 in 10 classes, not 40" in str(other_images(other, known))
    assert other_images(other, {}) is None
    said = str(reproduce._prediction(other, [one, other], 1))
    assert said.startswith("about ") and "to the end of the table" in said


def _folder(path: Path, first: int) -> Path:
    """Twenty images of two classes, as no other `first` makes them."""
    for number in range(20):
        label = path / "ab"[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((8, 8, 3), first + number, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(label / f"{number:02d}.png")
    return path


def test_other_images_are_noticed_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of the table is finished; the first row was started, on images that have changed since."""
    started = tmp_path / "started"
    begin = f'echo $4 >> {started}; for folder; do :; done; mkdir -p "$folder"; cp {tmp_path}/$4 "$folder/config.json"'
    _program(monkeypatch, tmp_path / "program", f"{begin}; kill -TERM {os.getpid()}; exec sleep 30")
    data = {"data.source": str(_folder(tmp_path / "images", 0)), "data.test_fraction": 0.2, "data.image_size": 8}
    cells = _cells(tmp_path / "table", **data, **{"data.train_limit": 8, "data.test_limit": 2})
    for cell in cells:
        write_json(tmp_path / cell.config.name, to_dict(cell.config))
    for _ in range(2):  # the same images may be read as often as one likes
        with pytest.raises(InterruptedRun):
            run_cells(cells)
    shutil.rmtree(tmp_path / "images")
    _folder(tmp_path / "images", 50)
    with pytest.raises(LocalGradError) as error:
        run_cells(cells)
    assert started.read_text().split() == ["digits-e2e"] * 2
    assert "was begun with other images than those of --data" in str(error.value)
    assert str(error.value).count("\n") == 2
    with pytest.raises(LocalGradError, match="was begun with other images"):  # a row that was not started
        run_cells(cells[1:2])
    shutil.rmtree(tmp_path / "table" / "runs" / "digits-e2e-seed0")
    with pytest.raises(InterruptedRun):  # nothing was begun: these are the table's images now
        run_cells(cells)


def test_a_damaged_file_of_the_tables_images_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    cells = _cells(tmp_path, **{"data.source": str(_folder(tmp_path / "images", 0)), "data.test_fraction": 0.2})
    cells[0].run.path.mkdir(parents=True)
    write_json(cells[0].run.path / "config.json", to_dict(cells[0].config))
    write_json(tmp_path / "runs" / "images.json", as_file("table-images", {"sets": {"a": {"run": 3}}}))
    with pytest.raises(LocalGradError, match=r"images\.json.*run"):
        run_cells(cells)
