"""The run folder: files are whole or not there, and what does not belong is refused."""

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.recipes import recipe
from localgrad.runs.files import atomic_write
from localgrad.runs.folder import RunFolder
from localgrad.runs.provenance import provenance
from localgrad.training.state import state_of
from localgrad.training.tensorboard import open_board

CONFIG = TrainConfig(cuts=())


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.check(CONFIG, resume=False)
    folder.start(CONFIG, lines=0)
    return folder


def _files(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_and_loses_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save_checkpoint({"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt .*\(No space left on device\)"):
        folder.save_checkpoint({"step": 2})
    with pytest.raises(LocalGradError, match=r"metrics\.jsonl could not be written"):
        folder.append_metrics({"epoch": 1})
    assert folder.newest_checkpoint()[1] == {"step": 1}
    assert not any(name.endswith(".tmp") for name in _files(folder))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalGradError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run").start(CONFIG, lines=0)


def test_what_an_interrupted_write_left_is_cleared_away(folder: RunFolder) -> None:
    (folder.path / ".checkpoint.pt.1.tmp").write_bytes(b"half")
    folder.start(CONFIG, lines=0)
    assert _files(folder) == {"config.json", "metrics.jsonl"}


def test_a_folder_in_use_asks_for_resume(folder: RunFolder) -> None:
    with pytest.raises(LocalGradError, match="holds this run, not finished; continue it with --resume"):
        folder.check(CONFIG, resume=False)
    folder.check(CONFIG, resume=True)


def test_a_different_run_is_refused_and_the_fields_are_named(folder: RunFolder) -> None:
    other = replace(CONFIG, seed=3)
    for resume in (False, True):
        with pytest.raises(LocalGradError, match=r"holds a different run .*seed: 0 -> 3.*another --run-dir"):
            folder.check(other, resume)


def test_a_finished_run_is_refused(folder: RunFolder) -> None:
    folder.result.write_text("{}")
    for resume in (False, True):
        with pytest.raises(LocalGradError, match="400 epochs"):
            folder.check(CONFIG, resume)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match="holds no run to resume"):
        RunFolder(tmp_path).check(CONFIG, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_the_config_comes_back(folder: RunFolder) -> None:
    assert folder.config() == CONFIG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"seed": 1', "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b'{"sede": 1}', "'sede'"),
    ],
)
def test_a_config_that_was_changed(folder: RunFolder, content: bytes, message: str) -> None:
    (folder.path / "config.json").write_bytes(content)
    with pytest.raises(LocalGradError, match=message):
        folder.config()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match=r"is no run folder: it has no config\.json"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(LocalGradError, match="cannot be read"):
        RunFolder(tmp_path).config()


def test_metrics_are_cut_back_to_what_the_checkpoint_knows(folder: RunFolder) -> None:
    for epoch in (1, 2, 3):
        folder.append_metrics({"epoch": epoch})
    with folder.metrics.open("a") as file:
        file.write('{"epo')
    folder.start(CONFIG, lines=2)
    folder.append_metrics({"epoch": 3})
    assert [json.loads(line)["epoch"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3]


def test_numbers_that_json_does_not_have_are_not_written(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.append_metrics({"loss": float("nan")})
    assert folder.metrics.read_text() == ""


def test_checkpoints_come_back(folder: RunFolder) -> None:
    folder.save_checkpoint({"weights": torch.arange(3), "state": {"epoch": 2, "error": None}})
    state = folder.newest_checkpoint()[1]
    assert torch.equal(state["weights"], torch.arange(3))
    assert state["state"] == {"epoch": 2, "error": None}


def test_no_checkpoint(folder: RunFolder) -> None:
    with pytest.raises(LocalGradError, match=r"has no checkpoint\.pt"):
        folder.newest_checkpoint()[1]


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_checkpoint(folder: RunFolder, keep: int) -> None:
    folder.save_checkpoint({"weights": torch.zeros(100)})
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:keep])
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt is cut short or damaged"):
        folder.newest_checkpoint()[1]


class _Attack:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.victim),))


