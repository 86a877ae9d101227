"""Training end to end on tiny networks: exact, resumable, and honest about what it did."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.runs import LOCAL, NORM_FREE, assert_same_run, read_metrics, weights
from helpers.training import CrashError, crash, eventful, interrupt, terminate
from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.data.loading import load_images
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.planning.measure import measure_peak
from localgrad.results import evaluation
from localgrad.training import devices, trainer
from localgrad.training.build import build_run
from localgrad.training.devices import make_fabric, resolve_precision
from localgrad.training.error_rates import error_rates
from localgrad.training.schedule import learning_rate
from localgrad.training.step import train_step
from localgrad.training.trainer import epoch_batches, fit

END_TO_END = replace(LOCAL, cuts=(), objective=ObjectiveConfig(), momentum=MomentumConfig())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    fit(LOCAL, run_dir, quiet=True)
    return run_dir


# What a run leaves


def test_the_result_says_what_was_done(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    metrics = read_metrics(straight)
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert [line["step"] for line in metrics] == [4, 8], "50 images in batches of 16: the last one of 2 is kept"
    assert [line["lr"] for line in metrics] == pytest.approx([0.01, 0.0])
    assert all(len(line["train_loss"]) == 3 for line in metrics)
    assert result["test_error"] == metrics[-1]["test_error"]
    assert result["best_test_error"] == min(line["test_error"] for line in metrics)
    assert metrics[result["best_epoch"] - 1]["test_error"] == result["best_test_error"]
    assert result["num_blocks"] == 3
    assert result["cuts"] == ["layer1.0", "layer2.0"]
    assert result["config"]["momentum"]["form"] == "sum", "options left out are written out"
    assert result["peak_memory_bytes"] == metrics[0]["peak_memory_bytes"] > 0
    assert result["wall_seconds"] >= metrics[-1]["elapsed_seconds"] > 0
    assert result["seconds_per_step"] == metrics[-1]["seconds_per_step"] > 0
    assert result["local_errors"] is None


def test_the_peak_is_that_of_a_step_whose_optimizers_have_their_state(straight: Path, tmp_path: Path) -> None:
    run = build_run(LOCAL)
    first, second, *_ = epoch_batches(run)
    _, starting = measure_peak(lambda: train_step(run, *first))
    _, steady = measure_peak(lambda: train_step(run, *second))
    assert json.loads((straight / "result.json").read_text())["peak_memory_bytes"] == steady < starting


def test_parameters_are_counted_once(straight: Path) -> None:
    counted = json.loads((straight / "result.json").read_text())["parameters"]
    checkpoint = torch.load(straight / "checkpoint.pt", weights_only=True)
    auxiliary = [
        value.numel()
        for block in checkpoint["auxiliary"]
        for name, value in block.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    frozen = sum(p.numel() for unit in ("layer2", "layer3") for p in getattr(cifar_resnet(8), unit).parameters())
    assert counted["backbone"] == sum(p.numel() for p in cifar_resnet(8).parameters())
    assert counted["auxiliary"] == sum(auxiliary)
    assert counted["trainable"] == counted["backbone"] + counted["auxiliary"] - frozen


def test_weights_are_under_the_models_own_names(straight: Path) -> None:
    assert weights(straight).keys() == cifar_resnet(8).state_dict().keys()


def test_the_last_weights_give_the_error_that_is_reported(straight: Path) -> None:
    model = cifar_resnet(8)
    model.load_state_dict(weights(straight))
    _, test = load_images(LOCAL.data)
    (inputs, targets), *_ = list(test.batches(len(test), train=False))
    wrong = (model.eval()(inputs).argmax(1) != targets).float().mean()
    assert read_metrics(straight)[-1]["test_error"] == pytest.approx(100 * float(wrong))


# Exactness


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(straight: Path, tmp_path: Path) -> None:
    fit(LOCAL, tmp_path / "same", quiet=True)
    assert_same_run(straight, tmp_path / "same")
    fit(replace(LOCAL, seed=1), tmp_path / "other", quiet=True)
    assert not torch.equal(weights(straight)["fc.weight"], weights(tmp_path / "other")["fc.weight"])


def test_what_was_drawn_before_does_not_matter(straight: Path, tmp_path: Path) -> None:
    torch.rand(7)
    with ThreadPoolExecutor() as pool:  # also: not in the main thread, where no signal handler can be set
        pool.submit(fit, LOCAL, tmp_path / "run", quiet=True).result()
    assert_same_run(straight, tmp_path / "run")


def test_end_to_end_is_an_ordinary_training_loop(tmp_path: Path) -> None:
    fit(replace(END_TO_END, channels_last=False), tmp_path / "run", quiet=True)
    torch.manual_seed(0)
    model = cifar_resnet(8, num_classes=10)
    train, _ = load_images(LOCAL.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, epochs=2, peak=0.1, warmup_epochs=1)
        for inputs, targets in train.batches(16, train=True, seed=0, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    trained = weights(tmp_path / "run")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_the_backbone_starts_the_same_under_every_method(tmp_path: Path) -> None:
    starts = [build_run(config).model.state_dict() for config in (LOCAL, END_TO_END)]
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


# Interrupted and resumed


@pytest.mark.parametrize("step", [1, 2, 4, 7, 8])
def test_an_interrupted_run_resumes_to_the_same_bits(straight: Path, tmp_path: Path, step: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"epoch [12] .* {step};"):
        fit(LOCAL, tmp_path, quiet=True, images=eventful(LOCAL, {step: interrupt}))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "result.json").exists()
    fit(LOCAL, tmp_path, resume=True, quiet=True)
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize("checkpoint_every", [0, 3])
def test_a_crashed_run_resumes_from_its_last_checkpoint(tmp_path: Path, checkpoint_every: int) -> None:
    config = replace(LOCAL, checkpoint_every=checkpoint_every)
    fit(config, tmp_path / "straight", quiet=True)
    with pytest.raises(CrashError):
        fit(config, tmp_path / "run", quiet=True, images=eventful(config, {7: crash}))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    assert saved["step"] == (6 if checkpoint_every else 4)
    fit(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_failure_between_metrics_and_checkpoint_repeats_no_line(straight: Path, tmp_path: Path) -> None:
    """A folder in the place of the checkpoint's temporary file stands for a disk that fails there."""
    obstacle = tmp_path / f".checkpoint.pt.{os.getpid()}.tmp"
    images = eventful(LOCAL, {}, evaluation={1: lambda inputs: obstacle.mkdir()})
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt"):
        fit(LOCAL, tmp_path, quiet=True, images=images)
    assert len(read_metrics(tmp_path)) == 1 and not (tmp_path / "checkpoint.pt").exists()
    obstacle.rmdir()
    fit(LOCAL, tmp_path, resume=True, quiet=True)
    assert_same_run(straight, tmp_path)


