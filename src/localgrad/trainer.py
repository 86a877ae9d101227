"""Training a config in a run folder: set up, fit, evaluate. It reads from top to bottom."""

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import data as image_data
from .blocks import Block
from .build import build_blocks, build_model, build_optimizers, with_defaults
from .config import TrainConfig, to_dict, validate
from .errors import LocalGradError
from .memory import measure_peak
from .progress import Display
from .runs import Result, RunFolder, current_commit, device_name, load_state, versions
from .schedule import learning_rate
from .step import apply_updates, local_gradients


@dataclass
class State:
    """Where a run stands; with weights and optimizers, all that a checkpoint needs."""

    loss_sums: list[float]
    """Sum over this epoch's images of each block's loss."""
    epoch: int = 1
    """Epoch that is being trained, from 1."""
    batch: int = 0
    """Batches of that epoch that are done."""
    images: int = 0
    """Images of that epoch that are done."""
    step: int = 0
    """Optimizer steps done since the beginning."""
    lines: int = 0
    """Lines of metrics written."""
    elapsed: float = 0.0
    """Seconds of training and evaluation."""
    test_error: float | None = None
    local_errors: list[float | None] | None = None
    best_test_error: float | None = None
    best_epoch: int = 0
    peak_memory_bytes: int | None = None
    seconds_per_step: float = 0.0


@dataclass
class Run:
    """The objects of a run; all but `state` are made from the config alone."""

    config: TrainConfig
    folder: RunFolder
    fabric: Any
    train: image_data.ImageSet
    test: image_data.ImageSet
    model: nn.Module
    blocks: list[Block]
    wrapped: list[Any]
    """The blocks as Fabric runs them: under autocast, and in a DDP wrapper each on several devices."""
    optimizers: list[torch.optim.SGD]
    state: State

    @property
    def batch_size(self) -> int:
        """Images of a batch on one device."""
        return self.config.optim.batch_size // self.fabric.world_size


def fit(config: TrainConfig, run_dir: str | Path, *, resume: bool = False, quiet: bool = False) -> Result:
    """Trains a config to its last epoch and leaves weights, metrics and result in the run folder.

    The same config and seed give the same weights bit for bit on a CPU (with one number of threads), also when the
    run was interrupted and resumed, in the middle of an epoch too.

    Args:
        config: the complete run, as a recipe gives it.
        run_dir: folder for its files; made if it is not there.
        resume: continue the unfinished run of that folder.
        quiet: print nothing.

    Returns:
        The result, as `result.json` has it.

    Raises:
        LocalGradError: the config or the folder cannot be used, or a loss is not finite.
        KeyboardInterrupt: interrupted; a checkpoint was saved after the last whole step.
    """
    run = set_up(with_defaults(validate(config)), RunFolder(Path(run_dir)), resume)
    is_main = run.fabric.is_global_zero
    with Display(quiet=quiet or not is_main) as display, _interrupts() as interrupted:
        display.message(_headline(run))
        while run.state.epoch <= config.optim.epochs:
            train_epoch(run, display, interrupted)
            finish_epoch(run, display)
            save(run)
    result = _result(run)
    if is_main:
        run.folder.save_model(run.model)
        run.folder.save_result(result)
    run.fabric.barrier()
    return result


# Set up


def set_up(config: TrainConfig, folder: RunFolder, resume: bool) -> Run:
    """Makes the objects of a run, and loads the folder's checkpoint into them when it is resumed."""
    fabric = make_fabric(config)
    if fabric.is_global_zero:
        folder.check(config, resume)
    fabric.launch()
    torch.backends.cudnn.benchmark = True
    train, test = image_data.load(config.data)
    torch.manual_seed(config.seed)
    model = build_model(config.model, train.num_classes)
    blocks = build_blocks(config, model, train.num_classes)
    for module in (model, *blocks):
        module.to(fabric.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    run = Run(
        config=config,
        folder=folder,
        fabric=fabric,
        train=train.to(fabric.device),
        test=test.to(fabric.device),
        model=model,
        blocks=blocks,
        wrapped=[fabric.setup_module(block) for block in blocks],
        optimizers=build_optimizers(config.optim, blocks),
        state=State(loss_sums=[0.0] * len(blocks)),
    )
    _check_parts(run)
    if resume and folder.checkpoint.exists():
        load(run)
    if fabric.is_global_zero:
        folder.start(config, run.state.lines)
    fabric.barrier()
    return run


def make_fabric(config: TrainConfig) -> Any:
    """The Fabric of a config: its devices, with `auto` precision decided.

    Raises:
        LocalGradError: this machine does not have the accelerator, or not as many devices.
    """
    from lightning.fabric import Fabric

    try:
        return Fabric(accelerator=config.accelerator, devices=config.devices, precision=resolve_precision(config))
    except (RuntimeError, ValueError) as error:
        given = f"accelerator {config.accelerator!r} with {config.devices} device(s)"
        raise LocalGradError(f"{given} cannot be used on this machine: {error}") from error


def resolve_precision(config: TrainConfig) -> Any:
    """What `auto` stands for: bf16-mixed where the processor or GPU computes bfloat16 natively, else 32-true."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif config.accelerator == "mps" or (config.accelerator == "auto" and torch.backends.mps.is_available()):
        native = False
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def _check_parts(run: Run) -> None:
    """Refuses accumulation that would leave BatchNorm a part of one image."""
    last = len(run.train) // run.fabric.world_size % run.batch_size
    sizes = [size for size in (min(run.batch_size, len(run.train)), last) if size >= 2]
    parts = [len(part) for size in sizes for part in torch.empty(size).chunk(run.config.optim.accumulate)]
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())
    if normed and min(parts, default=2) == 1:
        raise LocalGradError(
            f"optim.accumulate {run.config.optim.accumulate} with batches of {sizes} images leaves a part of one image, "
            "which BatchNorm cannot normalise; use fewer parts or another batch size"
        )


# Fit


def train_epoch(run: Run, display: Display, interrupted: threading.Event) -> None:
    """Trains the batches of the epoch that are not done yet."""
    state, world_size = run.state, run.fabric.world_size
    lr = _learning_rate(run)
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = lr
    total = run.train.num_batches(run.batch_size, world_size, train=True)
    sums = torch.tensor(state.loss_sums, dtype=torch.float32 if run.fabric.device.type == "mps" else torch.float64)
    sums = sums.to(run.fabric.device)
    epoch_begin, images_before, seconds = time.perf_counter(), state.images, []
    for inputs, targets in _batches(run, run.train, train=True):
        begin = time.perf_counter()
        losses = _first_step(run, inputs, targets) if state.peak_memory_bytes is None else train_step(run, inputs, targets)
        sums += losses * len(inputs)
        seconds.append(time.perf_counter() - begin)
        state.batch, state.step, state.images = state.batch + 1, state.step + 1, state.images + len(inputs)
        if display.is_due():
            speed = (state.images - images_before) * world_size / (time.perf_counter() - epoch_begin)
            means = (sums / state.images).tolist()
            display.step(
                epoch=_of_epochs(run), done=state.batch, total=total, losses=means, images_per_second=speed
            )
        stop = run.fabric.strategy.reduce_boolean_decision(interrupted.is_set(), all=False)
        every = run.config.checkpoint_every
        if stop or (every and state.step % every == 0):
            ...
    state.loss_sums = sums.tolist()
