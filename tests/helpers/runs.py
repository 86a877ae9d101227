"""What tests of whole runs share: small configs, runs made of them, and how two runs are compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from safetensors.torch import load_file
from torch import Tensor

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.training.run import Run

LOCAL = TrainConfig(
    name="tiny",
    model=ModelConfig(depth=8),
    data=replace(data.digits(), image_size=8, padding=1, train_limit=50, test_limit=40),
    cuts=("layer1.0", "layer2.0"),
    objective=ObjectiveConfig(name="dgl"),
    momentum=MomentumConfig(name="man"),
    optim=OptimConfig(lr=0.1, batch_size=16, epochs=2, warmup_epochs=1),
    accelerator="cpu",
    precision="32-true",
)
BLOCKS = replace(LOCAL, devices=2, parallel="blocks", checkpoint_every=3)


NORM_FREE = replace(
    LOCAL,
    model=ModelConfig("helpers.networks:plain"),
    data=replace(LOCAL.data, train_limit=55),
    cuts=("0",),
    objective=ObjectiveConfig(name="classifier"),
    channels_last=False,
)


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model.safetensors")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def reproducible(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without those that are measured on the machine."""
    measured = {"seconds_per_step", "images_per_second", "elapsed_seconds", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in measured} for line in read_metrics(run_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, auxiliary networks, optimizers and metrics agree bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other))
    for part in ("auxiliary", "optimizers"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    assert reproducible(one) == reproducible(other)


def everything(run: Run) -> dict[str, Tensor]:
    """Copies of all weights, auxiliary networks, buffers and optimizer states."""
    found = {f"{i}.{name}": value for i, block in enumerate(run.blocks) for name, value in block.state_dict().items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, slots in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {i} {j} {name}": value for name, value in slots.items()}
    return {name: value.clone() for name, value in found.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def spoil_gradient(run: Run, value: float) -> None:
    """Makes one gradient of the second block not finite, though every loss is finite."""
    parameter = run.blocks[1].trainable_parameters()[0]

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[(0,) * gradient.ndim] = value
        return gradient

    parameter.register_hook(spoil)


SKIP = replace(LOCAL, on_nonfinite="skip", max_skips=2)  # 4 batches an epoch, 2 epochs


ADAMW = replace(LOCAL.optim, name="adamw", nesterov=False, lr=1e-3)


few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
