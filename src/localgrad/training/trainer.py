"""Train a config in a run folder: build the run, open its folder, train epochs, write the result."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.data.loading import untold
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError
from localgrad.parallel.processes import peer_failure_as_error, restarted
from localgrad.parallel.shards import gathered_state
from localgrad.planning.measure import measure_peak
from localgrad.runs.folder import RunFolder
from localgrad.runs.load import weights_metadata
from localgrad.runs.provenance import provenance
from localgrad.runs.result import Result
from localgrad.training.build import build_run
from localgrad.training.checkpoint import open_folder, save
from localgrad.training.devices import (
    as_launched,
    fast_kernels,
    make_fabric,
    resolve_precision,
)
from localgrad.training.error_rates import error_rates
from localgrad.training.interrupts import InterruptedRun, Interrupts, noted_interrupts
from localgrad.training.outlook import FEW_STEPS, WORTH_SAYING, duration, prediction
from localgrad.training.placement import Batches, Stop
from localgrad.training.progress import Display
from localgrad.training.run import Run
from localgrad.training.schedule import rate_of, set_learning_rate
from localgrad.training.step import train_step
from localgrad.training.tensorboard import Board, check_tensorboard


def fit(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    images: tuple[ImageSet, ImageSet] | None = None,
) -> Result:
    """Train a config to its last epoch, or until its patience ends; write weights, metrics and result to a run folder.

    On a CPU, the same config, seed and number of threads give the same weights bit for bit, also if the run was
    interrupted and resumed, even in the middle of an epoch.

    Args:
        config: the complete config of the run, such as `recipe(NAME).config`.
        run_dir: folder for the files of the run; created if it does not exist.
        resume: continue the run in the folder; also on if torchrun has restarted the processes.
        quiet: print nothing.
        images: training and test set; by default `load_images(config.data)`.

    Returns:
        The result, which is also in `result.json`.

    Raises:
        LocalGradError: the config or the folder cannot be used, a loss or gradient is not finite, a step does not fit
            into the device's memory, or another process ended.
        KeyboardInterrupt: the run was interrupted; a checkpoint was saved after the last finished step.
    """
    folder = RunFolder(Path(run_dir))
    resume = resume or (restarted() and folder.is_started)
    with peer_failure_as_error():
        config = with_defaults(validate(as_launched(config)))
        fabric = make_fabric(config)
        if config.tensorboard:
            check_tensorboard()
        if fabric.is_global_zero:
            folder.check(config, resume)  # before anything slow
        with fast_kernels(fabric.device):
            say = untold if quiet else partial(print, file=sys.stderr, flush=True)
            fresh = not (resume and folder.has_checkpoint)
            return train(build_run(config, images, fabric, say, fresh=fresh), folder, resume=resume, quiet=quiet)


def train(run: Run, folder: RunFolder, *, resume: bool = False, quiet: bool = False) -> Result:
    """Train a run from `build_run` to its last epoch, in its folder; see `fit`."""
    quiet = quiet or not run.fabric.is_global_zero
    with open_folder(run, folder, resume) as board, Display(quiet=quiet) as display:
        with noted_interrupts() as interrupted, _memory_errors(run):
            display.message(_headline(run, folder))
            if resume and run.state.epoch > 1:
                display.message(_schedule(run))
            while run.state.epoch <= run.config.optim.epochs and not is_out_of_patience(run):
                train_epoch(run, folder, display, interrupted)
                finish_epoch(run, folder, board, display)
                if run.config.keep_best and run.state.best_epoch == run.state.epoch - 1:
                    _save_best(run, folder)
                save(run, folder)
            if run.state.epoch <= run.config.optim.epochs:
                display.message(
                    f"stopped after epoch {run.state.epoch - 1}: the error on the {_chosen_on(run)} images has not "
                    f"become smaller since epoch {run.state.best_epoch} (--patience {run.config.patience})"
                )
        result, weights = _result(run), gathered_state(run.model.state_dict())
        if run.fabric.is_global_zero:
            folder.save_model(weights, weights_metadata(run.config, result))
            folder.save_result(result)
        run.fabric.barrier()
    return result


def is_out_of_patience(run: Run) -> bool:
    """Whether the error that chooses the best epoch has not fallen for `patience` epochs; False if it is None."""
    state, patience = run.state, run.config.patience
    return patience is not None and state.best_epoch > 0 and state.epoch - 1 - state.best_epoch >= patience


def _save_best(run: Run, folder: RunFolder) -> None:
    """Save the weights of the epoch that has just ended, which is the best one so far."""
    with run.placement.evaluating():
        weights = gathered_state(run.model.state_dict())
    if run.fabric.is_global_zero:
        folder.save_model(weights, weights_metadata(run.config, _result(run)), best=True)


def _chosen_on(run: Run) -> str:
    """The images on which the best epoch is chosen: "test" or "validation"."""
    return "test" if run.validation is None else "validation"


def _schedule(run: Run) -> str:
    """A sentence on the remaining epochs and learning rates of a resumed run."""
    optim, epoch = run.config.optim, run.state.epoch
    if epoch > optim.epochs:
        return "all epochs are trained; what was left to do is done"
    return (
        f"goes on with epoch {epoch} of {optim.epochs}, at the learning rate that {optim.epochs} epochs have there: "
        f"{run.learning_rate:.3g}, to {rate_of(optim, optim.epochs):.3g} at the end"
    )


def train_epoch(run: Run, folder: RunFolder, display: Display, interrupted: Interrupts) -> None:
    """Train the remaining batches of the current epoch, and save checkpoints every `checkpoint_every` steps.

    Raises:
        InterruptedRun: the run was interrupted. It is raised after the current step, once a checkpoint is saved.
    """
    state, every = run.state, run.config.checkpoint_every
    set_learning_rate(run.optimizers, run.learning_rate, run.rate)
    sums = run.own_sums()
    run.seconds.clear()
    begin = time.perf_counter()
    for batch in epoch_batches(run, interrupted.is_set):
        # the peak of the second step is measured too, since the first allocates optimizer states; neither is timed
        measured = state.step < 2
        losses = _measured_step(run, *batch) if measured else train_step(run, *batch)
        sums += run.check.if_allowed(torch.cat([losses, losses.new_ones(1)]) * len(batch[0]))
        state.batch, state.step = state.batch + 1, state.step + 1
        if display.is_due():
            _show(run, display, sums)
        now = time.perf_counter()
        run.seconds.extend([] if measured else [now - begin])
        begin = now
        if not run.predicted and run.seconds_per_step and (len(run.seconds) >= FEW_STEPS or state.step >= FEW_STEPS):
            _predict(run, display)
        stop = run.placement.stop(interrupted.is_set())
        if stop or (every and state.step % every == 0):
            run.check.settle()
            state.sums = run.placement.totals(sums)
            sums = run.own_sums()
            save(run, folder)
        if stop:
            message = f"interrupted in epoch {state.epoch} after step {state.step}; everything is saved"
            raise InterruptedRun(message, interrupted.number)
    run.check.settle()
    state.sums = run.placement.totals(sums)


def epoch_batches(run: Run, stop: Stop = lambda: False) -> Batches:
    """The remaining batches of the current epoch on this rank.

    Args:
        run: the run.
        stop: function that says whether to stop; with blocks on several ranks, the first rank calls it before each
            batch (see `Stage.batches`).

    Returns:
        Iterator of inputs, targets and, with blocks on several ranks, the features of this rank's first block.
    """
    config, state = run.config, run.state
    order = {"seed": config.seed, "epoch": state.epoch, "start": state.batch, "channels_last": config.channels_last}
    return run.placement.batches(run.train, run.batch_size, stop, **order)


def _measured_step(run: Run, *batch: Tensor) -> Tensor:
    losses, peak = measure_peak(lambda: train_step(run, *batch), run.fabric.device)
    largest: Any = run.fabric.all_reduce(torch.tensor(peak, device=run.fabric.device), reduce_op="max")
    run.state.peak_memory_bytes = int(largest)
    return losses


def _show(run: Run, display: Display, sums: Tensor) -> None:
    seconds, left = run.seconds_per_step, ""
    if seconds is not None:
        steps = run.steps_per_epoch
        of_epoch, of_run = seconds * (steps - run.state.batch), seconds * steps * _epochs_left(run)
        left = f"{duration(of_epoch)} left of the epoch, {duration(of_run)} of the run"
    display.step(
        epoch=run.epoch_of_epochs,
        done=run.state.batch,
        total=run.steps_per_epoch,
        losses=(sums[:-1] / sums[-1]).tolist() if sums[-1] else [],
        images_per_second=run.images_per_second,
        left=left,
    )


def _epochs_left(run: Run) -> float:
    """Number of epochs to the end of the run, with the rest of this epoch as a fraction."""
    return run.config.optim.epochs + 1 - run.state.epoch - run.state.batch / run.steps_per_epoch


def _predict(run: Run, display: Display) -> None:
    """Report the remaining time of the run once, unless it is short."""
    run.predicted = True
    seconds, steps, epochs = run.seconds_per_step or 0.0, run.steps_per_epoch, _epochs_left(run)
    if seconds * steps * epochs >= WORTH_SAYING:
        display.message(prediction(seconds, steps, epochs, on_cpu=run.fabric.device.type == "cpu"))


def finish_epoch(run: Run, folder: RunFolder, board: Board | None, display: Display) -> None:
    """Evaluate, write the epoch's line of metrics, and move the state to the next epoch."""
    state, config = run.state, run.config
    evaluated = state.epoch % config.evaluate_every == 0 or state.epoch == config.optim.epochs
    if evaluated:
        evaluate_epoch(run)
    state.elapsed_seconds = time.perf_counter() - run.begin
    state.seconds_per_step = run.seconds_per_step
    line = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": run.learning_rate,
        "train_loss": [total / state.sums[-1] for total in state.sums[:-1]] if state.sums[-1] else None,
        "skipped": state.skipped,
        "test_error": state.test_error if evaluated else None,
        **({"validation_error": run.validation_error if evaluated else None} if run.validation else {}),
        "local_errors": state.local_errors if evaluated else None,
        "seconds_per_step": state.seconds_per_step,
        "images_per_second": run.images_per_second,
        "peak_memory_bytes": state.peak_memory_bytes,
        "elapsed_seconds": state.elapsed_seconds,
    }
    if run.fabric.is_global_zero:
        folder.append_metrics(line)
        if board is not None:
            board.write(line)
        display.epoch(run.epoch_of_epochs, line)
    state.epoch, state.batch, state.lines = state.epoch + 1, 0, state.lines + 1
    state.sums = [0.0] * len(state.sums)


