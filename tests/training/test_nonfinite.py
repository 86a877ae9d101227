"""What is not finite stops a run before any weight changes, or costs one batch; what does not fit says what would."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import eventful_resnet
from helpers.runs import (
    LOCAL,
    assert_same_run,
    equal,
    everything,
    read_metrics,
    spoil_gradient,
    weights,
)
from helpers.training import CrashError, crash, eventful, spoil
from localgrad import dgl, local_step, plan, split
from localgrad.commands.main import main
from localgrad.config.checks import validate
from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.core.explain import OutOfMemoryError
from localgrad.core.step import local_gradients
from localgrad.data import config as data
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.runs.folder import RunFolder
from localgrad.training.build import build_run
from localgrad.training.memory_advice import memory_advice
from localgrad.training.nonfinite import gradient_norms
from localgrad.training.run import Run
from localgrad.training.step import train_step
from localgrad.training.trainer import epoch_batches, fit, train

SKIP = replace(LOCAL, on_nonfinite="skip", max_skips=2)  # 4 batches an epoch, 2 epochs


def spoiled(config: TrainConfig, *steps: int) -> tuple[ImageSet, ImageSet]:
    """A config's images, with infinite ones in the batches of these steps."""
    return eventful(config, dict.fromkeys(steps, spoil))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, value: float, clip_norm: float | None
) -> None:
    run = build_run(replace(LOCAL, optim=replace(LOCAL.optim, clip_norm=clip_norm)))
    spoil_gradient(run, value)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    message = (
        r"the gradient norm of block 2 of 3 \(layer2\.0 to layer2\.0\) is (nan|inf) at epoch 1, step 1, "
        r"learning rate 0\.01, in batch 1 of the epoch; all weights were left"
    )
    with pytest.raises(LocalGradError, match=message):
        train_step(run, *next(iter(epoch_batches(run))))
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not any(optimizer.state for optimizer in run.optimizers)


def test_the_norms_are_those_of_the_gradients(tmp_path: Path) -> None:
    run = build_run(LOCAL)
    local_gradients(run.blocks, *next(iter(epoch_batches(run))))
    norms = gradient_norms(run.blocks, torch.zeros(3))
    for block, norm in zip(run.blocks, norms, strict=True):
        squares = [p.grad.double().square().sum() for p in block.trainable_parameters() if p.grad is not None]
        assert float(norm) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_batch_leaves_no_trace(tmp_path: Path, how: str) -> None:
    """Weights, EMA, running statistics and optimizers of all blocks stay, those of blocks without a problem too."""
    run = build_run(SKIP)
    inputs, targets = next(iter(epoch_batches(run)))
    train_step(run, inputs, targets)
    before = everything(run)
    if how == "gradient":
        spoil_gradient(run, float("nan"))
    bad = inputs.clone()
    bad[0, 0, 0, 0] = float("inf") if how == "loss" else 0.0
    losses = train_step(run, bad, targets)
    assert equal(everything(run), before)
    assert not run.check.if_allowed(torch.ones_like(losses)).any()
    assert (run.state.skipped, run.state.skipped_in_a_row) == (1, 1)


def test_skipped_batches_are_counted_and_left_out_of_the_loss(tmp_path: Path) -> None:
    result = fit(SKIP, tmp_path / "run", quiet=True, images=spoiled(SKIP, 2, 3, 6))
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [2, 3]
    assert [line["step"] for line in lines] == [4, 8]
    assert result.skipped == json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 3
    assert all(0 < loss < 100 for line in lines for loss in line["train_loss"])
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_without_a_bad_batch_skip_changes_no_bit(tmp_path: Path) -> None:
    fit(LOCAL, tmp_path / "stop", quiet=True)
    fit(SKIP, tmp_path / "skip", quiet=True)
    stopped, skipped = weights(tmp_path / "stop"), weights(tmp_path / "skip")
    assert all(torch.equal(value, skipped[name]) for name, value in stopped.items())


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match=r"loss of block 1 of 3.*step 6.*after 2 batches in a row were skipped"):
        fit(SKIP, tmp_path, quiet=True, images=spoiled(SKIP, 2, 4, 5, 6))
    saved = torch.load(tmp_path / "checkpoint.pt")["state"]
    assert (saved["skipped"], saved["skipped_in_a_row"]) == (2, 1), "of the end of the first epoch"


def test_an_epoch_of_skipped_batches_has_no_loss(tmp_path: Path) -> None:
    fit(replace(SKIP, max_skips=4), tmp_path, images=spoiled(SKIP, 1, 2, 3, 4))
    assert [line["train_loss"] is None for line in read_metrics(tmp_path)] == [True, False]