@pytest.mark.parametrize(
    ("by_torch", "message"),
    [
        (True, r"checkpoint\.pt is refused: it holds more than tensors and plain values"),
        (False, r"checkpoint\.pt .*damaged"),
    ],
)
def test_a_malicious_checkpoint_runs_nothing(folder: RunFolder, by_torch: bool, message: str) -> None:
    victim = folder.path / "attacked"
    folder.save_checkpoint({"step": 1}, keep=2)
    with folder.checkpoint.open("wb") as file:
        torch.save({"state": _Attack(victim)}, file) if by_torch else pickle.dump({"state": _Attack(victim)}, file)
    with pytest.raises(LocalGradError, match=message) as raised:
        folder.newest_checkpoint()[1]
    assert "weights_only" not in str(raised.value), "torch's own message says how to run the code"
    assert not victim.exists()


def test_a_checkpoint_that_is_something_else(folder: RunFolder) -> None:
    torch.save([1, 2], folder.checkpoint)
    with pytest.raises(LocalGradError, match="is not a localgrad file: it holds a list"):
        folder.newest_checkpoint()[1]


def test_models_come_back_under_their_own_names(folder: RunFolder) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    folder.save_model(model.state_dict())
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folder.load_model(again)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_with_tied_weights_can_be_saved(folder: RunFolder) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    folder.save_model(model.state_dict())
    saved = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    folder.load_model(model)
    assert torch.equal(model[1].weight, saved)
    assert model[1].weight is model[0].weight


def test_weights_of_another_model(folder: RunFolder) -> None:
    folder.save_model(nn.Linear(3, 4).state_dict())
    for other in (nn.Linear(3, 5), nn.Conv2d(3, 4, 1, bias=False)):
        with pytest.raises(LocalGradError, match=r"model\.safetensors .*weight"):
            folder.load_model(other)


def test_weights_that_are_cut_short_or_missing(folder: RunFolder) -> None:
    with pytest.raises(LocalGradError, match=r"has no model\.safetensors: its run is not finished"):
        folder.load_model(nn.Linear(3, 4))
    folder.save_model(nn.Linear(3, 4).state_dict())
    folder.model.write_bytes(folder.model.read_bytes()[:-10])
    with pytest.raises(LocalGradError, match=r"model\.safetensors is cut short or damaged"):
        folder.load_model(nn.Linear(3, 4))


def test_tensorboard_that_is_not_installed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(LocalGradError, match=r"\[tensorboard\]"):
        open_board(folder.path, 1)


def test_provenance_names_versions_and_commit() -> None:
    found = provenance(torch.device("cpu"))
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    assert set(found["versions"]) == {"localgrad", "python", "torch", "torchvision", "lightning"}
    assert "thread(s)" in found["device"]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def test_outside_a_repository_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance(torch.device("cpu"))["commit"] is None


@pytest.mark.parametrize("part", ["objective", "momentum"])
def test_a_run_of_an_earlier_version_goes_on_with_the_options_that_it_did_not_know(tmp_path: Path, part: str) -> None:
    """What its config does not say is what the later version does by default, so the run is the same."""
    config = with_defaults(recipe("digits-dgl-man").config)
    folder = RunFolder(tmp_path / "run")
    folder.start(config, lines=0)
    saved = json.loads((folder.path / "config.json").read_text())
    given = [name for name, value in saved[part].items() if name != "name" and value is not None]
    for name in given:
        del saved[part][name]
    (folder.path / "config.json").write_text(json.dumps(saved))
    assert given
    folder.check(config, resume=True)
    assert folder.config() == config


def test_the_state_of_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    first = {"sums": [1.5, 2.5, 16.0], "epoch": 2, "batch": 1, "step": 5, "lines": 1, "elapsed_seconds": 3.5}
    first |= {"test_error": 90.0, "local_errors": None, "best_test_error": 80.0, "best_epoch": 1}
    first |= {"peak_memory_bytes": 7, "seconds_per_step": 0.5, "skipped": 0, "skipped_in_a_row": 0}
    state = state_of(first, 2, tmp_path / "checkpoint.pt")
    assert {name: getattr(state, name) for name in first} == first
