"""Training a config in a run folder: set up, fit, finish. It reads from top to bottom."""

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data as image_data
from .blocks import Block
from .build import build_blocks, build_model, build_optimizers, with_defaults
from .config import TrainConfig, to_dict, validate
from .errors import LocalGradError
from .evaluation import error_rates
from .memory import measure_peak
from .progress import Display
from .runs import Result, RunFolder, load_state, provenance
from .schedule import learning_rate
from .step import apply_updates, local_gradients


@dataclass
class State:
    """Where a run stands; with weights and optimizers, all that a checkpoint needs."""

    sums: list[float]
    """Over the images of this epoch so far, the sum of each block's loss; last, the number of those images."""
    epoch: int = 1
    """Epoch that is being trained, from 1."""
    batch: int = 0
    """Batches of that epoch that are done."""
    step: int = 0
    """Optimizer steps done since the beginning."""
    lines: int = 0
    """Lines of metrics written."""
    elapsed_seconds: float = 0.0
    """Seconds of training and evaluation, over all sittings."""
    test_error: float = 100.0
    local_errors: list[float | None] | None = None
    best_test_error: float = 100.0
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
    begin: float = field(default_factory=time.perf_counter)
    """When the run would have begun, had it been done in one sitting."""

    @property
    def batch_size(self) -> int:
        """Images of a batch on one device."""
        return self.config.optim.batch_size // self.fabric.world_size

    @property
    def learning_rate(self) -> float:
        """Learning rate of the epoch that is being trained."""
        optim = self.config.optim
        return learning_rate(
            self.state.epoch,
            epochs=optim.epochs,
            peak=optim.lr,
            warmup_epochs=optim.warmup_epochs,
            first_epoch=optim.first_epoch,
        )


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
        module.to(fabric.device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)
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
        state=State(sums=[0.0] * (len(blocks) + 1)),
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
    """Trains the batches of the epoch that are not done yet, saving in between where that is asked for."""
    state, fabric, every = run.state, run.fabric, run.config.checkpoint_every
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = run.learning_rate
    total = run.train.num_batches(run.batch_size, fabric.world_size, train=True)
    sums = torch.tensor(state.sums, dtype=torch.float32 if fabric.device.type == "mps" else torch.float64)
    sums, seconds = sums.to(fabric.device), []
    for inputs, targets in _batches(run):
        begin = time.perf_counter()
        losses = _measured_step(run, inputs, targets) if state.step == 0 else train_step(run, inputs, targets)
        seconds.append(time.perf_counter() - begin)
        sums += torch.cat([losses, losses.new_ones(1)]) * len(inputs)
        state.batch, state.step = state.batch + 1, state.step + 1
        state.seconds_per_step = statistics.median(seconds)
        if display.is_due():
            means = (sums[:-1] / sums[-1]).tolist()
            speed = run.config.optim.batch_size / state.seconds_per_step
            display.step(epoch=_of_epochs(run), done=state.batch, total=total, losses=means, images_per_second=speed)
        stop = fabric.strategy.reduce_boolean_decision(interrupted.is_set(), all=False)
        if stop or (every and state.step % every == 0):
            state.sums = fabric.all_reduce(sums).tolist()
            save(run)
        if stop:
            raise KeyboardInterrupt(f"interrupted in epoch {state.epoch} after step {state.step}; everything is saved")
    state.sums = fabric.all_reduce(sums).tolist()


def _batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    return run.train.batches(
        run.batch_size,
        train=True,
        seed=run.config.seed,
        epoch=run.state.epoch,
        start=run.state.batch,
        rank=run.fabric.global_rank,
        world_size=run.fabric.world_size,
        channels_last=run.config.channels_last,
    )


def train_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    """One optimizer step of every block on one batch.

    Whatever is drawn at random in it depends on the seed, the step and the device alone, so a resumed run draws the
    same.

    Args:
        run: the run.
        inputs: images (N, 3, H, W).
        targets: classes (N,).

    Returns:
        The mean loss of each block over the batch, before the step (num_blocks,).

    Raises:
        LocalGradError: a loss is not finite; no optimizer has stepped.
    """
    key = np.random.SeedSequence([run.config.seed, run.state.step, run.fabric.global_rank])
    torch.manual_seed(int(key.generate_state(1)[0]))
    optim = run.config.optim
    parts = list(zip(inputs.chunk(optim.accumulate), targets.chunk(optim.accumulate), strict=True))
    losses = inputs.new_zeros(len(run.blocks))
    for number, (part, part_targets) in enumerate(parts, start=1):
        share = len(part) / len(inputs)
        with contextlib.ExitStack() as no_sync:
            for block in run.wrapped if number < len(parts) else ():
                no_sync.enter_context(run.fabric.no_backward_sync(block, enabled=run.fabric.world_size > 1))
            part_losses = local_gradients(run.wrapped, part, part_targets, backward=run.fabric.backward, scale=share)
        losses += share * torch.stack(part_losses)
    _check_finite(run, losses)
    if optim.clip_norm is not None:
        for block in run.blocks:
            nn.utils.clip_grad_norm_(block.trainable_parameters(), optim.clip_norm)
    apply_updates(run.blocks, run.optimizers)
    return losses


