"""What runs on a CUDA device gives what a processor gives: the step, reach, MAN, CUDA graphs, the guard."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from localgrad import auglocal, dgl, infopro, local_step, man, manpp, predsim, split
from localgrad.core.step import apply_updates, local_gradients
from localgrad.models import cifar_resnet
from localgrad.training.cuda_graphs import GraphedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = (0.5, 0.5, 0.5)
CUTS = ["conv1", "layer1.0", "layer2.0"]
CASES: dict[str, Any] = {
    "dgl": (dgl(10), None, 1),
    "dgl, man": (dgl(10), man(0.9), 1),
    "dgl, man, reach 2": (dgl(10), man(0.9), 2),
    "dgl, man++": (dgl(10), manpp(0.9), 1),
    "dgl, man 1x1, pooled, reach 3": (dgl(10), man(0.9, bias_form="conv1x1", pool=2), 3),
    "infopro, man": (infopro(10, HALF, HALF, task=(0.5, 0.5)), man(0.9), 1),
    "predsim": (predsim(10), None, 1),
    "auglocal": (auglocal(10, 2), None, 1),
    "auglocal, ema, reach 2": (auglocal(10, 2), man(0.9, bias=False), 2),
}


def blocks_of(objective: Any, momentum: Any) -> list[Any]:
    torch.manual_seed(0)
    return split(
        cifar_resnet(8).double(),
        torch.zeros(2, 3, 16, 16, dtype=torch.float64),
        cuts=CUTS,
        objective=objective,
        momentum=momentum,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator), torch.arange(8) % 10


def sgd(blocks: list[Any], **options: Any) -> list[torch.optim.Optimizer]:
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, **options}
    return [torch.optim.SGD(block.trainable_parameters(), **settings) for block in blocks]


def tensors(blocks: list[Any]) -> dict[str, Tensor]:
    return {f"{number} {name}": value for number, b in enumerate(blocks) for name, value in b.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_give_the_weights_of_a_processor(case: str) -> None:
    objective, momentum, reach = CASES[case]
    here = blocks_of(objective, momentum)
    there = [block.to("cuda") for block in copy.deepcopy(here)]
    ours, theirs = sgd(here), sgd(there, fused=True)
    for step in range(3):
        inputs, targets = batch(step)
        losses = local_step(here, ours, inputs, targets, reach=reach)
        on_device = local_step(there, theirs, inputs.cuda(), targets.cuda(), reach=reach)
        torch.testing.assert_close(torch.stack(on_device).cpu(), torch.stack(losses), rtol=1e-4, atol=1e-6)
    found = tensors(there)
    for name, value in tensors(here).items():
        torch.testing.assert_close(
            found[name].cpu(), value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_gives_the_weights_of_the_step(case: str) -> None:
    objective, momentum, reach = CASES[case]
    weights = []
    for graphed in (False, True):
        blocks = [block.to("cuda") for block in blocks_of(objective, momentum)]
        rate = torch.zeros((), device="cuda")
        optimizers = sgd(blocks, fused=True)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate

        def step(inputs: Tensor, targets: Tensor, b: Any = blocks, o: Any = optimizers) -> tuple[Tensor, ...]:
            losses = local_gradients(b, inputs, targets, reach=reach)
            apply_updates(b, o)
            return (torch.stack(losses),)

        run = GraphedStep(step) if graphed else step
        for number in range(6):
            rate.fill_(0.1 / (1 + number))  # read on the device
            inputs, targets = batch(number)
            run(inputs.cuda(), targets.cuda())
        weights.append(tensors(blocks))
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_run_with_a_guard_and_one_that_is_replayed_end_alike(tmp_path: Any) -> None:
    pytest.importorskip("lightning")
    from dataclasses import replace

    from localgrad.recipes import recipe
    from localgrad.training.trainer import fit

    config = recipe("digits-dgl-man").config
    config = replace(
        config,
        accelerator="cuda",
        precision="32-true",
        optim=replace(config.optim, epochs=2, warmup_epochs=1),
        data=replace(config.data, train_limit=200, test_limit=100),
    )
    results = []
    for graphed in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(fit(replace(config, cuda_graph=graphed), tmp_path / str(graphed), quiet=True))
    assert results[0].skipped == results[1].skipped == 0
    assert abs(results[0].test_error - results[1].test_error) <= 3.0
