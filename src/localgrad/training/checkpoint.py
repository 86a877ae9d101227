"""A run and its folder: opening it, saving the run there, and loading it back."""

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
    """Locks a folder for a run, loads the folder's newest checkpoint into it where it is resumed, starts its files.

    Args:
        run: as it was built.
        folder: checked with `folder.check` before the run was built; checked again here, once it is locked, for another
            process may have been there meanwhile.
        resume: whether to continue what is there.

    Returns:
        Context with the TensorBoard writer of rank 0, if the config asks for one. No other process can use the folder
        until the context ends.

    Raises:
        LocalGradError: another process uses the folder, it holds another or a finished run or was trained with
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
    """Refuses ranks that do not begin at the same step, as where each node has a folder of its own."""
    where = run.state.epoch, run.state.batch, run.state.step
    first = tuple(run.fabric.broadcast(where))
    differing: Any = run.fabric.all_reduce(torch.tensor(float(where != first)), reduce_op="sum")
    if differing > 0:
        raise LocalGradError(
            f"process {run.fabric.global_rank} begins at epoch {where[0]}, batch {where[1]}, and the first one at "
            f"epoch {first[0]}, batch {first[1]}: the run folder {folder.path} must be the same for all processes"
        )


def save(run: Run, folder: RunFolder) -> None:
    """Writes a checkpoint; the config says how many of the last ones stay."""
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
    run.fabric.barrier()  # a process that ended sooner would have the others stopped, this one while it writes


def load(run: Run, folder: RunFolder) -> None:
    """Loads the folder's newest whole checkpoint into the objects of a run.

    Raises:
        LocalGradError: none is whole, or it is of another model or version.
    """
    path, saved = folder.newest_checkpoint()
    state = state_of(saved.get("state"), len(run.blocks), path)
    own = dict(zip(run.placement.own, run.optimizers, strict=True))
    optimizers = [own.get(index) for index in range(len(run.blocks))]  # None: of another rank's block
    load_state(lambda values: _load_model(run.model, values), saved.get("model"), path)
    load_state(lambda values: _load_each(_load_auxiliary, run.blocks, values), saved.get("auxiliary"), path)
    load_state(lambda values: _load_each(_load_optimizer, optimizers, values), saved.get("optimizers"), path)
    vars(run.state).update(vars(state))  # in place: the check counts there too
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