def _check_finite(run: Run, losses: Tensor) -> None:
    finite = losses.isfinite()
    if run.fabric.strategy.reduce_boolean_decision(bool(finite.all()), all=True):
        return
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    index = int(finite.int().argmin())
    names = run.blocks[index].names
    raise LocalGradError(
        f"the loss of block {index + 1} of {len(losses)} ({names[0]} to {names[-1]}) is {float(losses[index])} at "
        f"epoch {run.state.epoch}, step {run.state.step + 1}, learning rate {run.learning_rate:g}; its weights were "
        "left as they were before this step; try a lower --optim.lr, or --optim.clip-norm 1"
    )


def _measured_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    losses, run.state.peak_memory_bytes = measure_peak(lambda: train_step(run, inputs, targets))
    return losses


def finish_epoch(run: Run, display: Display) -> None:
    """Evaluates, writes the epoch's line of metrics, and moves the state to the next epoch."""
    state, config = run.state, run.config
    evaluated = state.epoch % config.evaluate_every == 0 or state.epoch == config.optim.epochs
    if evaluated:
        state.test_error, state.local_errors = error_rates(run.fabric, config, run.model, run.blocks, run.test)
        if state.best_epoch == 0 or state.test_error < state.best_test_error:
            state.best_test_error, state.best_epoch = state.test_error, state.epoch
    state.elapsed_seconds = time.perf_counter() - run.begin
    line = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": run.learning_rate,
        "train_loss": [total / state.sums[-1] for total in state.sums[:-1]],
        "test_error": state.test_error if evaluated else None,
        "local_errors": state.local_errors if evaluated else None,
        "seconds_per_step": state.seconds_per_step,
        "images_per_second": config.optim.batch_size / state.seconds_per_step,
        "peak_memory_bytes": state.peak_memory_bytes,
        "elapsed_seconds": state.elapsed_seconds,
    }
    if run.fabric.is_global_zero:
        run.folder.append_metrics(line)
        display.epoch(_of_epochs(run), line)
    state.epoch, state.batch, state.lines = state.epoch + 1, 0, state.lines + 1
    state.sums = [0.0] * len(state.sums)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (or SIGTERM) into an event that the loop looks at between steps; a second one is at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt("interrupted at once; the last checkpoint holds")
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Save, load, finish


def save(run: Run) -> None:
    """Writes the checkpoint."""
    run.state.elapsed_seconds = time.perf_counter() - run.begin
    if run.fabric.is_global_zero:
        run.folder.save_checkpoint(
            {
                "model": run.model.state_dict(),
                "auxiliary": [block.auxiliary_state_dict() for block in run.blocks],
                "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                "state": asdict(run.state),
            }
        )


def load(run: Run) -> None:
    """Loads the folder's checkpoint into the objects of the run."""
    path, saved = run.folder.checkpoint, run.folder.load_checkpoint()
    names = {"model", "auxiliary", "optimizers", "state"}
    if saved.keys() != names or saved["state"].keys() != {item.name for item in fields(State)}:
        raise LocalGradError(f"{path} is not a checkpoint of this version of localgrad; start again in another --run-dir")
    load_state(run.model.load_state_dict, saved["model"], path)
    for block, auxiliary in zip(run.blocks, saved["auxiliary"], strict=True):
        load_state(block.load_auxiliary_state_dict, auxiliary, path)
    for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
        load_state(optimizer.load_state_dict, state, path)
    run.state = State(**saved["state"])
    run.begin = time.perf_counter() - run.state.elapsed_seconds


def _of_epochs(run: Run) -> str:
    return f"{run.state.epoch}/{run.config.optim.epochs}"


def _parameters(run: Run) -> dict[str, int]:
    backbone = {id(parameter) for parameter in run.model.parameters()}
    parameters = {id(p): p for block in run.blocks for p in block.parameters()}
    return {
        "backbone": sum(parameter.numel() for parameter in run.model.parameters()),
        "auxiliary": sum(parameter.numel() for key, parameter in parameters.items() if key not in backbone),
        "trainable": sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
    }


def _headline(run: Run) -> str:
    parameters, state = _parameters(run), run.state
    again = f", from epoch {state.epoch}, batch {state.batch}" if state.step else ""
    return (
        f"{run.config.name or run.config.model.name}: {len(run.blocks)} block(s), {parameters['backbone']:,} parameters "
        f"and {parameters['auxiliary']:,} auxiliary, {len(run.train):,} images, {run.fabric.device}, "
        f"{resolve_precision(run.config)}{again} -> {run.folder.path}"
    )


def _result(run: Run) -> Result:
    state = run.state
    return Result(
        config=to_dict(run.config),
        test_error=state.test_error,
        best_test_error=state.best_test_error,
        best_epoch=state.best_epoch,
        local_errors=state.local_errors,
        cuts=[block.names[-1] for block in run.blocks[:-1]],
        num_blocks=len(run.blocks),
        parameters=_parameters(run),
        peak_memory_bytes=state.peak_memory_bytes or 0,
        seconds_per_step=state.seconds_per_step,
        wall_seconds=state.elapsed_seconds,
        precision=resolve_precision(run.config),
        **provenance(run.fabric.device),
    )
