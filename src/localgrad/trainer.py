"""Training a config in a run folder: set up, fit, finish. It reads from top to bottom."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.build import build_blocks, build_model, build_optimizers, with_defaults
from localgrad.config import TrainConfig, to_dict, validate
from localgrad.devices import make_fabric, provenance, resolve_precision
from localgrad.errors import LocalGradError
from localgrad.evaluation import error_rates
from localgrad.interrupts import noted_interrupts
from localgrad.memory import measure_peak
from localgrad.progress import Display
from localgrad.runs import Result, RunFolder
from localgrad.sources import load_images
from localgrad.state import Run, State, load, save
from localgrad.step import apply_updates, local_gradients


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
    with Display(quiet=quiet or not is_main) as display, noted_interrupts() as interrupted:
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
    if fabric.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    train, test = load_images(config.data)
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
        run.board = folder.open_board(run.state.epoch) if config.tensorboard else None
    fabric.barrier()
    return run


def _check_parts(run: Run) -> None:
    """Refuses accumulation that would leave BatchNorm a part of one image."""
    last = len(run.train) // run.fabric.world_size % run.batch_size
    sizes = [size for size in (min(run.batch_size, len(run.train)), last) if size >= 2]
    parts = [len(part) for size in sizes for part in torch.empty(size).chunk(run.config.optim.accumulate)]
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())
    if normed and min(parts, default=2) == 1:
        raise LocalGradError(
            f"optim.accumulate {run.config.optim.accumulate} with batches of {sizes} images leaves a part of one "
            "image, which a BatchNorm cannot normalise; use fewer parts or another batch size"
        )


# Fit


def train_epoch(run: Run, display: Display, interrupted: threading.Event) -> None:
    """Trains the batches of the epoch that are not done yet, saving in between where that is asked for."""
    state, fabric, every = run.state, run.fabric, run.config.checkpoint_every
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = run.learning_rate
    sums = torch.tensor(state.sums, dtype=torch.float32 if fabric.device.type == "mps" else torch.float64)
    sums = sums.to(fabric.device)
    run.seconds.clear()
    begin = time.perf_counter()
    for inputs, targets in _batches(run):
        # the first step also makes the optimizers' state, so the second is measured too; neither is timed
        measured = state.step < 2
        losses = _measured_step(run, inputs, targets) if measured else train_step(run, inputs, targets)
        sums += torch.cat([losses, losses.new_ones(1)]) * len(inputs)
        state.batch, state.step = state.batch + 1, state.step + 1
        if display.is_due():
            _show(run, display, sums)
        now = time.perf_counter()
        run.seconds.extend([] if measured else [now - begin])
        begin = now
        stop = fabric.strategy.reduce_boolean_decision(interrupted.is_set(), all=False)
        if stop or (every and state.step % every == 0):
            state.sums = fabric.all_reduce(sums).tolist()
            save(run)
        if stop:
            raise KeyboardInterrupt(f"interrupted in epoch {state.epoch} after step {state.step}; everything is saved")
    state.sums = fabric.all_reduce(sums).tolist()


def _show(run: Run, display: Display, sums: Tensor) -> None:
    display.step(
        epoch=run.epoch_of_epochs,
        done=run.state.batch,
        total=run.train.num_batches(run.batch_size, run.fabric.world_size, train=True),
        losses=(sums[:-1] / sums[-1]).tolist(),
        images_per_second=run.images_per_second,
    )


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
            part_losses = local_gradients(
                run.wrapped,
                part,
                part_targets,
                backward=run.fabric.backward,
                scale=share,
                after_block=partial(_update, run) if run.config.step_each_block else None,
            )
        losses += share * torch.stack(part_losses)
    if not run.config.step_each_block:
        _check_finite(run, losses)
        for index in range(len(run.blocks)):
            _step(run, index)
    return losses


def _update(run: Run, index: int, loss: Tensor) -> None:
    """Check and step one block alone."""
    _check_finite(run, loss[None], index)
    _step(run, index)


def _step(run: Run, index: int) -> None:
    if run.config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.blocks[index].trainable_parameters(), run.config.optim.clip_norm)
    apply_updates([run.blocks[index]], [run.optimizers[index]])


def _check_finite(run: Run, losses: Tensor, first: int = 0) -> None:
    """Refuse a loss that is no number; `losses` are those of the blocks from `first` on."""
    if run.fabric.strategy.reduce_boolean_decision(bool(losses.isfinite().all()), all=True):
        return
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    losses = run.fabric.all_reduce(losses)
    place = int(losses.isfinite().int().argmin())
    index = first + place
    names = run.blocks[index].names
    stepped = ", those of the blocks before it were not" if run.config.step_each_block and index else ""
    raise LocalGradError(
        f"the loss of block {index + 1} of {len(run.blocks)} ({names[0]} to {names[-1]}) is {float(losses[place])} at "
        f"epoch {run.state.epoch}, step {run.state.step + 1}, learning rate {run.learning_rate:g}; its weights were "
        f"left as they were before this step{stepped}; try a lower --optim.lr, or --optim.clip-norm 1"
    )


def _measured_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    losses, run.state.peak_memory_bytes = measure_peak(lambda: train_step(run, inputs, targets), run.fabric.device)
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
    state.seconds_per_step = run.seconds_per_step
    line = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": run.learning_rate,
        "train_loss": [total / state.sums[-1] for total in state.sums[:-1]],
        "test_error": state.test_error if evaluated else None,
        "local_errors": state.local_errors if evaluated else None,
        "seconds_per_step": state.seconds_per_step,
        "images_per_second": run.images_per_second,
        "peak_memory_bytes": state.peak_memory_bytes,
        "elapsed_seconds": state.elapsed_seconds,
    }
    if run.fabric.is_global_zero:
        run.folder.append_metrics(line)
        if run.board is not None:
            run.board.write(line)
        display.epoch(run.epoch_of_epochs, line)
    state.epoch, state.batch, state.lines = state.epoch + 1, 0, state.lines + 1
    state.sums = [0.0] * len(state.sums)


# What a run says of itself


def _headline(run: Run) -> str:
    counts, state = run.parameters, run.state
    again = f", from epoch {state.epoch}, batch {state.batch}" if state.step else ""
    return (
        f"{run.config.name or run.config.model.name}: {len(run.blocks)} block{'s' * (len(run.blocks) > 1)}, "
        f"{counts['backbone']:,} parameters and {counts['auxiliary']:,} auxiliary, {len(run.train):,} images, "
        f"{run.fabric.device.type} {resolve_precision(run.config)}{again}, in {run.folder.path}"
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
        parameters=run.parameters,
        peak_memory_bytes=state.peak_memory_bytes or 0,
        seconds_per_step=state.seconds_per_step,
        wall_seconds=state.elapsed_seconds,
        precision=resolve_precision(run.config),
        **provenance(run.fabric.device),
    )