def test_a_resumed_run_remembers_what_it_skipped(tmp_path: Path) -> None:
    config = replace(SKIP, checkpoint_every=3)
    fit(config, tmp_path / "straight", quiet=True, images=spoiled(config, 3, 6))
    bad = dict.fromkeys((3, 6), spoil)
    with pytest.raises(CrashError):
        fit(config, tmp_path / "run", quiet=True, images=eventful(config, bad, evaluation={1: crash}))
    fit(config, tmp_path / "run", resume=True, quiet=True, images=spoiled(config, 3, 6))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("changes", [{"on_nonfinite": "ignore"}, {"max_skips": 0}, {"keep_checkpoints": 0}])
def test_wrong_settings(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(LocalGradError, match=f"{name} is "):
        validate(replace(LOCAL, **changes))


# Out of memory


class _Greedy(nn.Module):
    """What a CUDA allocator says, on demand."""

    def forward(self, features: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8")


def _greedy(run: Run) -> None:
    run.blocks[1].body.append(_Greedy())


def test_out_of_memory_names_the_block_and_is_torchs_error_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    blocks = split(model, torch.empty(2, 3, 8, 8), num_blocks=1)
    blocks[0].body.append(_Greedy())
    message = (
        r"block 1 of 1 \(0 to 3\) does not fit into memory with 2 samples \(CUDA out of memory. Tried .* 2.00 GiB\)"
    )
    for kind in (LocalGradError, torch.OutOfMemoryError, OutOfMemoryError):
        with pytest.raises(kind, match=message):
            local_step(blocks, [torch.optim.SGD(model.parameters())], torch.zeros(2, 3, 8, 8), torch.zeros(2).long())


def test_a_run_out_of_memory_says_what_plan_would_do(tmp_path: Path) -> None:
    config = replace(LOCAL, cuts=("layer2.0", "layer3.0"), momentum=replace(LOCAL.momentum, name="none"))
    message = (
        r"^block 2 of 3 \(layer3\.0 to layer3\.0\) .* 16 samples .*"
        r"`localgrad plan` predicts [\d.]+ MiB for a float32 step of 3 block\(s\) and 16 images, "
        r"[\d.]+ MiB with \d blocks: "
        r"--cuts layer1\.0[^;]*; fewer images at once, as --optim\.accumulate 2, would take less too$"
    )
    run = build_run(config)
    _greedy(run)
    with pytest.raises(LocalGradError, match=message) as raised:
        train(run, RunFolder(tmp_path), quiet=True)
    assert "\n" not in str(raised.value)


def _cuts_of(advice: str) -> list[str]:
    return advice.partition("--cuts ")[2].partition(";")[0].split()


@pytest.mark.parametrize("objective", ["none", "dgl"])
def test_the_suggested_cuts_take_less(objective: str) -> None:
    config = replace(
        LOCAL,
        data=replace(data.digits(), image_size=32),
        cuts=(),
        objective=ObjectiveConfig(objective),
        momentum=replace(LOCAL.momentum, name="none"),
        optim=replace(LOCAL.optim, batch_size=64),
    )
    advice = memory_advice(config, 10, [])
    cuts = _cuts_of(advice)
    rows = plan(cifar_resnet(8), torch.empty(64, 3, 32, 32, device="meta"), objective=dgl(10))
    least = min((row for row in rows if not row.recompute), key=lambda row: row.peak)
    assert tuple(cuts) == least.cuts, advice
    assert ("--objective.name dgl" in advice) == (objective == "none")
    again = memory_advice(replace(config, cuts=tuple(cuts), objective=ObjectiveConfig("dgl")), 10, cuts)
    assert "no other cuts take less" in again
    roomy = memory_advice(config, 10, [], capacity=2**40)
    assert len(_cuts_of(roomy)) == 1, "with room for it, the fewest blocks"


def test_a_network_that_cannot_be_made_without_values_gets_advice_too() -> None:
    """RegNets compute their widths with tensors."""
    images = replace(data.digits(), image_size=32)
    config = replace(LOCAL, data=images, model=ModelConfig("torchvision:regnet_y_400mf"), cuts=())
    advice = memory_advice(replace(config, momentum=MomentumConfig()), 10, [])
    assert re.search(r"predicts [\d.]+ [KMG]iB ", advice)
    assert _cuts_of(advice)


def test_on_the_command_line_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
    network = eventful_resnet(tmp_path / "network.py", step=2, event=full, unit="layer3[0].conv1")
    small = "--data.image-size 8 --data.padding 1 --data.train-limit 40 --data.test-limit 20 --optim.batch-size 20"
    flags = ["--model.name", network, "--cuts", "layer2.0", "--momentum.name", "none", *small.split()]
    assert main(["train", "digits-dgl", "--run-dir", str(tmp_path / "run"), "--quiet", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("localgrad: block 2 of 2 ")
    assert said.count("\n") == 1
