"""The best epoch, patience, and going on after the end; how long it takes and what slows it."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers.networks import eventful_resnet
from helpers.training import planned
from localgrad.commands.main import main
from localgrad.config.methods import with_defaults
from localgrad.config.schema import ModelConfig, TrainConfig
from localgrad.recipes import recipe
from localgrad.runs.folder import RunFolder
from localgrad.runs.load import load_run
from localgrad.training.build import build_run
from localgrad.training.outlook import crowded, duration, prediction
from localgrad.training.progress import Display
from localgrad.training.trainer import fit, train

torch.set_num_threads(1)


def small(epochs: int = 3, **changes: Any) -> TrainConfig:
    config = recipe("digits-dgl-man").config
    data = replace(config.data, image_size=8, train_limit=40, test_limit=20)
    optim = replace(config.optim, epochs=epochs, batch_size=20, lr=0.1, warmup_epochs=0)
    model = replace(config.model, depth=8)
    return replace(config, data=data, optim=optim, model=model, cuts=("layer1.0",), **changes)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_weights_of_the_best_epoch_are_kept(tmp_path: Path) -> None:
    fit(small(1), tmp_path / "one", quiet=True)
    config = small(3, keep_best=True)
    result = fit(config, tmp_path / "three", quiet=True, images=planned(config, 50.0, 60.0, 55.0))
    assert (result.best_epoch, result.best_test_error, result.chosen_on) == (1, 50.0, "test")
    best, last = weights(tmp_path / "three" / "best.safetensors"), weights(tmp_path / "three" / "model.safetensors")
    assert not same(best, last)
    assert same(best, load_run(tmp_path / "three", best=True).model.state_dict())
    assert same(last, load_run(tmp_path / "three").model.state_dict())
    assert not (tmp_path / "one" / "best.safetensors").exists()


def test_the_best_epoch_is_chosen_on_the_validation_images(tmp_path: Path) -> None:
    config = small(3, keep_best=True)
    config = with_defaults(replace(config, data=replace(config.data, validation_split="train")))
    run = build_run(config, planned(config, 10.0, 20.0, 30.0))
    assert run.validation is not None
    _, run.validation = planned(config, 70.0, 40.0, 60.0)
    result = train(run, RunFolder(tmp_path / "run"), quiet=True)
    assert (result.best_epoch, result.best_test_error, result.chosen_on) == (2, 20.0, "validation")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_error"] for line in lines] == [70.0, 40.0, 60.0]


def test_patience_stops_and_says_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(5, patience=2)
    images = planned(config, 50.0, 40.0, 45.0, 40.0, 30.0)
    result = fit(config, tmp_path / "run", images=images)
    assert images[1].errors == [30.0] and (result.best_epoch, result.test_error) == (2, 40.0)
    said = capsys.readouterr().err
    assert "stopped after epoch 4: the error on the test images has not become smaller since epoch 2" in said
    assert RunFolder(tmp_path / "run").is_finished


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    fit(small(1), run, quiet=True)
    assert main(["train", str(run)]) == 2
    assert "finished run of 1 epochs: go on with --resume --epochs MORE" in capsys.readouterr().err
    assert main(["train", str(run), "--resume"]) == 2
    assert main(["train", str(run), "--resume", "--epochs", "3"]) == 0
    said = capsys.readouterr().err
    assert "goes on with epoch 2 of 3, at the learning rate that 3 epochs have there: 0.025, to 0 at the end" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[1]["lr"] == pytest.approx(0.025)
    assert json.loads((run / "result.json").read_text())["config"]["optim"]["epochs"] == 3
    assert main(["train", str(run), "--resume", "--epochs", "4", "--lr", "0.5"]) == 2
    assert "optim.lr: 0.1 -> 0.5" in capsys.readouterr().err


def test_a_hint_is_a_command_that_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, network = tmp_path / "it's mine", tmp_path / "network.py"
    fit(replace(small(1), model=ModelConfig(eventful_resnet(network))), run, quiet=True)
    eventful_resnet(network, event="raise KeyboardInterrupt")
    assert main(["train", str(run), "--resume", "--epochs", "2", "--quiet"]) == 130
    quoted = "'" + str(run).replace("'", "'\"'\"'") + "'"
    assert f"`localgrad train {quoted} --resume`" in capsys.readouterr().err


def test_tensorboard_is_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "digits-dgl", "--tensorboard", "--run-dir", str(tmp_path / "run")]) == 2
    assert "pip install 'localgrad[tensorboard]'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_time_of_a_run_is_predicted_and_a_shorter_one_proposed() -> None:
    assert prediction(0.5, 100, 10, on_cpu=True) == "about 8 min to the end, at 0.5 s a step (evaluation aside)"
    long = prediction(0.5, 400, 400, on_cpu=True)
    assert long.startswith("about 22.2 h to the end") and long.endswith("; a shorter run: --epochs 9, about 30 min")
    assert "shorter" not in prediction(0.5, 400, 400, on_cpu=False)
    assert [duration(seconds) for seconds in (3, 89, 91, 5000, 9000)] == ["3 s", "89 s", "2 min", "83 min", "2.5 h"]


def test_a_run_says_what_it_does_and_how_long_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small(100_000, patience=1), tmp_path / "long")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading the images of digits"
    assert "building and cutting cifar_resnet for 10 classes" in lines
    predicted = re.compile(r"\d (s|min|h) .* at [\d.e-]+ s ")
    assert sum(bool(predicted.search(line)) for line in lines) == 1
    fit(small(3), tmp_path / "short")
    assert not predicted.search(capsys.readouterr().err)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_epoch_step_and_time_left(terminal: bool) -> None:
    file = io.StringIO()
    display = Display(console=Console(file=file, force_terminal=terminal, width=90))
    left = "40 s left of the epoch, 3.2 h of the run"
    with display:
        display.step(epoch="3/400", done=12, total=390, losses=[1.5, 1.2], images_per_second=210.0, left=left)
    said = file.getvalue()
    assert "3/400" in said and "12/390" in said and "1.50 1.20" in said and left in said


def test_too_many_threads_are_said() -> None:
    assert crowded(1, 1, 9.0) is None and crowded(4, 8, 1.0) is None
    assert "uses 8 threads on 2 core(s)" in str(crowded(8, 2, 0.0))
    assert "is busy (load 6.0 on 8 cores) and PyTorch uses 8 threads: OMP_NUM_THREADS=2" in str(crowded(8, 8, 6.0))
