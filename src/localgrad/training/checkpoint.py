"""Open the folder of a run, save checkpoints of the run, and load them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from localgrad.core.block import Block
from localgrad.errors import LocalGradError
from localgrad.parallel.shards import gathered_state, shard_optimizer_state, sharded_as
from localgrad.runs.folder import RunFolder, load_state
from localgrad.training.run import Run
from localgrad.training.state import state_of
from localgrad.training.tensorboard import Board, open_board


@contextmanager
def open_folder(run: Run, folder: RunFolder, resume: bool) -> Iterator[Board | None]:
    """Context: lock the folder of a run, load its newest checkpoint into the run if it is resumed, and start its files.

    Args:
        run: the run from `build_run`.
        folder: the folder. Callers check it with `folder.check` before they build the run. It is checked again here
            under the lock, since another process may have used it meanwhile.
        resume: whether to continue the run in the folder.

    Returns:
        Context with the TensorBoard writer of rank 0, or None without one. No other process can use the folder until
        the context ends.

    Raises:
        LocalGradError: another process uses the folder, the folder holds another or a finished run or was trained with
            other images, its checkpoints are damaged, or the ranks would begin at different steps.
    """
    config, board = run.config, None
    with ExitStack() as held:
        if run.fabric.is_global_zero:
            held.enter_context(folder.locked())
            folder.check(config, resume)
            folder.check_images(train=run.train, test=run.test)
        run.fabric.barrier()
        if resume and folder.has_checkpoint:
            load(run, folder)
        _check_start(run, folder)
        if run.fabric.is_global_zero:
            folder.start(config, run.state.lines)
            folder.keep_images(run.train, run.test)
            board = open_board(folder.path, run.state.epoch) if config.tensorboard else None
        run.fabric.barrier()
        yield board


def _check_start(run: Run, folder: RunFolder) -> None:
    """Refuse ranks that begin at different steps, which happens if each node has its own folder."""
    where = run.state.epoch, run.state.batch, run.state.step
    first = tuple(run.fabric.broadcast(where))
    differing: Any = run.fabric.all_reduce(torch.tensor(float(where != first)), reduce_op="sum")
    if differing > 0:
        raise LocalGradError(
            f"process {run.fabric.global_rank} begins at epoch {where[0]}, batch {where[1]}, and the first one at "
            f"epoch {first[0]}, batch {first[1]}: the run folder {folder.path} must be the same for all processes"
        )


def save(run: Run, folder: RunFolder) -> None:
    """Write a checkpoint of the run and keep the config's number of newest ones. Every rank must call this."""
    run.state.elapsed_seconds = time.perf_counter() - run.begin
    run.state.seconds_per_step = run.seconds_per_step
    run.placement.gather()
    saved = gathered_state(
        {
            "model": run.model.state_dict(),
            "auxiliary": [block.auxiliary_state_dict() for block in run.blocks],
            "optimizers": run.placement.gather_list([optimizer.state_dict() for optimizer in run.optimizers]),
        }
    )
    if run.fabric.is_global_zero:
        folder.save_checkpoint(saved | {"state": asdict(run.state)}, run.config.keep_checkpoints)
    run.fabric.barrier()  # if another rank ended now, the launcher would stop rank 0 while it writes


def load(run: Run, folder: RunFolder) -> None:
    """Load the newest intact checkpoint of a folder into the objects of a run.

    Raises:
        LocalGradError: no checkpoint is intact, or it belongs to another model or version.
    """
    path, saved = folder.newest_checkpoint()
    state = state_of(saved.get("state"), len(run.blocks), path)
    own = dict(zip(run.placement.own, run.optimizers, strict=True))
    optimizers = [own.get(index) for index in range(len(run.blocks))]  # None for another rank's block
    load_state(lambda values: _load_model(run.model, values), saved.get("model"), path)
    load_state(lambda values: _load_each(_load_auxiliary, run.blocks, values), saved.get("auxiliary"), path)
    load_state(lambda values: _load_each(_load_optimizer, optimizers, values), saved.get("optimizers"), path)
    vars(run.state).update(vars(state))  # in place, since the nonfinite check shares this object
    run.begin = time.perf_counter() - run.state.elapsed_seconds
    if run.fabric.is_global_zero:
        folder.set_aside_newer(path)


def _load_each(load_one: Callable[[Any, Any], None], parts: Sequence[Any], values: Any) -> None:
    for part, value in zip(parts, values, strict=True):
        load_one(part, value)


def _load_model(model: nn.Module, values: Any) -> None:
    model.load_state_dict(sharded_as(values, model.state_dict()))


def _load_auxiliary(block: Block, values: Any) -> None:
    block.load_auxiliary_state_dict(sharded_as(values, block.auxiliary_state_dict()))


def _load_optimizer(optimizer: torch.optim.Optimizer | None, values: Any) -> None:
    if optimizer is not None:
        optimizer.load_state_dict(values)
        shard_optimizer_state(optimizer)
