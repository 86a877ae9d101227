"""The four placements can stand for each other; what a placement changes comes back, after an error too."""

import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.processes import run_ranks
from helpers.runs import LOCAL, NORM_FREE, weights
from helpers.training import eventful
from localgrad.config.schema import TrainConfig
from localgrad.parallel.shards import unsharded
from localgrad.training import placement
from localgrad.training.build import build_run
from localgrad.training.placement import BlockParallel, DataParallel, OneDevice, Sharded
from localgrad.training.step import train_step
from localgrad.training.trainer import epoch_batches, fit

KINDS = (OneDevice, DataParallel, Sharded, BlockParallel)


def _methods(kind: type[Any]) -> dict[str, str]:
    found = {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name: str(inspect.signature(value, eval_str=False)).split("->")[0] for name, value in found.items()}


def test_all_of_them_have_the_same_methods_and_no_parent() -> None:
    first, *others = map(_methods, KINDS)
    assert len(first) == 10
    assert all(other == first for other in others)
    assert all(kind.__bases__ == (object,) for kind in KINDS)
    assert all(f"    {name}" in (placement.__doc__ or "") for name in first), "described once, at the top"


class _BrokenError(Exception):
    pass


def _unshard_and_fail() -> list[list[int]]:
    """Sizes of this rank's part of a weight: before, while it is whole, after an error, and of one that trains on."""
    run = build_run(replace(LOCAL, devices=2, parallel="shards"))
    weight: Any = run.blocks[0].trainable_parameters()[0]
    sizes = [list(weight.to_local().shape)]
    try:
        with unsharded(run.blocks):
            sizes.append(list(run.blocks[0].trainable_parameters()[0].shape))
            raise _BrokenError
    except _BrokenError:
        again: Any = run.blocks[0].trainable_parameters()[0]
        sizes.append(list(again.to_local().shape))
    train_step(run, *next(iter(epoch_batches(run))))
    return sizes


@pytest.mark.ranks
def test_weights_are_shards_again_after_an_error() -> None:
    for before, gathered, after in run_ranks(_unshard_and_fail, 2):
        assert before == after
        assert gathered == [2 * before[0], *before[1:]]


def _fit_without_norms(config: TrainConfig, run_dir: Path) -> None:
    fit(config, run_dir, quiet=True, images=eventful(config, {}))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("changes", [{"reach": 2}, {"step_each_block": True}])
def test_two_ranks_that_share_images_train_what_one_would(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(NORM_FREE, **changes)
    run_ranks(_fit_without_norms, 1, config, tmp_path / "one")
    run_ranks(_fit_without_norms, 2, replace(config, devices=2), tmp_path / "two")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-6)


def _totals() -> tuple[int, list[float]]:
    run = build_run(replace(LOCAL, devices=2, parallel="blocks"))
    own = run.placement.own
    return own.start, run.placement.totals(torch.tensor([*map(float, own), 7.0], dtype=torch.float64))


@pytest.mark.ranks
def test_every_rank_gets_the_sums_of_all_blocks() -> None:
    (first, sums), (second, others) = run_ranks(_totals, 2)
    assert (first, second > 0) == (0, True)
    assert sums == others == [0.0, 1.0, 2.0, 7.0]
    assert "RANK" not in os.environ
