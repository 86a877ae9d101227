"""On devices that compute beside the host, the device itself keeps a bad step from changing anything.

A processor has no such device, so the check of a device is put in the host's place here: the fused optimizers read it
there too.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.cases import MOMENTA, NUM_CLASSES, OBJECTIVES, batch
from helpers.processes import run_ranks
from helpers.runs import (
    ADAMW,
    LOCAL,
    SKIP,
    assert_same_run,
    equal,
    everything,
    read_metrics,
    spoil_gradient,
    weights,
)
from helpers.training import CrashError, crash, eventful, fit_as_on_cuda, interrupt, spoil, work_as_on_cuda
from localgrad import split
from localgrad.config.schema import TrainConfig
from localgrad.core.step import apply_updates, local_gradients
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.training.build import build_run
from localgrad.training.nonfinite import DeviceCheck
from localgrad.training.run import Run
from localgrad.training.step import plain_update, train_step
from localgrad.training.trainer import epoch_batches, fit

CLIPPED = replace(
    LOCAL,
    optim=replace(LOCAL.optim, clip_norm=0.1, accumulate=2),
    data=replace(LOCAL.data, train_limit=48),
)


def _run(config: TrainConfig) -> tuple[Run, DeviceCheck, Tensor, Tensor]:
    run = build_run(config)
    return run, work_as_on_cuda(run), *next(iter(epoch_batches(run)))


@pytest.mark.parametrize(
    "config",
    [
        LOCAL,
        SKIP,
        replace(LOCAL, step_each_block=True),
        replace(
            LOCAL, optim=replace(LOCAL.optim, clip_norm=0.1, accumulate=2), data=replace(LOCAL.data, train_limit=48)
        ),
        replace(SKIP, optim=ADAMW),
    ],
    ids=["stop", "skip", "each block", "clipped", "adamw"],
)
def test_a_run_that_the_device_checks_is_the_same_run(config: TrainConfig, tmp_path: Path) -> None:
    fit(config, tmp_path / "host", quiet=True)
    fit_as_on_cuda(config, tmp_path / "device")
    assert_same_run(tmp_path / "host", tmp_path / "device")


@pytest.mark.parametrize("optim", [LOCAL.optim, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "second step"])
def test_a_bad_step_changes_no_weight_and_neither_does_the_next(tmp_path: Path, optim: Any, first: bool) -> None:
    run, check, inputs, targets = _run(replace(LOCAL, optim=optim))
    if not first:
        train_step(run, inputs, targets)
    before = {name: value for name, value in everything(run).items() if "running" not in name and "num_b" not in name}
    before = {name: value for name, value in before.items() if "momentum.ema" not in name}
    bad = inputs.clone()
    bad[0, 0, 0, 0] = float("inf")
    run.state.step, run.state.batch = 3, 3
    train_step(run, bad, targets)
    run.state.step, run.state.batch = 4, 4
    with pytest.raises(LocalGradError, match=r"loss .*block 1 of 3 .* nan .* 1, .* 4, .* 4 "):
        train_step(run, inputs, targets)
        check.settle()
    after = everything(run)
    started = {name: after[name] for name in before}
    assert equal(started, before)
    if first:  # whatever state the optimizers made is still what they begin with
        made = [value for name, value in after.items() if name.startswith("optimizer")]
        assert made
        assert not any(value.any() for value in made)


@pytest.mark.parametrize("optim", [LOCAL.optim, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_batch_leaves_no_trace(tmp_path: Path, optim: Any, how: str) -> None:
    run, check, inputs, targets = _run(replace(SKIP, optim=optim))
    train_step(run, inputs, targets)
    before = everything(run)
    if how == "gradient":
        spoil_gradient(run, float("nan"))
    bad = inputs.clone()
    bad[0, 0, 0, 0] = float("inf") if how == "loss" else 0.0
    losses = train_step(run, bad, targets)
    assert equal(everything(run), before)
    assert not check.if_allowed(losses).any()
    check.settle()
    assert (run.state.skipped, run.state.skipped_in_a_row) == (1, 1)


def test_skipped_batches_are_counted_as_the_host_counts_them(tmp_path: Path) -> None:
    images = eventful(SKIP, dict.fromkeys((2, 3, 6), spoil))
    fit_as_on_cuda(SKIP, tmp_path / "device", images=images)
    assert [line["skipped"] for line in read_metrics(tmp_path / "device")] == [2, 3]
    fit(SKIP, tmp_path / "host", quiet=True, images=images)
    assert_same_run(tmp_path / "host", tmp_path / "device")


@pytest.mark.parametrize("saved_in_between", [0, 5])
def test_too_many_in_a_row_stop_the_run(tmp_path: Path, saved_in_between: int) -> None:
    """Counted over the end of the epoch and over a checkpoint; what is saved comes from before them all."""
    config = replace(SKIP, checkpoint_every=saved_in_between)
    images = eventful(config, dict.fromkeys((4, 5, 6), spoil))
    with pytest.raises(LocalGradError, match=r"loss .*block 1 of 3.* 6,.* 2 batches"):
        fit_as_on_cuda(config, tmp_path, images=images)
    saved = torch.load(tmp_path / "checkpoint.pt")["state"]
    expected = (5, 2, 2) if saved_in_between else (4, 1, 1)
    assert (saved["step"], saved["skipped"], saved["skipped_in_a_row"]) == expected


def test_the_count_in_a_row_goes_on_after_a_resume(tmp_path: Path) -> None:
    config, bad = replace(SKIP, checkpoint_every=4), dict.fromkeys((4, 5, 6), spoil)
    with pytest.raises(CrashError):
        fit_as_on_cuda(config, tmp_path, images=eventful(config, bad, evaluation={1: crash}))
    with pytest.raises(LocalGradError, match=r" 6,.* 2 batches"):
        fit_as_on_cuda(config, tmp_path, images=eventful(config, bad), resume=True)


def test_a_run_with_as_many_skips_behind_it_is_stopped_on_the_device(tmp_path: Path) -> None:
    run, check, inputs, targets = _run(SKIP)
    run.state.skipped_in_a_row = SKIP.max_skips
    train_step(run, inputs * float("nan"), targets)
    check.allow(torch.ones(3), torch.ones(3), 0)
    assert check.closed == 1


def test_a_bad_last_batch_of_an_epoch_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(LocalGradError, match=r"loss .*block 1 of 3 .* 1, .* 4,"):
        fit_as_on_cuda(LOCAL, tmp_path, images=eventful(LOCAL, {4: spoil}))
    assert not (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_each_block_at_once_stops_at_the_block_that_is_not_finite(tmp_path: Path) -> None:
    run, check, inputs, targets = _run(replace(LOCAL, step_each_block=True))
    nn.init.constant_(run.blocks[1].trainable_parameters()[0], float("inf"))
    before = [[p.clone() for p in block.trainable_parameters()] for block in run.blocks]
    train_step(run, inputs, targets)
    with pytest.raises(LocalGradError, match=r"block 2 of 3 .* nan .*before it"):
        check.settle()
    same = [all(map(torch.equal, b.trainable_parameters(), w)) for b, w in zip(run.blocks, before, strict=True)]
    assert same == [False, True, True]


TWO = replace(LOCAL, devices=2)


def _fit_as_on_cuda(config: TrainConfig, run_dir: Path, interrupt_at: int, resume: bool) -> int:
    """Train on a rank; with a step to interrupt at on the first rank."""
    events = {interrupt_at: interrupt} if os.environ["RANK"] == "0" else {}
    return fit_as_on_cuda(config, run_dir, images=eventful(config, events), resume=resume).skipped


def _fit_plainly(config: TrainConfig, run_dir: Path) -> None:
    fit(config, run_dir, quiet=True)


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_stop_together_without_waiting_for_each_other_s_answer(tmp_path: Path) -> None:
    run_ranks(_fit_plainly, 2, TWO, tmp_path / "host")
    with pytest.raises(KeyboardInterrupt, match=" 3;"):
        run_ranks(_fit_as_on_cuda, 2, TWO, tmp_path / "device", 2, False)
    run_ranks(_fit_as_on_cuda, 2, TWO, tmp_path / "device", 0, True)
    assert_same_run(tmp_path / "host", tmp_path / "device")


def _fit_with_a_bad_batch(config: TrainConfig, run_dir: Path, fit_so: Callable[..., Any]) -> int:
    images = eventful(config, {3: spoil} if os.environ["RANK"] == "1" else {})
    return fit_so(config, run_dir, images=images).skipped


@pytest.mark.ranks
@pytest.mark.parametrize("fit_so", [fit, fit_as_on_cuda])
def test_a_batch_that_is_bad_on_one_rank_is_skipped_by_all(fit_so: Callable[..., Any], tmp_path: Path) -> None:
    config = replace(TWO, on_nonfinite="skip")
    assert run_ranks(_fit_with_a_bad_batch, 2, config, tmp_path, fit_so) == [1, 1]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


class _NoHost(TorchDispatchMode):
    """Refuses what makes a host wait for its device: a number out of a tensor, or a shape that depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        masked = name.startswith("index") and any(one.dtype == torch.bool for one in tree_leaves(args[1:]))
        assert name not in self.WAITS and not masked, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_refusal_sees_what_waits() -> None:
    waits: list[Callable[[Tensor], Any]] = [lambda t: t.item(), lambda t: bool(t > 0), lambda t: t[None][t[None] > 0]]
    for wait in waits:
        with pytest.raises(AssertionError, match="waits for the device"), _NoHost():
            wait(torch.ones(()))


