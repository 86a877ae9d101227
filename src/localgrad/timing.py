"""Seconds of a training step, of several trainings in turns: a step each, round by round.

Whatever else the machine does hits all of them alike, so that their times can be compared, which those of runs that
were made at different times cannot.
"""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from localgrad.build import with_defaults
from localgrad.config import TrainConfig, from_dict, to_dict, validate
from localgrad.data import DataConfig
from localgrad.devices import provenance, resolve_precision
from localgrad.errors import LocalGradError
from localgrad.images import ImageSet
from localgrad.results import read_results
from localgrad.runs import RunFolder
from localgrad.sources import load_images
from localgrad.state import Run
from localgrad.summary import Table, step_key, tables, told_seconds
from localgrad.trainer import set_up, train_step

Step = Callable[[], object]
WARM_UP = 2
"""Rounds that are not counted: the first makes the optimizers' state, both fill the caches."""
BATCHES = 4
"""Batches of images that a timed training has."""


def time_results(
    folder: Path,
    *,
    data: str | None = None,
    rounds: int = 15,
    accelerator: str = "auto",
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Measures the steps of all trainings that have a finished run below a folder, in turns, on this machine.

    The networks start from the seed's weights, with a learning rate of 0, so that nothing can grow without bound: a
    step takes as long as any other. All of them are in memory at once, with their optimizers' state; the activations
    are those of one step.

    Args:
        folder: with results, as `report` takes it. Runs whose steps are the same but for seed or budget are one row.
        data: other images, a hub name or a folder; None for those of the runs.
        rounds: steps of each training that count.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.
        warn: told, in one line each, what is left out.

    Returns:
        What `step-times.json` holds: `rows` with `row`, `seconds_per_step` (median over the rounds), `ratio_to_first`
        (median of the ratios of a round), `num_blocks`, `precision` and `config`; `seconds` of every round by row;
        `settings` (network and batch size where all have the same); device, versions and commit.

    Raises:
        LocalGradError: there is nothing to time in the folder, or images or device cannot be had.
    """
    if rounds < 1:
        raise LocalGradError(f"rounds is {rounds}; give 1 or more")
    chosen = _chosen(tables(read_results(folder, warn).runs), warn)
    if not chosen:
        raise LocalGradError(f"{folder} has no finished run that can be timed here")
    shared = _shared(chosen)
    configs = _labelled(chosen, shared)
    with contextlib.ExitStack() as held:
        runs: dict[str, Run] = {}
        steps: dict[str, Step] = {}
        for label, config in configs.items():
            images = config.data if data is None else replace(config.data, source=data)
            steps[label], runs[label] = timed_step(replace(config, data=images, accelerator=accelerator), held)
        seconds = take_turns(steps, rounds)
        first = next(iter(seconds.values()))
        rows = [
            {
                "row": label,
                "seconds_per_step": statistics.median(times),
                "ratio_to_first": ratio(times, first),
                "num_blocks": len(runs[label].blocks),
                "precision": resolve_precision(runs[label].config),
                "config": to_dict(configs[label]),
            }
            for label, times in seconds.items()
        ]
        device = next(iter(runs.values())).fabric.device
    return {"settings": {**shared, "rounds": rounds}, "rows": rows, "seconds": seconds, **provenance(device)}


def _chosen(grouped: Sequence[Table], warn: Callable[[str], None]) -> list[tuple[Table, str, TrainConfig]]:
    """A config for each training whose step is another, its table and label, in the order of a table's rows."""
    chosen: dict[str, tuple[Table, str, TrainConfig]] = {}
    rows = [(table, label, row) for table in grouped for label, row in zip(table.labels, table.rows, strict=True)]
    rows.sort(key=lambda each: (each[0].title, each[2].config["optim"]["batch_size"], *each[2].place))
    for table, label, row in rows:
        path = row.runs[0].path
        try:
            config = with_defaults(validate(from_dict(row.config)))
        except LocalGradError as problem:
            warn(f"left out: {path}: {problem}")
            continue
        if config.devices > 1:
            warn(f"left out: {path} is a run on {config.devices} devices, and these are timed on one")
            continue
        chosen.setdefault(step_key(row.config, row.num_blocks, config.precision), (table, label, config))
    return list(chosen.values())


def _shared(chosen: Sequence[tuple[Table, str, TrainConfig]]) -> dict[str, Any]:
    """The network and batch size of all of them; None where these differ."""
    titles = {table.title for table, _, _ in chosen}
    batches = {config.optim.batch_size for _, _, config in chosen}
    return {
        "network": titles.pop() if len(titles) == 1 else None,
        "batch_size": batches.pop() if len(batches) == 1 else None,
    }


def _labelled(chosen: Sequence[tuple[Table, str, TrainConfig]], shared: dict[str, Any]) -> dict[str, TrainConfig]:
    """The configs by labels that tell them apart."""
    told = [
        ", ".join(
            [table.title] * (shared["network"] is None)
            + [label]
            + [f"batch size {config.optim.batch_size}"] * (shared["batch_size"] is None)
        )
        for table, label, config in chosen
    ]
    twice = {label for label, count in Counter(told).items() if count > 1}
    labels = [f"{label} ({number})" if label in twice else label for number, label in enumerate(told, start=1)]
    return {label: config for label, (_, _, config) in zip(labels, chosen, strict=True)}


def timed_step(config: TrainConfig, held: contextlib.ExitStack) -> tuple[Step, Run]:
    """A step of the trainer, as `localgrad train` does it, on a few batches over and over; also the run.

    Args:
        config: the run; its learning rate is left aside.
        held: closed when the step is no longer needed.
    """
    images = _few_images(config.data, BATCHES * config.optim.batch_size)
    scratch = held.enter_context(tempfile.TemporaryDirectory())
    run = set_up(config, RunFolder(Path(scratch)), False, held, images)
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0 if run.rate is None else run.rate  # which is 0 too
    batches = endless_batches(run, channels_last=config.channels_last)
    return lambda: train_step(run, *next(batches)), run


@lru_cache(maxsize=1)  # the trainings of a table have the same ones
def _few_images(config: DataConfig, count: int) -> tuple[ImageSet, ImageSet]:
    """So many training images, or all where there are fewer, and one to test on."""
    few = replace(config, train_limit=min(count, config.train_limit or count), test_limit=1)
    try:
        return load_images(few)
    except LocalGradError:  # the set is smaller than that, or cannot be had, which the whole one says
        return load_images(replace(few, train_limit=config.train_limit))


def endless_batches(run: Run, *, channels_last: bool) -> Iterator[tuple[Tensor, ...]]:
    """Augmented training batches of full size, epoch after epoch."""
    size = min(run.batch_size, len(run.train))
    for epoch in itertools.count(1):
        batches = run.train.batches(size, train=True, seed=run.config.seed, epoch=epoch, channels_last=channels_last)
        yield from (batch for batch in batches if len(batch[0]) == size)


def take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, round by round, after two rounds that are not counted. Shows how far it is on a terminal.

    Args:
        steps: what to measure, by name.
        rounds: how often each is measured.
    """
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    console = Console(stderr=True)
    shown = {"description": "rounds", "console": console, "transient": True, "disable": not console.is_terminal}
    for number in track(range(WARM_UP + rounds), **shown):
        for label, step in steps.items():
            begin = _now()
            step()
            taken = _now() - begin
            if number >= WARM_UP:
                seconds[label].append(taken)
    return seconds


def _now() -> float:
    """Seconds on a clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of one time over the other of the same round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def show_times(found: dict[str, Any]) -> None:
    """Print seconds a step, and what they are to the first row's."""
    lines = [("row", "blocks", "s a step", "to the first")]
    lines += [
        (row["row"], str(row["num_blocks"]), told_seconds(row["seconds_per_step"]), f"{row['ratio_to_first']:.2f}")
        for row in found["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    settings = found["settings"]
    parts = [settings["network"], settings["batch_size"] and f"batch size {settings['batch_size']}"]
    parts += [f"median of {settings['rounds']} round{'s' * (settings['rounds'] > 1)}", f"on {found['device']}"]
    print(", ".join(filter(None, parts)))
    for first, *cells in lines:
        told = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print(f"{first:{widths[0]}}  {'  '.join(told)}")
