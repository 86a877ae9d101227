"""Step times: trainings take turns, and what is measured is a step of the trainer that changes no weight."""

import itertools
import json
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.networks import eventful_resnet
from localgrad.commands.main import main
from localgrad.config.methods import with_defaults
from localgrad.config.saved import to_dict
from localgrad.config.schema import ModelConfig, TrainConfig
from localgrad.data.fingerprint import Fingerprint
from localgrad.errors import LocalGradError
from localgrad.recipes import recipe
from localgrad.results import step_times as timing
from localgrad.results.step_times import endless_batches, take_turns, timed_step
from localgrad.runs.result import Result, as_file

MAN = with_defaults(recipe("digits-dgl-man").config)
MAN = replace(
    MAN,
    model=ModelConfig(depth=8),
    cuts=("layer1.0",),
    data=replace(MAN.data, image_size=8, padding=1),
    optim=replace(MAN.optim, batch_size=4, epochs=2),
)
END_TO_END = with_defaults(
    replace(
        MAN, name="digits-e2e", cuts=(), objective=type(MAN.objective)(), momentum=type(MAN.momentum)(), recompute=True
    )
)


def _finished(path: Path, config: TrainConfig, **added: Any) -> None:
    """A result file as `train` leaves it; with fields that its config has besides."""
    result = Result(
        config=config,
        test_error=5.0,
        best_test_error=5.0,
        best_epoch=1,
        local_errors=None,
        cuts=list(config.cuts or ()),
        num_blocks=len(config.cuts or ()) + 1,
        parameters={"backbone": 1000, "auxiliary": 0, "trainable": 1000},
        peak_memory_bytes=2**20,
        seconds_per_step=123.0,
        wall_seconds=1.0,
        device="a processor",
        precision="32-true",
        versions={},
        commit=None,
    )
    values = as_file("run", result)
    values["config"] = {**to_dict(config), **added}
    path.write_text(json.dumps(values))


def test_steps_take_turns_and_the_first_three_rounds_do_not_count() -> None:
    now, order = [0.0], []

    def step(name: str, seconds: list[float]) -> Any:
        def run() -> None:
            order.append(name)
            now[0] += seconds.pop(0)

        return run

    steps = {"a": step("a", [100.0, 50.0, 8.0, 1.0, 3.0]), "b": step("b", [9.0, 9.0, 9.0, 2.0, 2.5])}
    seconds = take_turns(steps, 2, clock=lambda: now[0])
    assert order == ["a", "b"] * 5
    assert seconds["a"] == pytest.approx([1.0, 3.0])
    assert seconds["b"] == pytest.approx([2.0, 2.5])


def test_a_ratio_is_that_of_the_same_round() -> None:
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_a_timed_step_is_one_of_the_trainer_and_moves_no_trained_weight() -> None:
    sizes: list[int] = []
    with ExitStack() as held:
        step, run = timed_step(replace(MAN, data=replace(MAN.data, train_limit=10)), held)
        run.model.get_submodule("conv1").register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        before = {name: value.clone() for name, value in run.model.named_parameters()}
        losses = [step() for _ in range(5)]
    assert sizes == [4] * 5  # of ten images, two in a batch that is left out
    assert all(isinstance(each, torch.Tensor) and each.shape == (2,) and bool((each > 0).all()) for each in losses)
    buffers = [state["momentum_buffer"] for optimizer in run.optimizers for state in optimizer.state.values()]
    assert len(buffers) == sum(len(block.trainable_parameters()) for block in run.blocks)
    assert all(bool(buffer.any()) for buffer in buffers)
    assert all(torch.equal(before[name], value) for name, value in run.model.named_parameters())


def test_a_set_smaller_than_the_batches_that_are_wanted_is_taken_whole() -> None:
    with ExitStack() as held:
        whole = replace(END_TO_END, optim=replace(MAN.optim, batch_size=1024))
        _, run = timed_step(whole, held)
        assert len(run.train) == 1437
        assert [len(batch[0]) for batch in itertools.islice(endless_batches(run, channels_last=True), 2)] == [1024] * 2
        limited = replace(END_TO_END, data=replace(MAN.data, train_limit=7), optim=replace(MAN.optim, batch_size=1024))
        _, run = timed_step(limited, held)
        assert [len(batch[0]) for batch in itertools.islice(endless_batches(run, channels_last=True), 2)] == [7] * 2