def test_a_failure_after_the_last_epoch_loses_only_the_result(straight: Path, tmp_path: Path) -> None:
    obstacle = tmp_path / "model.safetensors"
    images = eventful(LOCAL, {8: lambda inputs: obstacle.mkdir()})
    with pytest.raises(LocalGradError, match=obstacle.name):
        fit(LOCAL, tmp_path, quiet=True, images=images)
    assert not (tmp_path / "result.json").exists()
    obstacle.rmdir()
    result = fit(LOCAL, tmp_path, resume=True, quiet=True)
    assert result.test_error == read_metrics(straight)[-1]["test_error"]
    assert_same_run(straight, tmp_path)


def test_adamw_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = replace(LOCAL, optim=replace(LOCAL.optim, name="adamw", nesterov=False, lr=1e-3))
    fit(config, tmp_path / "straight", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "resumed", quiet=True, images=eventful(config, {3: terminate}))
    fit(config, tmp_path / "resumed", resume=True, quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    moments = torch.load(tmp_path / "resumed" / "checkpoint.pt", weights_only=True)["optimizers"][0]["state"][0]
    assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_second_interrupt_acts_at_once(tmp_path: Path) -> None:
    def twice(inputs: Tensor) -> None:
        interrupt(inputs)
        interrupt(inputs)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        fit(LOCAL, tmp_path, quiet=True, images=eventful(LOCAL, {2: twice}))


def test_dropout_draws_the_same_after_a_resume(tmp_path: Path) -> None:
    config = replace(END_TO_END, model=ModelConfig("helpers.networks:with_dropout"), channels_last=False)
    fit(config, tmp_path / "straight", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "run", quiet=True, images=eventful(config, {3: terminate}))
    torch.rand(3)
    fit(config, tmp_path / "run", resume=True, quiet=True)
    assert_same_run(tmp_path / "straight", tmp_path / "run")


# A checkpoint that does not fit


def _damage(run_dir: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    change(saved)
    torch.save(saved, run_dir / "checkpoint.pt")
    (run_dir / "result.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"].pop("epoch"), "not a checkpoint of this version"),
        (lambda saved: saved.pop("state"), "not a checkpoint of this version"),
        (lambda saved: saved["model"].pop("fc.weight"), "belongs to another model"),
        (lambda saved: saved["auxiliary"][0].popitem(), "belongs to another model"),
        (lambda saved: saved["auxiliary"].pop(), "belongs to another model"),
        (lambda saved: saved["optimizers"][0]["param_groups"][0]["params"].pop(), "belongs to another model"),
        (lambda saved: saved.pop("optimizers"), "belongs to another model"),
    ],
)
def test_a_checkpoint_of_another_model_or_version(
    straight: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    for path in straight.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    _damage(tmp_path, change)
    with pytest.raises(LocalGradError, match=message):
        fit(LOCAL, tmp_path, resume=True, quiet=True)


# One step


def _stepped(config: TrainConfig) -> tuple[Tensor, list[list[Tensor]]]:
    """Losses of the first step, and the gradients that each block's optimizer steps with."""
    run, gradients = build_run(config), list[list[Tensor]]()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    for optimizer in run.optimizers:
        optimizer.register_step_pre_hook(look)
    return train_step(run, *next(iter(epoch_batches(run)))), gradients


def test_accumulated_parts_give_the_gradients_of_the_whole_batch() -> None:
    whole, parts = (
        _stepped(replace(NORM_FREE, optim=replace(LOCAL.optim, accumulate=accumulate))) for accumulate in (1, 3)
    )
    assert len(whole[1]) == 2
    torch.testing.assert_close(parts, whole)


def test_each_block_is_clipped_alone() -> None:
    def norms(clip_norm: float | None) -> list[float]:
        _, gradients = _stepped(replace(LOCAL, optim=replace(LOCAL.optim, clip_norm=clip_norm)))
        return [float(torch.stack([g.norm() for g in block]).norm()) for block in gradients]

    free = norms(None)
    limit = sorted(free)[1] * 0.999
    assert min(free) < limit < max(free)
    assert norms(limit) == pytest.approx([min(norm, limit) for norm in free], rel=1e-4)


def test_label_smoothing_is_for_the_last_block_only(tmp_path: Path) -> None:
    losses = []
    for smoothing in (0.0, 0.2):
        config = replace(LOCAL, optim=replace(LOCAL.optim, label_smoothing=smoothing))
        run = build_run(config)
        losses.append(train_step(run, *next(iter(epoch_batches(run)))))
    assert torch.equal(losses[0][:-1], losses[1][:-1])
    assert losses[0][-1] != losses[1][-1]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    run = build_run(LOCAL)
    inputs, targets = next(iter(epoch_batches(run)))
    nn.init.constant_(run.blocks[1].trainable_parameters()[0], float("inf"))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    message = r"loss .*block 2 of 3 \(layer2\.0 to layer2\.0\) .*nan .* 0\.01"
    with pytest.raises(LocalGradError, match=message):
        train_step(run, inputs, targets)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


def test_stepping_each_block_at_once_stops_at_the_block_whose_loss_is_not_finite(tmp_path: Path) -> None:
    run = build_run(replace(LOCAL, step_each_block=True))
    inputs, targets = next(iter(epoch_batches(run)))
    nn.init.constant_(run.blocks[1].trainable_parameters()[0], float("inf"))
    before = [[p.clone() for p in block.trainable_parameters()] for block in run.blocks]
    message = r"block 2 of 3 .* nan .* its weights .*, those of the blocks before it were not"
    with pytest.raises(LocalGradError, match=message):
        train_step(run, inputs, targets)
    same = [all(map(torch.equal, b.trainable_parameters(), w)) for b, w in zip(run.blocks, before, strict=True)]
    assert same == [False, True, True]
    assert all(parameter.grad is None for block in run.blocks for parameter in block.parameters())


def test_stepping_each_block_at_once_trains_the_same_weights(tmp_path: Path) -> None:
    clipped = replace(LOCAL, optim=replace(LOCAL.optim, clip_norm=0.5, epochs=1))
    for step_each_block in (False, True):
        fit(replace(clipped, step_each_block=step_each_block), tmp_path / str(step_each_block), quiet=True)
    ours, others = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    assert read_metrics(tmp_path / "False")[0]["train_loss"] == read_metrics(tmp_path / "True")[0]["train_loss"]


def test_a_diverging_run_ends_with_that_error(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match=r"try a lower --optim\.lr"):
        fit(replace(LOCAL, optim=replace(LOCAL.optim, lr=1e30, warmup_epochs=0)), tmp_path, quiet=True)


def test_a_part_of_one_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match=r"accumulate 2 with batches of \[16, 2\] images leaves a micro-batch"):
        fit(replace(LOCAL, optim=replace(LOCAL.optim, accumulate=2)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is checked"


# Evaluation


def test_every_second_epoch_is_evaluated_and_the_last(tmp_path: Path) -> None:
    config = replace(LOCAL, evaluate_every=2, local_heads=True, optim=replace(LOCAL.optim, epochs=3))
    result = fit(config, tmp_path, quiet=True)
    assert [line["test_error"] is None for line in read_metrics(tmp_path)] == [True, False, False]
    assert result.local_errors == read_metrics(tmp_path)[-1]["local_errors"]
    assert result.local_errors is not None
    assert result.local_errors[-1] == result.test_error, "the last block's own head is the network's"
    found = evaluation.evaluate(tmp_path, local_heads=True, accelerator="cpu")
    assert (found.test_error, found.local_errors, found.images) == (result.test_error, result.local_errors, 40)
    assert evaluation.evaluate(tmp_path, accelerator="cpu").local_errors is None


def test_local_heads_are_the_blocks_own(tmp_path: Path) -> None:
    run = build_run(replace(LOCAL, local_heads=True, momentum=MomentumConfig()))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    _, errors = error_rates(run.fabric, run.model, run.blocks, run.test, batch_size=16)
    assert all(module.training for block in run.blocks for module in block.modules()), "training mode comes back"
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items()), "BatchNorm's too"
    run.model.eval()
    (inputs, targets), *_ = list(run.test.batches(len(run.test), train=False))
    first: Any = run.blocks[0].eval()
    scores = first.objective.classifier(first.body(inputs))
    assert errors is not None
    assert errors[0] == pytest.approx(100 * float((scores.argmax(1) != targets).float().mean()))


def test_a_block_without_a_class_head_has_no_error(tmp_path: Path) -> None:
    contrast = ObjectiveConfig(name="infopro", loss="contrast", task=(1.0, 1.0))
    run = build_run(replace(LOCAL, local_heads=True, objective=contrast))
    _, errors = error_rates(run.fabric, run.model, run.blocks, run.test, batch_size=16)
    assert errors is not None
    assert errors[:2] == [None, None]
    assert errors[2] is not None


def test_an_unfinished_run_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(LOCAL, tmp_path / "run", quiet=True, images=eventful(LOCAL, {2: interrupt}))
    with pytest.raises(LocalGradError, match=r"model\.safetensors"):
        evaluation.evaluate(tmp_path / "run", accelerator="cpu")


# Devices, precision, TensorBoard


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = replace(LOCAL, precision="auto", accelerator="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_precision(auto) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision(replace(auto, accelerator="mps")) == "32-true"
    native = devices.has_native_bf16()
    assert resolve_precision(replace(auto, accelerator="cpu")) == ("bf16-mixed" if native else "32-true")
    assert resolve_precision(replace(auto, precision="bf16-mixed")) == "bf16-mixed"
    cases = ((True, "auto", "mps"), (True, "mps", "mps"), (True, "cpu", "cpu"), (False, "auto", "cpu"))
    for here, accelerator, expected in cases:
        monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda here=here: here))
        (plugin,) = devices._precision_plugins(replace(auto, precision="bf16-mixed", accelerator=accelerator))
        assert plugin.device == expected, "where the forward pass runs under autocast"


