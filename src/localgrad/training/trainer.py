"""Training a config in a run folder: set up, fit, finish. It reads from top to bottom."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.config.build import build_blocks, build_model, build_optimizers
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.core.block import Block
from localgrad.core.step import apply_updates, local_gradients
from localgrad.data.loading import load_images
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError
from localgrad.parallel.batchnorm import synchronise
from localgrad.parallel.pipeline import Stage, block_seconds, place
from localgrad.parallel.processes import noticed_losses, restarted
from localgrad.parallel.shards import put_together, shard, whole
from localgrad.planning.measure import measure_peak
from localgrad.runs.folder import RunFolder
from localgrad.runs.provenance import provenance
from localgrad.runs.result import Result
from localgrad.training.checkpoint import load, save
from localgrad.training.cuda_graphs import GraphedStep
from localgrad.training.devices import as_launched, keep_freed_memory, make_fabric, resolve_precision
from localgrad.training.error_rates import error_rates
from localgrad.training.guard import make_guard
from localgrad.training.interrupts import InterruptedRun, Interrupts, noted_interrupts
from localgrad.training.nonfinite import all_finite, gradient_norms, kept_tensors, stop_or_skip
from localgrad.training.progress import Display
from localgrad.training.state import Run, State
from localgrad.training.tensorboard import open_board

logger = logging.getLogger(__name__)


def fit(config: TrainConfig, run_dir: str | Path, *, resume: bool = False, quiet: bool = False) -> Result:
    """Trains a config to its last epoch and leaves weights, metrics and result in the run folder.

    The same config and seed give the same weights bit for bit on a CPU (with one number of threads), also when the
    run was interrupted and resumed, in the middle of an epoch too.

    Args:
        config: the complete run, as a recipe gives it.
        run_dir: folder for its files; made if it is not there.
        resume: continue the unfinished run of that folder; done without asking where torchrun has restarted it.
        quiet: print nothing.

    Returns:
        The result, as `result.json` has it.

    Raises:
        LocalGradError: the config or the folder cannot be used, a loss or gradient is not finite, a block does not
            fit into the device's memory, or another process ended.
        KeyboardInterrupt: interrupted; a checkpoint was saved after the last whole step.
    """
    folder = RunFolder(Path(run_dir))
    resume = resume or (restarted() and folder.is_started)
    with noticed_losses(), contextlib.ExitStack() as held:
        say = _unsaid if quiet else partial(print, file=sys.stderr, flush=True)
        run = set_up(with_defaults(validate(as_launched(config))), folder, resume, held, say=say)
        return _fit(run, quiet or not run.fabric.is_global_zero)


def _unsaid(text: str) -> None:
    """What `quiet` prints."""


def _fit(run: Run, quiet: bool) -> Result:
    with Display(quiet=quiet) as display, noted_interrupts() as interrupted, _memory_errors(run):
        display.message(_headline(run))
        while run.state.epoch <= run.config.optim.epochs:
            train_epoch(run, display, interrupted)
            finish_epoch(run, display)
            save(run)
    result, weights = _result(run), whole(run.model.state_dict())
    if run.fabric.is_global_zero:
        run.folder.save_model(weights)
        run.folder.save_result(result)
    run.fabric.barrier()
    return result


# Set up
def set_up(
    config: TrainConfig,
    folder: RunFolder,
    resume: bool,
    held: contextlib.ExitStack,
    images: tuple[ImageSet, ImageSet] | None = None,
    say: Callable[[str], None] = logger.warning,
) -> Run:
    """Makes the objects of a run, and loads the folder's checkpoint into them when it is resumed.

    Until `held` is closed no other process can use the folder. `images`, those to train and to test on, are loaded as
    the config says unless given. `say` is told what is going on, a sentence each.
    """
    fabric = make_fabric(config)
    if fabric.is_global_zero:
        folder.check(config, resume)
    fabric.launch()
    if config.cuda_graph and fabric.device.type != "cuda":
        raise LocalGradError(
            f"cuda_graph is on and the device is {fabric.device.type}: it takes a CUDA device; leave --cuda-graph out"
        )
    if fabric.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif fabric.device.type == "cpu":
        keep_freed_memory()
    train, test = images or load_images(config.data, say=say if fabric.is_global_zero else _unsaid)
    if images is None and fabric.is_global_zero:
        folder.check_images(train=train, test=test)
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
        train=_moved(train, fabric.device),
        test=_moved(test, fabric.device),
        model=model,
        blocks=blocks,
        stage=None,
        wrapped=list(blocks),
        optimizers=build_optimizers(config.optim, blocks, capturable=config.cuda_graph),
        state=State(sums=[0.0] * (len(blocks) + 1)),
    )
    _check_parts(run)
    if fabric.world_size > 1:
        spread(run)
    if fabric.is_global_zero:
        held.enter_context(folder.locked())
        folder.check(config, resume)  # again, for another process may have been there meanwhile
    fabric.barrier()
    if resume and folder.has_checkpoint:
        load(run)
    _check_start(run)
    run.guard = make_guard(run)
    if config.cuda_graph:
        replay_steps(run)
    if fabric.is_global_zero:
        folder.start(config, run.state.lines)
        folder.keep_images(train, test)
        run.board = open_board(folder.path, run.state.epoch) if config.tensorboard else None
    fabric.barrier()
    return run


def _moved(images: ImageSet, device: torch.device) -> ImageSet:
    try:
        return images.to(device)
    except torch.OutOfMemoryError as error:
        raise LocalGradError(
            f"the {len(images):,} images of {images.config.image_size} x {images.config.image_size} pixels do not fit "
            f"into the memory of {device} beside what is there: decode them while training, --data.streaming"
        ) from error


def spread(run: Run) -> None:
    """Shares the work between the devices: a batch's images, the weights too, or the blocks by measured cost.

    Raises:
        LocalGradError: there are fewer blocks than devices to share them.
    """
    config, fabric = run.config, run.fabric
    if config.parallel == "data":
        for block in run.blocks if config.sync_batchnorm else ():
            synchronise(block)
        device_ids = [fabric.device.index] if fabric.device.type == "cuda" else None
        run.wrapped = [nn.parallel.DistributedDataParallel(block, device_ids=device_ids) for block in run.blocks]
        return
    if config.parallel == "shards":
        for block in run.blocks if config.sync_batchnorm else ():
            synchronise(block)
        shard(run.model, run.blocks, fabric.device, fabric.world_size)
        run.optimizers = build_optimizers(config.optim, run.blocks, fused=False)
        return
    num_stages = config.devices // config.replicas
    seconds = [1.0] * len(run.blocks)
    place(seconds, num_stages)  # refuses too few blocks on every rank
    if fabric.is_global_zero:
        batch = next(iter(run.train.batches(run.config.optim.batch_size // config.replicas, train=True)))
        seconds = block_seconds(run.blocks, *batch, context=lambda index: fabric.autocast())
    run.stage = Stage(run.blocks, place(fabric.broadcast(seconds), num_stages), config.replicas)
    for block in run.stage.blocks if config.sync_batchnorm and config.replicas > 1 else ():
        synchronise(block, run.stage.replica_group)
    run.wrapped = run.stage.wrapped
    run.optimizers = [run.optimizers[index] for index in run.own]


def replay_steps(run: Run) -> None:
    """Has a guarded run's steps replayed as graphs, which read the learning rate on the device."""
    run.rate = torch.zeros((), device=run.fabric.device)
    step: Any = partial(_work, run, context=lambda index: run.fabric.autocast())  # which a guarded run always finishes
    run.graphed = GraphedStep(step)
    # said of AdamW, whose steps before the recording are not replayed
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")


