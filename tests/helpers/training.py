"""Runs to which something happens in the middle, and runs on a processor that work as on CUDA: no patched names."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.data.loading import load_images
from localgrad.data.sets import Images, ImageSet
from localgrad.runs.folder import RunFolder
from localgrad.runs.result import Result
from localgrad.training.build import build_run
from localgrad.training.device_values import AnyRank
from localgrad.training.nonfinite import DeviceCheck, Skips
from localgrad.training.run import Run
from localgrad.training.step import recorded_update
from localgrad.training.trainer import train

Event = Callable[[Tensor], Tensor | None]
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class EventfulImages(Images):
    """Images to which something happens when the batch of a step, counted from 1, is read: it may give other inputs."""

    events: dict[int, Event]
    in_training: bool

    def batches(self, batch_size: int, *, train: bool, **order: Any) -> Iterator[tuple[Tensor, Tensor]]:
        found = super().batches(batch_size, train=train, **order)
        if train != self.in_training or (train and "epoch" not in order):
            return found
        first = 0
        if train:
            first = (order["epoch"] - 1) * self.num_batches(batch_size, order.get("world_size", 1)) + order["start"]
        return ((self._changed(step, inputs), targets) for step, (inputs, targets) in enumerate(found, first + 1))

    def _changed(self, step: int, inputs: Tensor) -> Tensor:
        changed = self.events[step](inputs) if step in self.events else None
        return inputs if changed is None else changed


def eventful(
    config: TrainConfig, events: dict[int, Event], evaluation: dict[int, Event] | None = None
) -> tuple[ImageSet, ImageSet]:
    """A config's images, for `fit(images=)`, with events at steps of training and at batches of an evaluation."""
    train, test = load_images(config.data)
    return (
        EventfulImages(**vars(train), events=events, in_training=True),
        EventfulImages(**vars(test), events=evaluation or {}, in_training=False),
    )


@dataclass(frozen=True, eq=False)
class PlannedErrors(Images):
    """Images on which a network has these errors in percent, evaluation by evaluation, counted over all ranks.

    It gives NaN for NaN, and the largest of scores that are NaN is that of class 0.
    """

    errors: list[float]

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1, **_: Any) -> Iterator[tuple[Tensor, ...]]:
        wrong = torch.arange(len(self)) < self.errors.pop(0) * len(self) / 100
        labels = wrong.long()[rank::world_size]
        yield torch.full((len(labels), *self.images.shape[1:]), torch.nan), labels


def planned(config: TrainConfig, *errors: float) -> tuple[ImageSet, PlannedErrors]:
    """A config's images, for `fit(images=)`, with planned errors on those that it is tested on."""
    train, test = load_images(config.data)
    return train, PlannedErrors(**vars(test), errors=[*errors])


def interrupt(inputs: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(inputs: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class CrashError(Exception):
    pass


def crash(inputs: Tensor | None = None) -> None:
    raise CrashError


def spoil(inputs: Tensor) -> Tensor:
    return inputs * float("inf")


def work_as_on_cuda(run: Run, *, recorded: bool = False) -> DeviceCheck:
    """Has the device decide whether a step is finite, with answers that come late; `recorded` as CUDA graphs too."""
    run.check = DeviceCheck(Skips(run.config, run.state, run.blocks, run.placement), run.optimizers, CPU)
    if hasattr(run.placement, "any_rank"):
        run.placement.any_rank = AnyRank(CPU, late=True)
    if recorded:
        run.rate = torch.zeros(())
        run.update = recorded_update(run)
    return run.check


def fit_as_on_cuda(
    config: TrainConfig,
    run_dir: Path,
    *,
    images: tuple[ImageSet, ImageSet] | None = None,
    resume: bool = False,
    recorded: bool = False,
) -> Result:
    """As `fit`."""
    run = build_run(with_defaults(validate(config)), images)
    work_as_on_cuda(run, recorded=recorded)
    return train(run, RunFolder(run_dir), resume=resume, quiet=True)