def test_time_measures_each_kind_of_step_once_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _finished(tmp_path / "man.json", MAN)
    _finished(tmp_path / "man-1.json", replace(MAN, seed=1))
    _finished(tmp_path / "longer.json", replace(MAN, optim=replace(MAN.optim, epochs=9, lr=0.5)))
    _finished(tmp_path / "whole.json", END_TO_END)
    _finished(tmp_path / "two.json", replace(MAN, devices=2, seed=2, optim=replace(MAN.optim, weight_decay=0.5)))
    _finished(tmp_path / "later.json", replace(MAN, seed=3), invented=1)
    output = tmp_path / "times.json"
    assert main(["time", str(tmp_path), "--rounds", "3", "--accelerator", "cpu", "-o", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"wrote {output}"
    *errors, device = said.err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("localgrad: left out: ") for line in errors)
    assert device.startswith("localgrad: timed on ")
    assert "while runs are of a processor: the report takes times for runs of the same device only" in device
    assert any("two.json is a run on 2 devices" in line for line in errors)
    assert any("later.json" in line and "invented" in line for line in errors)

    found = json.loads(output.read_text())
    whole, man = found["rows"]
    assert (whole["row"], man["row"]) == ("End-to-end (checkpointed)", "DGL + MAN, 2 blocks")
    assert (whole["num_blocks"], man["num_blocks"]) == (1, 2)
    assert whole["config"] == to_dict(END_TO_END)
    assert {*found["seconds"]} == {whole["row"], man["row"]}
    for row in (whole, man):
        times = found["seconds"][row["row"]]
        assert len(times) == 3
        assert row["seconds_per_step"] == statistics.median(times)
    pairs = zip(found["seconds"][man["row"]], found["seconds"][whole["row"]], strict=True)
    assert man["ratio_to_first"] == statistics.median(a / b for a, b in pairs)
    assert f"{man['ratio_to_first']:.2f}" in said.out
    assert "thread(s)" in found["device"]
    assert found["settings"] == {"network": "Digits, ResNet-8", "batch_size": 4, "rounds": 3}
    assert said.out.startswith(f"Digits, ResNet-8, batch size 4, median of 3 rounds, on {found['device']}\n")


def test_rows_of_several_networks_and_batches_are_told_apart(tmp_path: Path) -> None:
    deeper = replace(END_TO_END, model=ModelConfig(depth=14))
    _finished(tmp_path / "shallow.json", END_TO_END)
    _finished(tmp_path / "deep.json", deeper)
    _finished(tmp_path / "large.json", replace(deeper, optim=replace(deeper.optim, batch_size=8)))
    _finished(tmp_path / "adam.json", replace(deeper, optim=replace(deeper.optim, name="adamw", nesterov=False)))
    said: list[str] = []
    found = timing.time_results(tmp_path, rounds=1, accelerator="cpu", warn=said.append)
    assert [text.partition(" on ")[0] for text in said] == ["timed"]
    assert [row.row for row in found.rows] == [
        "Digits, ResNet-14, End-to-end (checkpointed), data.image_size 8, optim.name adamw, optim.nesterov False, "
        "batch size 4",
        "Digits, ResNet-14, End-to-end (checkpointed), data.image_size 8, batch size 4",
        "Digits, ResNet-14, End-to-end (checkpointed), batch size 8",
        "Digits, ResNet-8, End-to-end (checkpointed), batch size 4",
    ]
    assert found.settings == {"network": None, "batch_size": None, "rounds": 1}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rounds", "0"], "rounds is 0; give 1 or more"),
        (["--data", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
        (["--accelerator", "abacus"], "abacus"),
        (["--output", "no/such/folder/times.json"], "no/such/folder/times.json cannot be a file"),
        (["--output", "."], ". cannot be a file"),
    ],
)
def test_what_cannot_be_timed_is_said_in_a_line(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _finished(tmp_path / "whole.json", END_TO_END)
    assert main(["time", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert all(line.startswith(("localgrad: ", "  ")) for line in said.splitlines())
    assert reason in said
    assert not (tmp_path / "step-times.json").exists()


def test_a_folder_without_a_run_that_can_be_timed_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _finished(tmp_path / "two.json", replace(MAN, devices=2))
    assert main(["time", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("has no finished run that can be timed here")


def test_a_run_that_cannot_be_timed_does_not_keep_the_others_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _finished(tmp_path / "whole.json", END_TO_END)
    gone = replace(END_TO_END, data=replace(MAN.data, source="no/such/folder/anywhere"), step_each_block=True)
    _finished(tmp_path / "gone.json", gone)
    assert main(["time", str(tmp_path), "--rounds", "1"]) == 0
    said = capsys.readouterr()
    assert f"localgrad: left out: {tmp_path / 'gone.json'}: --data 'no/such/folder/anywhere'" in said.err
    assert [row["row"] for row in json.loads((tmp_path / "step-times.json").read_text())["rows"]] == [
        "Digits, ResNet-8, End-to-end (checkpointed)"
    ]


def test_steps_of_other_sizes_are_other_rows_and_need_images_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in (20, 40):
        config = replace(END_TO_END, optim=replace(MAN.optim, batch_size=512))
        _finished(tmp_path / f"{limit}.json", replace(config, data=replace(MAN.data, train_limit=limit)))
    found = timing.time_results(tmp_path, rounds=1, warn=lambda text: None)
    assert [row.row for row in found.rows] == [f"End-to-end (checkpointed), batch size {size}" for size in (20, 40)]
    _few_classes(tmp_path / "few")
    assert main(["time", str(tmp_path), "--rounds", "1", "--data", str(tmp_path / "few")]) == 0
    said = capsys.readouterr().err
    assert f"40.json: a step takes 40 images, and {tmp_path / 'few'} has 24: give --data with more" in said
    (row,) = json.loads((tmp_path / "step-times.json").read_text())["rows"]
    assert row["num_classes"] == 2
    assert row["config"]["data"]["train_limit"] == 20


def _few_classes(folder: Path) -> None:
    """Two classes of twelve training images each."""
    for split, count in (("train", 12), ("test", 1)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / split / label / f"{number}.png")


def test_images_that_a_run_streams_are_in_memory_before_they_are_timed(tmp_path: Path) -> None:
    _few_classes(tmp_path / "few")
    images = replace(
        MAN.data, source=str(tmp_path / "few"), streaming=True, workers=2, crop="resized", resize=8, image_size=8
    )
    with ExitStack() as held:
        _, run = timed_step(replace(END_TO_END, data=images), held)
        assert not run.train.config.streaming
        assert next(endless_batches(run, channels_last=True))[0].shape == (4, 3, 8, 8)


def test_networks_that_do_not_fit_together_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = "raise torch.OutOfMemoryError('tried to allocate 2 GiB')"
    network = eventful_resnet(tmp_path / "network.py", step=1, event=full)
    _finished(tmp_path / "whole.json", replace(END_TO_END, model=ModelConfig(network)))
    assert main(["time", str(tmp_path), "--accelerator", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "do not fit into the memory together (" in said and "tried to allocate 2 GiB" in said


def test_images_that_are_not_those_of_the_run_are_refused() -> None:
    trained = Fingerprint("train", 40, 10, "abc")
    run: Any = SimpleNamespace(
        train=SimpleNamespace(fingerprint=replace(trained, checksum="def")),
        config=SimpleNamespace(data=SimpleNamespace(source="elsewhere")),
    )
    row = SimpleNamespace(runs=[SimpleNamespace(result=SimpleNamespace(train_images=trained))])
    training: Any = SimpleNamespace(row=row, images=4)
    with pytest.raises(LocalGradError, match=r"other images than those of elsewhere.*--data"):
        timing._check_images(training, run, other=False)
    run.train.fingerprint = replace(trained, split="training")
    timing._check_images(training, run, other=False)  # the same images under another split's name
