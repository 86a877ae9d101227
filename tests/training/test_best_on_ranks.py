"""Best epoch and patience on two ranks: they choose and stop alike, and the file has the weights of that epoch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import run_ranks
from helpers.runs import LOCAL, read_metrics
from localgrad.config.schema import TrainConfig
from localgrad.data.loading import load_images, load_validation
from localgrad.runs.load import load_run
from localgrad.training import trainer
from localgrad.training.trainer import fit

CONFIG = replace(
    LOCAL,
    data=replace(LOCAL.data, train_limit=60, test_limit=90),
    optim=replace(LOCAL.optim, epochs=6, warmup_epochs=0, batch_size=10, lr=0.05),
    patience=2,
    keep_best=True,
    devices=2,
)
CHOSEN = [50.0, 40.0, 45.0, 41.0]
"""Errors that the epoch is chosen by: the second is the best, and patience ends after the fourth."""


def _fit(config: TrainConfig, run_dir: Path, planned: list[float]) -> tuple[tuple[Any, ...], list[float]]:
    """What this rank knows of the run, and the errors that were measured instead of the planned ones."""
    measured, measure = [], trainer.error_rates

    def error_rates(*arguments: Any, **options: Any) -> Any:
        error, local = measure(*arguments, **options)
        measured.append(error)
        return planned[len(measured) - 1], local

    trainer.error_rates = error_rates
    result = fit(config, run_dir, quiet=True)
    return (result.best_epoch, result.best_test_error, result.test_error, result.chosen_on), measured


def error(run: Path, config: TrainConfig, *, best: bool, validation: bool = False) -> float:
    """Error of the weights that a run left, on one process."""
    images = load_validation(config.data) if validation else load_images(config.data)[1]
    model, wrong = load_run(run, best=best).model, 0
    for inputs, targets in images.batches(30, train=False):
        wrong += int((model(inputs).argmax(1) != targets).sum())
    return 100 * wrong / len(images)


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", ["data", "blocks", "shards"])
def test_all_ranks_choose_the_same_epoch_and_stop_together(parallel: str, tmp_path: Path) -> None:
    config = replace(CONFIG, parallel=parallel)
    first, second = run_ranks(_fit, 2, config, tmp_path / "run", CHOSEN)
    (known, measured), run = first, tmp_path / "run"
    assert first == second and known == (2, 40.0, 41.0, "test")
    assert [line["test_error"] for line in read_metrics(run)] == CHOSEN
    assert error(run, config, best=True) == pytest.approx(measured[1])
    assert error(run, config, best=False) == pytest.approx(measured[3])


@pytest.mark.ranks
def test_all_ranks_choose_by_the_validation_images(tmp_path: Path) -> None:
    config = replace(CONFIG, parallel="blocks", data=replace(CONFIG.data, validation_split="train"))
    planned = [each for chosen in CHOSEN for each in (90 - chosen, chosen)]  # test, then validation
    first, second = run_ranks(_fit, 2, config, tmp_path / "run", planned)
    (known, measured), run = first, tmp_path / "run"
    assert first == second and known == (2, 50.0, 49.0, "validation")
    assert [line["validation_error"] for line in read_metrics(run)] == CHOSEN
    assert error(run, config, best=True, validation=True) == pytest.approx(measured[3])


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
