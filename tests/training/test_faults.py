"""What once went wrong unseen: optimizers, learning rates, modes, casts and settings of the process."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.runs import LOCAL, SKIP
from helpers.training import CrashError, crash, eventful
from localgrad import classifier, local_step, split
from localgrad.errors import LocalGradError
from localgrad.planning.measure import measure_peak
from localgrad.training.build import build_run
from localgrad.training.devices import make_fabric
from localgrad.training.error_rates import error_rates, evaluation_mode
from localgrad.training.nonfinite import HostCheck, Skips, choose_check, obeys_found_inf
from localgrad.training.schedule import set_learning_rate
from localgrad.training.step import train_step
from localgrad.training.trainer import epoch_batches, fit

CUDA = torch.device("cuda")

# Optimizers that step although found_inf is 1


OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], bool]] = {
    "fused SGD": (lambda own: torch.optim.SGD(own, lr=0.1, fused=True), True),
    "fused AdamW": (lambda own: torch.optim.AdamW(own, lr=0.1, fused=True), True),
    "SGD": (lambda own: torch.optim.SGD(own, lr=0.1), False),
    "RMSprop": (lambda own: torch.optim.RMSprop(own, lr=0.1), False),
    "Muon": (lambda own: torch.optim.Muon(own, lr=0.1), False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_obeys_the_device_is_known(name: str) -> None:
    """Seen in what a step does, and not in a list of names."""
    make, obeys = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer: Any = make([parameter])
    assert obeys_found_inf(optimizer) == obeys
    parameter.grad = torch.ones(2, 2)
    optimizer.found_inf = torch.ones(())
    if name != "SGD":  # which finds a gradient scaler without being fused an error
        optimizer.step()
        assert torch.equal(parameter, torch.ones(2, 2)) == obeys


@pytest.mark.parametrize("name", ["RMSprop", "Muon"])
def test_the_host_checks_optimizers_that_would_not_obey_the_device(name: str) -> None:
    run = build_run(SKIP)
    skips = Skips(SKIP, run.state, run.blocks, run.placement)
    weights = [[p for p in block.trainable_parameters() if p.ndim == 2] for block in run.blocks]
    ignoring = [OPTIMIZERS[name][0](own) for own in weights if own]
    assert isinstance(choose_check(skips, ignoring, CUDA), HostCheck)
    assert isinstance(choose_check(skips, run.optimizers, torch.device("cpu")), HostCheck)
    graphs = Skips(replace(SKIP, cuda_graph=True), run.state, run.blocks, run.placement)
    with pytest.raises(LocalGradError, match=rf"cuda_graph is on, and {name} cannot leave out a step"):
        choose_check(graphs, [*run.optimizers, *ignoring], CUDA)


# Learning rates


def test_every_parameter_group_gets_the_learning_rate() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "weight_decay": 0.1}], lr=5.0)
    set_learning_rate([optimizer], 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    on_device = torch.zeros(())
    set_learning_rate([optimizer], 0.5, on_device)
    assert all(group["lr"] is on_device for group in optimizer.param_groups)
    assert on_device == 0.5


def test_the_trainer_schedules_every_parameter_group(tmp_path: Path) -> None:
    from localgrad.runs.folder import RunFolder
    from localgrad.training.trainer import train

    run = build_run(replace(LOCAL, optim=replace(LOCAL.optim, epochs=1)))
    for optimizer in run.optimizers:
        last = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [last], "lr": 123.0})
    train(run, RunFolder(tmp_path), quiet=True)
    assert {group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups} == {0.01}


# Modes


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[0].eval()  # frozen by its user
    with pytest.raises(CrashError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        crash()
    assert [module.training for module in model.modules()] == [True, False, True, True, True]


def test_an_evaluation_that_fails_leaves_training_mode() -> None:
    run = build_run(LOCAL, images=eventful(LOCAL, {}, evaluation={2: crash}))
    with pytest.raises(CrashError):
        error_rates(run.fabric, run.model, run.blocks, run.test, batch_size=16)
    assert all(module.training for block in run.blocks for module in block.modules())
    train_step(run, *next(iter(epoch_batches(run))))


# Casts of weights under autocast


def test_casts_of_the_weights_end_with_their_block() -> None:
    """Under one autocast around the step, as loops of users have it, they would live until it ends."""

    def peak(enter_each_block: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(6)), nn.Linear(512, 10))
        blocks = split(model, torch.zeros(2, 512), num_blocks=7, balance="count", objective=classifier(10))
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.0) for block in blocks]
        inputs, targets = torch.randn(2, 512), torch.tensor([0, 1])

        def autocast(index: int = 0) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

        def step() -> None:
            if enter_each_block:
                local_step(blocks, optimizers, inputs, targets, context=autocast)
            else:
                with autocast():
                    local_step(blocks, optimizers, inputs, targets)

        return measure_peak(step, torch.device("cpu"))[1]

    assert peak(False) <= 1.02 * peak(True)


# Settings of the process


def test_a_fit_puts_the_settings_of_the_process_back(tmp_path: Path) -> None:
    make_fabric(LOCAL)  # Lightning's first import adds filters
    torch.manual_seed(5)
    state, filters, benchmark = torch.get_rng_state(), list(warnings.filters), torch.backends.cudnn.benchmark
    fit(replace(LOCAL, optim=replace(LOCAL.optim, epochs=1)), tmp_path / "run", quiet=True)
    with pytest.raises(CrashError):
        fit(LOCAL, tmp_path / "crashed", quiet=True, images=eventful(LOCAL, {2: crash}))
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters
    assert torch.backends.cudnn.benchmark == benchmark
