"""Checkpoints: what is saved of a run, and loaded into it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from localgrad.config.saved import fits
from localgrad.core.block import Block
from localgrad.errors import LocalGradError
from localgrad.parallel.shards import shard_optimizer_state, sharded_as, whole
from localgrad.runs.folder import load_state
from localgrad.training.state import Run, State


def save(run: Run) -> None:
    """Writes the checkpoint; the config says how many of the last ones stay."""
    run.state.elapsed_seconds = time.perf_counter() - run.begin
    run.state.seconds_per_step = run.seconds_per_step
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    if run.stage:
        run.stage.gather()
        on_cpu = tree_map_only(Tensor, Tensor.cpu, optimizers)
        optimizers = [state for states in run.stage.gather_objects(on_cpu) for state in states]
    saved = whole(
        {
            "model": run.model.state_dict(),
            "auxiliary": [block.auxiliary_state_dict() for block in run.blocks],
            "optimizers": optimizers,
        }
    )
    if run.fabric.is_global_zero:
        run.folder.save_checkpoint(saved | {"state": asdict(run.state)}, run.config.keep_checkpoints)
    run.fabric.barrier()  # a process that ended sooner would have the others stopped, this one while it writes


def load(run: Run) -> None:
    """Loads the folder's newest whole checkpoint into the objects of the run.

    Raises:
        LocalGradError: none is whole, or it is of another model or version.
    """
    path, saved = run.folder.newest_checkpoint()
    state = _state(saved.get("state"), len(run.blocks), path)
    own = dict(zip(run.own, run.optimizers, strict=True))
    numbers = range(len(run.blocks))
    load_state(lambda values: _load_model(run.model, values), saved.get("model"), path)
    for name, load_one in (
        ("auxiliary", lambda number, values: _load_auxiliary(run.blocks[number], values)),
        ("optimizers", lambda number, values: _load_optimizer(own.get(number), values)),
    ):
        load_state(
            lambda parts, one=load_one: [one(number, part) for number, part in zip(numbers, parts, strict=True)],
            saved.get(name),
            path,
        )
    run.state = state
    run.begin = time.perf_counter() - run.state.elapsed_seconds
    if run.fabric.is_global_zero:
        run.folder.set_aside_newer(path)


def _load_model(model: nn.Module, values: Any) -> None:
    model.load_state_dict(sharded_as(values, model.state_dict()))


def _load_auxiliary(block: Block, values: Any) -> None:
    block.load_auxiliary_state_dict(sharded_as(values, block.auxiliary_state_dict()))


def _load_optimizer(optimizer: torch.optim.Optimizer | None, values: Any) -> None:
    if optimizer is not None:  # else it is the optimizer of another process's block
        optimizer.load_state_dict(values)
        shard_optimizer_state(optimizer)


def _state(values: Any, num_blocks: int, path: Path) -> State:
    """The state of a checkpoint, with the types of every field checked."""
    hints = get_type_hints(State)
    if (
        not isinstance(values, dict)
        or values.keys() != hints.keys()
        or not all(fits(hint, values[name]) for name, hint in hints.items())
        or len(values["sums"]) != num_blocks + 1
    ):
        raise LocalGradError(
            f"{path} is not a checkpoint of this version of localgrad, or not of this run; "
            "start again in another --run-dir"
        )
    return State(**values)