def evaluate_epoch(run: Run) -> None:
    """Evaluate the test error, errors of local heads (if `local_heads` is on) and the best epoch into the state."""
    state, config = run.state, run.config
    with run.placement.evaluating():
        state.test_error, state.local_errors = error_rates(
            run.fabric,
            run.model,
            run.blocks if config.local_heads else (),
            run.test,
            batch_size=config.optim.batch_size,
            channels_last=config.channels_last,
        )
    if run.validation is None:
        better = state.best_epoch == 0 or state.test_error < state.best_test_error
    else:
        run.validation_error = _validation_error(run, run.validation)
        better = state.best_epoch == 0 or run.validation_error < state.best_validation_error
        state.best_validation_error = min(state.best_validation_error, run.validation_error)
    if better:
        state.best_test_error, state.best_epoch = state.test_error, state.epoch


def _validation_error(run: Run, images: ImageSet) -> float:
    config = run.config
    with run.placement.evaluating():
        size, last = config.optim.batch_size, config.channels_last
        return error_rates(run.fabric, run.model, (), images, batch_size=size, channels_last=last)[0]


@contextmanager
def _memory_errors(run: Run) -> Iterator[None]:
    """Context: an out-of-memory error becomes a LocalGradError with the cuts that `plan` proposes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        from localgrad.training.memory_advice import memory_advice  # imported here because planning is slow to import

        device = run.fabric.device
        capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        advice = memory_advice(run.config, run.train.num_classes, run.cuts, capacity)
        raise LocalGradError(f"{str(error)[:300]}; {advice}") from error


def _headline(run: Run, folder: RunFolder) -> str:
    counts, state = run.parameters, run.state
    resumed = f", from epoch {state.epoch}, batch {state.batch}" if state.step else ""
    return (
        f"{run.config.name or run.config.model.name}: {len(run.blocks)} block{'s' * (len(run.blocks) > 1)}, "
        f"{counts['backbone']:,} parameters and {counts['auxiliary']:,} auxiliary, {len(run.train):,} images, "
        f"{run.fabric.device.type} {resolve_precision(run.config)}{resumed}, in {folder.path}"
    )


def _result(run: Run) -> Result:
    state = run.state
    return Result(
        config=run.config,
        test_error=state.test_error,
        best_test_error=state.best_test_error,
        best_epoch=state.best_epoch,
        local_errors=state.local_errors,
        cuts=run.cuts,
        num_blocks=len(run.blocks),
        parameters=run.parameters,
        peak_memory_bytes=state.peak_memory_bytes,
        seconds_per_step=state.seconds_per_step,
        wall_seconds=state.elapsed_seconds,
        skipped=state.skipped,
        chosen_on=_chosen_on(run),
        train_images=run.train.fingerprint,
        test_images=run.test.fingerprint,
        num_classes=run.train.num_classes,
        class_names=None if run.train.class_names is None else list(run.train.class_names),
        precision=resolve_precision(run.config),
        **provenance(run.fabric.device),
    )