def test_mixed_precision_keeps_the_weights_in_full_precision(tmp_path: Path) -> None:
    result = fit(replace(LOCAL, precision="bf16-mixed"), tmp_path, quiet=True)
    assert result.precision == "bf16-mixed"
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32, torch.int64}


def test_a_device_that_is_not_there() -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(LocalGradError, match=f"accelerator '{missing}' with 1 device"):
        make_fabric(replace(LOCAL, accelerator=missing))


TWO_PROCESSES = """
import sys
from dataclasses import replace
from helpers.runs import NORM_FREE
from localgrad.training.trainer import fit
fit(replace(NORM_FREE, devices=2, optim=replace(NORM_FREE.optim, accumulate=2)), sys.argv[1], quiet=True)
"""


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_train_what_one_would(tmp_path: Path) -> None:
    """Without BatchNorm, whose statistics are those of each process, a wrapper a block averages to the same weights."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    paths = [*sys.path]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    fit(NORM_FREE, tmp_path / "one", quiet=True)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert [line["test_error"] for line in two] == [line["test_error"] for line in one]
    assert two[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=1e-5)


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(replace(LOCAL, tensorboard=True), tmp_path, quiet=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train_loss/block3")]
    assert losses == pytest.approx([line["train_loss"][2] for line in read_metrics(tmp_path)], rel=1e-6)
    assert len(events.Scalars("test_error")) == 2


def test_the_loop_names_no_method() -> None:
    source = Path(trainer.__file__).parents[1]
    for folder in ("core", "parallel", "training", "runs"):
        for path in (source / folder).glob("*.py"):
            named = re.findall(r"import .*\b(?:dgl|infopro|predsim|classifier)\b", path.read_text())
            assert not named, path


def test_activation_checkpointing_trains_the_same_in_less_memory(tmp_path: Path) -> None:
    config = replace(END_TO_END, data=replace(LOCAL.data, image_size=16), optim=replace(LOCAL.optim, batch_size=50))
    kept = fit(config, tmp_path / "kept", quiet=True)
    recomputed = fit(replace(config, recompute=True), tmp_path / "recomputed", quiet=True)
    trained = weights(tmp_path / "recomputed")
    assert all(torch.equal(value, trained[name]) for name, value in weights(tmp_path / "kept").items())
    assert recomputed.peak_memory_bytes < 0.8 * kept.peak_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc's, on Linux")
def test_freed_memory_is_kept_for_the_next_block() -> None:
    """A heap that shrinks after each block costs a page fault for every 4 KiB of the next one."""
    program = """
import resource, torch
from localgrad.training.devices import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def steps():
    before = faults()
    for _ in range(5):
        torch.zeros(6, 2**20)
    return faults() - before
without = steps()
keep_freed_memory()
steps()
print(without, steps())
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    without, kept = map(int, printed.split())
    assert kept < without / 10
