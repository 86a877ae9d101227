"""Measure the time of a training step: several trainings run one step each in turn, round by round.

Other load on the machine then affects all trainings equally, so their times can be compared. Times of separate runs
cannot be compared as well.
"""

import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.core.clock import now
from localgrad.data.config import DataConfig
from localgrad.data.loading import load_images, untold
from localgrad.data.sets import ImageSet
from localgrad.data.sources import check_source
from localgrad.errors import LocalGradError
from localgrad.results.kinds import StepTimes, TimedRow
from localgrad.results.read import read_results
from localgrad.results.tables import Row, Table, seconds_text, step_key, tables
from localgrad.results.terminal import print_table
from localgrad.runs.provenance import provenance
from localgrad.training.build import build_run
from localgrad.training.devices import fast_kernels, make_fabric, resolve_precision
from localgrad.training.run import Run
from localgrad.training.schedule import set_learning_rate
from localgrad.training.step import train_step

Step = Callable[[], object]


WARM_UP = 3
"""Rounds that do not count: the first creates the optimizers' state, the third captures CUDA graphs if any are used."""


BATCHES = 4
"""Number of batches of images in memory for each timed training."""


@dataclass(frozen=True)
class Training:
    """A training to time: one row of a table of results."""

    table: Table
    row: Row
    config: TrainConfig
    """The complete config of one of the row's runs."""

    @property
    def label(self) -> str:
        """Label of the row in its table."""
        return next(label for label, row in zip(self.table.labels, self.table.rows, strict=True) if row is self.row)

    @property
    def images(self) -> int:
        """Number of images in a step."""
        batch_size = self.config.optim.batch_size
        return min(batch_size, self.config.data.train_limit or batch_size)


def time_results(
    folder: Path,
    *,
    data: str | None = None,
    rounds: int = 15,
    accelerator: str = "auto",
    warn: Callable[[str], None],
) -> StepTimes:
    """Time the training steps of all finished runs below a folder, in turns, on this machine.

    The networks start from the initial weights of the run's seed. The learning rate is 0, so training cannot diverge.
    A step gets its images from a few batches in memory: for a run that streams images, the time to read them is not
    included. All networks and their optimizers' states are in memory together, but only one step's activations.

    Args:
        folder: folder of results, as for `report`. Runs that differ only in seed or budget are one row.
        data: other images, as a hub name or a folder. None takes the images of the runs.
        rounds: number of timed steps of each training.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.
        warn: called with one line for each training that is left out, and one if runs are from another device.

    Returns:
        The content of `step-times.json`. Its settings have the network and the batch size if all rows share them.

    Raises:
        LocalGradError: no finished run can be timed on this machine, or they do not fit into memory together.
    """
    if rounds < 1:
        raise LocalGradError(f"rounds is {rounds}; give 1 or more")
    if data is not None:
        check_source(DataConfig(data))  # once, not for each training
    trainings = _trainings(tables(read_results(folder, warn).runs), accelerator, warn)
    shared = _shared(trainings)
    timed: dict[str, tuple[Step, Run, TrainConfig]] = {}
    with contextlib.ExitStack() as held, _memory_errors(len(trainings)):
        for label, training in _labelled(trainings, shared).items():
            try:
                step, run = timed_step(_elsewhere(training.config, data, accelerator), held)
                _check_images(training, run, other=data is not None)
            except LocalGradError as problem:
                warn(f"left out: {training.row.runs[0].path}: {problem}")
            else:
                timed[label] = step, run, training.config
        if not timed:
            raise LocalGradError(f"{folder} has no finished run that can be timed here")
        origin = provenance(next(run for _, run, _ in timed.values()).fabric.device)
        _compare_devices(trainings, origin["device"], warn)
        seconds = take_turns({label: step for label, (step, _, _) in timed.items()}, rounds)
    first = next(iter(seconds.values()))
    rows = [
        TimedRow(
            row=label,
            seconds_per_step=statistics.median(seconds[label]),
            ratio_to_first=ratio(seconds[label], first),
            num_blocks=len(run.blocks),
            num_classes=run.train.num_classes,
            precision=resolve_precision(run.config),
            config=config,
        )
        for label, (_, run, config) in timed.items()
    ]
    return StepTimes(settings={**shared, "rounds": rounds}, rows=rows, seconds=seconds, **origin)


def _trainings(grouped: Sequence[Table], accelerator: str, warn: Callable[[str], None]) -> list[Training]:
    """One training for each distinct step, in the order of the tables and their rows."""
    chosen: dict[str, Training] = {}
    rows = [(table, row) for table in grouped for row in table.rows]
    rows.sort(key=lambda each: (each[0].title, each[1].config.optim.batch_size, *each[1].sort_key))
    for table, row in rows:
        saved = next((run.result.config for run in row.runs if run.result.config.devices == 1), row.config)
        path = row.runs[0].path
        try:
            config = with_defaults(validate(saved))
        except LocalGradError as problem:
            warn(f"left out: {path}: {problem}")
            continue
        if config.devices > 1:
            warn(f"left out: {path} is a run on {config.devices} devices, and these are timed on one")
            continue
        precision = resolve_precision(replace(config, accelerator=accelerator))
        key = step_key(config, row.num_blocks, row.num_classes, precision)
        chosen.setdefault(key, Training(table, row, config))
    return list(chosen.values())


def _shared(trainings: Sequence[Training]) -> dict[str, Any]:
    """The network and the batch size of all trainings; None for one that differs between them."""
    titles = {training.table.title for training in trainings}
    batches = {training.images for training in trainings}
    return {
        "network": titles.pop() if len(titles) == 1 else None,
        "batch_size": batches.pop() if len(batches) == 1 else None,
    }