def _check_parts(run: Run) -> None:
    """Refuses a set without a batch, and a batch or accumulated part of one image with BatchNorm."""
    _batches(run)  # checks its arguments at once
    last = len(run.train) // run.replicas % run.batch_size
    sizes = [size for size in (min(run.batch_size, len(run.train)), last) if size >= 2]
    parts = [size // min(run.config.optim.accumulate, size) for size in sizes]  # the smallest of each
    if run.batch_size == 1 and _has_batch_norm(run):
        raise LocalGradError(
            f"optim.batch_size {run.config.optim.batch_size} on {run.replicas} device(s) leaves a batch norm "
            "one image, which it cannot normalise; give two or more for each device"
        )
    if min(parts, default=2) == 1 and _has_batch_norm(run):
        raise LocalGradError(
            f"optim.accumulate {run.config.optim.accumulate} with batches of {sizes} images leaves a part of one "
            "image, which a BatchNorm cannot normalise; use fewer parts or another batch size"
        )


def _check_start(run: Run) -> None:
    """Refuses processes that do not begin at the same step, as where each node has a folder of its own."""
    where = run.state.epoch, run.state.batch, run.state.step
    first = tuple(run.fabric.broadcast(where))
    if run.fabric.all_reduce(torch.tensor(float(where != first)), reduce_op="sum") > 0:
        raise LocalGradError(
            f"process {run.fabric.global_rank} begins at epoch {where[0]}, batch {where[1]}, and the first one at "
            f"epoch {first[0]}, batch {first[1]}: the run folder {run.folder.path} must be the same for all processes"
        )


def _has_batch_norm(run: Run) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())