@pytest.mark.parametrize("config", [LOCAL, SKIP, replace(LOCAL, optim=replace(LOCAL.optim, clip_norm=1.0))])
def test_a_step_that_the_device_checks_never_waits_for_the_device(config: TrainConfig, tmp_path: Path) -> None:
    run, check, _, _ = _run(config)
    batches = epoch_batches(run)
    next(batches)  # the first draws what is random in the epoch
    with _NoHost():
        inputs, targets = next(batches)
        losses, _ = plain_update(run, inputs, targets)
        check.if_allowed(losses)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_or_momentum_waits_for_the_device(
    objective: str, momentum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's own looks whether the classes exist, on a processor and not on CUDA
    monkeypatch.setattr(F, "one_hot", lambda targets, count: (targets[:, None] == torch.arange(count)).long())
    torch.manual_seed(0)
    inputs, targets = batch()
    blocks = split(
        cifar_resnet(8, NUM_CLASSES),
        inputs,
        cuts=["layer1.0", "layer2.0"],
        objective=OBJECTIVES[objective],
        momentum=MOMENTA[momentum],
    )
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
    optimizers = [make(block.trainable_parameters()) for block in blocks]
    with _NoHost():
        local_gradients(blocks, inputs, targets)
        apply_updates(blocks, optimizers)