def _labelled(trainings: Sequence[Training], shared: dict[str, Any]) -> dict[str, Training]:
    """The trainings by label, made distinct by what differs between them."""

    def full(training: Training, label: str) -> str:
        title = [training.table.title] * (shared["network"] is None)
        batch = [f"batch size {training.images}"] * (shared["batch_size"] is None)
        return ", ".join([*title, label, *batch])

    labels = [full(training, training.label) for training in trainings]
    for fuller in (lambda each: each.row.full_label, lambda each: f"{each.row.full_label}, {each.config.precision}"):
        twice = {label for label, count in Counter(labels).items() if count > 1}
        labels = [
            full(training, fuller(training)) if label in twice else label
            for label, training in zip(labels, trainings, strict=True)
        ]
    twice = {label for label, count in Counter(labels).items() if count > 1}
    labels = [f"{label} ({number})" if label in twice else label for number, label in enumerate(labels, start=1)]
    return dict(zip(labels, trainings, strict=True))


def _elsewhere(config: TrainConfig, data: str | None, accelerator: str) -> TrainConfig:
    """The config with the requested images, on the requested device."""
    images = config.data if data is None else replace(config.data, source=data)
    return replace(config, data=images, accelerator=accelerator)


def _check_images(training: Training, run: Run, *, other: bool) -> None:
    """Refuse images that differ from the run's. If other images were requested, refuse fewer than a step needs."""
    before, now = training.row.runs[0].result.train_images, run.train.fingerprint
    if not other and before is not None and now is not None and (difference := before.difference(now)):
        raise LocalGradError(
            f"it was trained with other images than those of {run.config.data.source}: {difference}; give --data"
        )
    if other and len(run.train) < training.images:
        raise LocalGradError(
            f"a step takes {training.images} images, and {run.config.data.source} has {len(run.train)}: give --data "
            "with more"
        )


def _compare_devices(trainings: Sequence[Training], device: str, warn: Callable[[str], None]) -> None:
    """Warn if a row has no run on the timed device."""
    others = {
        ", ".join(sorted(made))
        for made in ({run.result.device for run in training.row.runs} for training in trainings)
        if device not in made
    }
    if others:
        warn(
            f"timed on {device}, while runs are of {'; '.join(sorted(others))}: the report takes times for runs of the "
            "same device only (on a CPU, OMP_NUM_THREADS sets the threads)"
        )


@contextlib.contextmanager
def _memory_errors(count: int) -> Iterator[None]:
    """Context: raises an out-of-memory error as a LocalGradError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LocalGradError(
            f"{count} networks with their optimizers, and a step, do not fit into the memory together "
            f"({str(error)[:200]}): time fewer, in folders of their own"
        ) from error


def timed_step(config: TrainConfig, held: contextlib.ExitStack) -> tuple[Step, Run]:
    """A function that runs the next training step of `localgrad train` on a few repeated batches; and the run.

    Args:
        config: config of the run; its learning rate is replaced by 0.
        held: the caller closes it when it no longer needs the step.
    """
    images = _few_images(config.data, BATCHES * config.optim.batch_size)
    fabric = make_fabric(config)
    held.enter_context(fast_kernels(fabric.device))
    run = build_run(config, images, fabric, untold, fresh=False)
    set_learning_rate(run.optimizers, 0.0, run.rate)
    batches = endless_batches(run, channels_last=config.channels_last)
    return lambda: train_step(run, *next(batches)), run


@lru_cache(maxsize=1)  # the trainings of a table share their images
def _few_images(config: DataConfig, count: int) -> tuple[ImageSet, ImageSet]:
    """At most `count` training images and one test image, in memory."""
    if config.streaming:
        config = replace(config, streaming=False, workers=0, crop="none")
    few = replace(config, train_limit=min(count, config.train_limit or count), test_limit=1)
    try:
        return load_images(few)
    except LocalGradError:  # the set is smaller, or cannot be read: then loading all of it raises the error
        return load_images(replace(few, train_limit=None))


def endless_batches(run: Run, *, channels_last: bool) -> Iterator[tuple[Tensor, ...]]:
    """Augmented training batches of full size, without end."""
    size = min(run.batch_size, len(run.train))
    for epoch in itertools.count(1):
        batches = run.train.batches(size, train=True, seed=run.config.seed, epoch=epoch, channels_last=channels_last)
        yield from (batch for batch in batches if len(batch[0]) == size)


def take_turns(steps: Mapping[str, Step], rounds: int, clock: Callable[[], float] = now) -> dict[str, list[float]]:
    """Seconds of each step, round by round, after three rounds that do not count. Shows its progress on a terminal.

    Args:
        steps: functions to time, by label.
        rounds: number of times that each counts.
        clock: returns seconds, after waiting for the work that is queued on the device.
    """
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    console = Console(stderr=True)
    shown = {"description": "rounds", "console": console, "transient": True, "disable": not console.is_terminal}
    for number in track(range(WARM_UP + rounds), **shown):
        for label, step in steps.items():
            begin = clock()
            step()
            taken = clock() - begin
            if number >= WARM_UP:
                seconds[label].append(taken)
    return seconds


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two times in the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def show_times(found: StepTimes) -> None:
    """Print the seconds per step, and their ratio to the first row's."""
    settings = found.settings
    parts = [settings["network"], settings["batch_size"] and f"batch size {settings['batch_size']}"]
    parts += [f"median of {settings['rounds']} round{'s' * (settings['rounds'] > 1)}", f"on {found.device}"]
    print_table(
        ["row", "blocks", "s a step", "to the first"],
        [
            (row.row, str(row.num_blocks), seconds_text(row.seconds_per_step), f"{row.ratio_to_first:.2f}")
            for row in found.rows
        ],
        title=", ".join(filter(None, parts)),
    )
