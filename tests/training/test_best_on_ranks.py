"""Best epoch and patience on two ranks: they choose and stop alike, and the file has the weights of that epoch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import run_ranks
from helpers.runs import LOCAL, read_metrics
from helpers.training import PlannedErrors, planned
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.data.loading import load_images
from localgrad.runs.folder import RunFolder
from localgrad.runs.load import load_run
from localgrad.runs.result import Result
from localgrad.training.build import build_run
from localgrad.training.trainer import fit, train

CONFIG = replace(
    LOCAL,
    data=replace(LOCAL.data, train_limit=60, test_limit=100),
    optim=replace(LOCAL.optim, epochs=6, warmup_epochs=0, batch_size=10, lr=0.05),
    patience=2,
    keep_best=True,
    keep_checkpoints=4,
    devices=2,
)
CHOSEN = [50.0, 40.0, 45.0, 41.0]
"""Errors that the epoch is chosen by: the second is the best, and patience ends after the fourth."""


Known = tuple[int, float, float, str]


def _known(result: Result) -> Known:
    return result.best_epoch, result.best_test_error, result.test_error, result.chosen_on


def _fit(config: TrainConfig, run_dir: Path) -> Known:
    """What this rank knows of a run with planned errors on the test images."""
    return _known(fit(config, run_dir, quiet=True, images=planned(config, *CHOSEN)))


def _fit_validated(config: TrainConfig, run_dir: Path) -> Known:
    """What this rank knows of a run with planned errors on the validation images."""
    run = build_run(with_defaults(validate(config)))
    run.validation = PlannedErrors(**vars(run.validation), errors=[*CHOSEN])
    return _known(train(run, RunFolder(run_dir), quiet=True))


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", ["data", "blocks", "shards"])
def test_all_ranks_choose_the_same_epoch_and_stop_together(parallel: str, tmp_path: Path) -> None:
    first, second = run_ranks(_fit, 2, replace(CONFIG, parallel=parallel), tmp_path)
    assert first == second == (2, 40.0, 41.0, "test")
    assert [line["test_error"] for line in read_metrics(tmp_path)] == CHOSEN
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("checkpoint.pt*")]
    after = {each["state"]["epoch"] - 1: each["model"] for each in saved}
    for file, epoch in (("best.safetensors", 2), ("model.safetensors", 4)):
        found = load_file(tmp_path / file)
        assert found.keys() == after[epoch].keys()
        assert all(torch.equal(value, after[epoch][name]) for name, value in found.items())


def error(run: Path, config: TrainConfig, *, best: bool) -> float:
    """Error on the test images of the weights that a run left, on one process."""
    images, model, wrong = load_images(config.data)[1], load_run(run, best=best).model, 0
    for inputs, targets in images.batches(30, train=False):
        wrong += int((model(inputs).argmax(1) != targets).sum())
    return 100 * wrong / len(images)


@pytest.mark.ranks
def test_all_ranks_choose_by_the_validation_images(tmp_path: Path) -> None:
    config = replace(CONFIG, parallel="blocks", data=replace(CONFIG.data, validation_split="train"))
    first, second = run_ranks(_fit_validated, 2, config, tmp_path)
    lines = read_metrics(tmp_path)
    measured = [line["test_error"] for line in lines]
    assert first == second == (2, measured[1], measured[3], "validation")
    assert [line["validation_error"] for line in lines] == CHOSEN
    assert error(tmp_path, config, best=True) == pytest.approx(measured[1])
    assert error(tmp_path, config, best=False) == pytest.approx(measured[3])


@pytest.mark.ranks
def test_each_rank_counts_the_errors_of_all_ranks(tmp_path: Path) -> None:
    """Without a plan: were each rank to choose by its own images, one would save and the other go on."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, epochs=3), patience=None)
    first, second = run_ranks(_measured, 2, config, tmp_path / "run")
    errors = [line["test_error"] for line in read_metrics(tmp_path / "run")]
    assert first == second == (errors.index(min(errors)) + 1, min(errors), errors[-1])


def _measured(config: TrainConfig, run_dir: Path) -> tuple[int, float, float]:
    result = fit(config, run_dir, quiet=True)
    return result.best_epoch, result.best_test_error, result.test_error