# Fit
@contextlib.contextmanager
def _memory_errors(run: Run) -> Iterator[None]:
    """Says of an out-of-memory error what `plan` would do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        from localgrad.training.memory_advice import memory_advice

        device = run.fabric.device
        capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        advice = memory_advice(run.config, run.train.num_classes, _cuts(run), capacity)
        raise LocalGradError(f"{str(error)[:300]}; {advice}") from error


def train_epoch(run: Run, display: Display, interrupted: Interrupts) -> None:
    """Trains the batches of the epoch that are not done yet, saving in between where that is asked for."""
    state, fabric, every = run.state, run.fabric, run.config.checkpoint_every
    if run.rate is not None:
        run.rate.fill_(run.learning_rate)
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = run.learning_rate if run.rate is None else run.rate
    sums = _own_sums(run)
    run.seconds.clear()
    begin = time.perf_counter()
    for batch in _batches(run, interrupted.is_set):
        # the first step also makes the optimizers' state, so the second is measured too; neither is timed
        measured = state.step < 2
        losses = _measured_step(run, *batch) if measured else train_step(run, *batch)
        if losses is not None:
            told = torch.cat([losses, losses.new_ones(1)]) * len(batch[0])
            sums += told if run.guard is None else run.guard.only_if_open(told)
        state.batch, state.step = state.batch + 1, state.step + 1
        if display.is_due():
            _show(run, display, sums)
        now = time.perf_counter()
        run.seconds.extend([] if measured else [now - begin])
        begin = now
        if run.stage:  # asking all ranks would make each wait for the last
            stop = run.stage.is_last_batch
        elif run.guard is not None and fabric.world_size > 1:
            stop = run.guard.any_asked(interrupted.is_set())
        else:
            stop = fabric.strategy.reduce_boolean_decision(interrupted.is_set(), all=False)
        if stop or (every and state.step % every == 0):
            _settle(run)
            state.sums = _sums_of_all(run, sums)
            sums = _own_sums(run)
            save(run)
        if stop:
            said = f"interrupted in epoch {state.epoch} after step {state.step}; everything is saved"
            raise InterruptedRun(said, interrupted.number)
    _settle(run)
    state.sums = _sums_of_all(run, sums)


def _own_sums(run: Run) -> Tensor:
    """The sums so far, on this process's device; 0 for the blocks that other processes train."""
    kind = torch.float32 if run.fabric.device.type == "mps" else torch.float64
    sums = torch.tensor(run.state.sums, dtype=kind)
    if run.stage:
        sums[: run.own.start] = sums[run.own.stop : -1] = 0
    return sums.to(run.fabric.device)


def _sums_of_all(run: Run, sums: Tensor) -> list[float]:
    """The mean over the shares of a batch of each block's sum, and of the number of images."""
    if run.stage is None:
        return run.fabric.all_reduce(sums).tolist()
    total = run.fabric.all_reduce(sums, reduce_op="sum")
    return [*(total[:-1] / run.replicas).tolist(), float(total[-1] / run.fabric.world_size)]


def _settle(run: Run) -> None:
    if run.guard is not None:
        run.guard.settle(run)


def _show(run: Run, display: Display, sums: Tensor) -> None:
    display.step(
        epoch=run.epoch_of_epochs,
        done=run.state.batch,
        total=run.train.num_batches(run.batch_size, run.replicas, train=True),
        losses=(sums[run.own.start : run.own.stop] / sums[-1]).tolist() if sums[-1] else [],
        images_per_second=run.images_per_second,
    )


def _batches(run: Run, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Tensor, ...]]:
    """Inputs and targets; where blocks are shared also the features of this process's first block."""
    share: Any = {"train": True, "start": run.state.batch, "rank": run.replica, "world_size": run.replicas}
    batches = run.train.batches(
        run.batch_size, seed=run.config.seed, epoch=run.state.epoch, channels_last=run.config.channels_last, **share
    )
    if run.stage is None:
        return batches
    return run.stage.batches(batches, run.train.batch_sizes(run.batch_size, **share), stop)


def train_step(run: Run, inputs: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor | None:
    """One optimizer step of every block of this process on one batch.

    Whatever is drawn at random in it depends on the seed, the step, the share of the batch and the block alone, so a
    resumed run draws the same, and so do blocks on other devices.

    Args:
        run: the run.
        inputs: images (N, 3, H, W).
        targets: classes (N,).
        features: what the first block of this process gets; the inputs if not given.

    Returns:
        The mean loss of each block over the batch, before the step (num_blocks,), 0 for those of other processes; None
        where the host has skipped the batch, for all blocks, because a loss or gradient was not finite.

    Raises:
        LocalGradError: a loss or gradient is not finite and the batch may not be skipped. No optimizer of this
            process has stepped; with `step_each_block`, none of this block and those after it.
            Where a guard looks instead of the host, it says so after the next step, which changes nothing either.
    """
    if run.graphed is not None:
        torch.manual_seed(_step_seed(run, 0))
        own, norms = run.graphed(inputs, targets)
    else:
        done = _work(run, inputs, targets, features)
        if done is None:
            return None
        own, norms = done
    if run.guard is not None:
        run.guard.note(run, own, norms)
    if run.stage is None:
        return own
    losses = own.new_zeros(len(run.blocks))
    losses[run.own.start : run.own.stop] = own
    return losses


def _work(
    run: Run,
    inputs: Tensor,
    targets: Tensor,
    features: Tensor | None = None,
    context: Callable[[int], contextlib.AbstractContextManager[Any]] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What a step does on the device: losses and gradient norms of this process's blocks; None if it was skipped."""
    optim, stage, guard = run.config.optim, run.stage, run.guard
    own, kept = inputs.new_zeros(len(run.own)), kept_tensors(run)
    done = run.state.batch * optim.batch_size
    whole = min(optim.batch_size, len(run.train) - done)  # in all shares; one may have an image more
    number_of_parts = max(1, min(optim.accumulate, whole // run.replicas))  # the same in all shares
    parts = list(zip(*(each.tensor_split(number_of_parts) for each in (inputs, targets)), strict=True))
    block_norms: list[Tensor] = []
    for number, (part, part_targets) in enumerate(parts, start=1):
        share = len(part) / len(inputs)
        with contextlib.ExitStack() as no_sync:
            for block in run.wrapped if number < len(parts) else ():
                if isinstance(block, nn.parallel.DistributedDataParallel):
                    no_sync.enter_context(block.no_sync())
            part_losses = local_gradients(
                run.wrapped,
                part,
                part_targets,
                features=features,
                scale=len(part) * run.replicas / whole,
                context=context or _seeded(run, number),
                reach=run.config.reach,
                on_output=stage.send if stage else None,
                after_block=partial(_update_block, run, block_norms) if run.config.step_each_block else None,
            )
        own += share * torch.stack(part_losses)
    if run.config.step_each_block:
        return own, torch.cat(block_norms)
    norms = gradient_norms(run.own_blocks, own)
    if guard is not None:
        guard.look(run, own, norms)
    elif all_finite(run, own, norms):
        run.state.skipped_in_a_row = 0
    else:
        stop_or_skip(run, own, norms, kept)
        return None
    _clip(run, run.own_blocks, norms)
    if stage is not None:
        stage.take_weights()
    apply_updates(run.own_blocks, run.optimizers)
    if guard is not None:
        guard.put_back(run, kept)
    return own, norms


def _update_block(run: Run, block_norms: list[Tensor], index: int, loss: Tensor) -> None:
    """Check, clip and step one block alone."""
    block, losses = run.blocks[index], loss[None]
    norms = gradient_norms([block], losses)
    block_norms.append(norms)
    if run.guard is not None:
        run.guard.look(run, losses, norms)
    elif not all_finite(run, losses, norms):
        stop_or_skip(run, losses, norms, [], first=index)
    _clip(run, [block], norms)
    apply_updates([block], [run.optimizers[index]])


def _clip(run: Run, blocks: Sequence[Block], norms: Tensor) -> None:
    if run.config.optim.clip_norm is not None:
        for block, norm in zip(blocks, norms, strict=True):
            nn.utils.clip_grads_with_norm_(block.trainable_parameters(), run.config.optim.clip_norm, norm)


def _seeded(run: Run, part: int) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    seed = _step_seed(run, part)

    @contextlib.contextmanager
    def forward(index: int) -> Iterator[None]:
        torch.manual_seed(seed + run.own[index])
        with run.fabric.autocast():
            yield

    return forward


def _step_seed(run: Run, part: int) -> int:
    key = np.random.SeedSequence([run.config.seed, run.state.step, run.replica, part])
    return int(key.generate_state(1)[0])


def _measured_step(run: Run, *batch: Tensor) -> Tensor | None:
    losses, peak = measure_peak(lambda: train_step(run, *batch), run.fabric.device)
    largest = run.fabric.all_reduce(torch.tensor(peak, device=run.fabric.device), reduce_op="max")
    run.state.peak_memory_bytes = int(largest)
    return losses


def finish_epoch(run: Run, display: Display) -> None:
    """Evaluates, writes the epoch's line of metrics, and moves the state to the next epoch."""
    state, config = run.state, run.config
    evaluated = state.epoch % config.evaluate_every == 0 or state.epoch == config.optim.epochs
    if evaluated:
        if run.stage:
            run.stage.gather()
        if run.replicas > 1:
            _share_buffers(run)
        with put_together(run.blocks):
            state.test_error, state.local_errors = error_rates(run.fabric, config, run.model, run.blocks, run.test)
        if state.best_epoch == 0 or state.test_error < state.best_test_error:
            state.best_test_error, state.best_epoch = state.test_error, state.epoch
    state.elapsed_seconds = time.perf_counter() - run.begin
    state.seconds_per_step = run.seconds_per_step
    line = {
        "epoch": state.epoch,
        "step": state.step,
        "lr": run.learning_rate,
        "train_loss": [total / state.sums[-1] for total in state.sums[:-1]] if state.sums[-1] else None,
        "skipped": state.skipped,
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


@torch.no_grad()
def _share_buffers(run: Run) -> None:
    """Gives every process the first one's running statistics: each has those of its own images, and these are saved."""
    buffers = {id(buffer): buffer for module in (run.model, *run.blocks) for buffer in module.buffers()}
    for buffer in buffers.values():
        torch.distributed.broadcast(buffer, 0)


# What a run says of itself
def _headline(run: Run) -> str:
    counts, state = run.parameters, run.state
    again = f", from epoch {state.epoch}, batch {state.batch}" if state.step else ""
    return (
        f"{run.config.name or run.config.model.name}: {len(run.blocks)} block{'s' * (len(run.blocks) > 1)}, "
        f"{counts['backbone']:,} parameters and {counts['auxiliary']:,} auxiliary, {len(run.train):,} images, "
        f"{run.fabric.device.type} {resolve_precision(run.config)}{again}, in {run.folder.path}"
    )


def _cuts(run: Run) -> list[str]:
    return [block.names[-1] for block in run.blocks[:-1]]


def _result(run: Run) -> Result:
    state = run.state
    return Result(
        config=to_dict(run.config),
        test_error=state.test_error,
        best_test_error=state.best_test_error,
        best_epoch=state.best_epoch,
        local_errors=state.local_errors,
        cuts=_cuts(run),
        num_blocks=len(run.blocks),
        parameters=run.parameters,
        peak_memory_bytes=state.peak_memory_bytes or 0,
        seconds_per_step=state.seconds_per_step,
        wall_seconds=state.elapsed_seconds,
        skipped=state.skipped,
        num_classes=run.train.num_classes,
        class_names=None if run.train.class_names is None else list(run.train.class_names),
        precision=resolve_precision(run.config),
        **provenance(run.fabric.device),
    )
