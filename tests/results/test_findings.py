"""Findings: the gain of a momentum network is that of equal seeds, and nothing else differs."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.results import make_config, read, write_run
from localgrad.results.findings import Finding, finding
from localgrad.results.tables import tables


def _finding(folder: Path) -> Finding:
    (table,) = tables(read(folder)[0].runs)
    return finding(table)


def _write(folder: Path, **errors: list[float]) -> None:
    for name, seeds in errors.items():
        for seed, error in enumerate(seeds):
            config = make_config(f"cifar10-resnet32-{name.replace('_', '-')}", seed=seed)
            write_run(folder / f"{name}{seed}.json", config, error)


def test_a_gain_is_the_mean_of_pairs_of_equal_seeds(tmp_path: Path) -> None:
    _write(tmp_path, k16_dgl=[30.0, 33.0, 50.0], k16_dgl_man=[28.0, 30.0])
    (gain,) = _finding(tmp_path).gains
    assert gain.differences == [2.0, 3.0]
    assert gain.mean == 2.5


def test_without_a_common_seed_it_is_that_of_the_means(tmp_path: Path) -> None:
    _write(tmp_path, k16_dgl=[30.0, 34.0])
    write_run(tmp_path / "man.json", make_config("cifar10-resnet32-k16-dgl-man", seed=9), 30.0)
    (gain,) = _finding(tmp_path).gains
    assert gain.differences == [2.0]


def test_the_plain_form_of_man_counts_and_each_objective_has_its_own(tmp_path: Path) -> None:
    _write(
        tmp_path,
        k16_dgl=[30.0],
        k16_dgl_man_ema_only=[20.0],
        k16_dgl_man=[28.0],
        k16_dgl_manpp=[21.0],
        k16_infopro=[40.0],
        k16_infopro_man=[41.0],
    )
    found = _finding(tmp_path)
    assert {gain.label: gain.mean for gain in found.gains} == {"DGL + MAN": 2.0, "InfoPro + MAN": -1.0}
    assert found.best is not None
    assert found.best.label == "DGL + MAN (EMA only)"


@pytest.mark.parametrize("field", ["weight_decay", "label_smoothing"])
def test_rows_that_differ_in_more_make_no_gain(field: str, tmp_path: Path) -> None:
    plain = make_config("cifar10-resnet32-k16-dgl")
    other = make_config("cifar10-resnet32-k16-dgl-man")
    write_run(tmp_path / "plain.json", plain, 30.0)
    write_run(tmp_path / "other.json", replace(other, optim=replace(other.optim, **{field: 0.5})), 20.0)
    assert _finding(tmp_path).gains == ()


def test_end_to_end_training_is_the_plain_one_and_its_rival_the_checkpointed_one(tmp_path: Path) -> None:
    plain = make_config("cifar10-resnet32-e2e")
    parts = replace(plain, optim=replace(plain.optim, accumulate=4))
    for name, config in (("kept", plain), ("recomputed", replace(plain, recompute=True)), ("parts", parts)):
        write_run(tmp_path / f"{name}.json", config, 20.0)
    _write(tmp_path, k16_dgl=[30.0])
    found = _finding(tmp_path)
    assert found.end_to_end is not None
    assert found.checkpointed is not None
    assert (found.end_to_end.label, found.checkpointed.label) == ("End-to-end", "End-to-end (checkpointed)")
    memory = {position: row.mean("peak_memory_bytes") for position, row in enumerate(found.table.rows)}
    expected = statistics.fmean(found.best.values("peak_memory_bytes")) / found.end_to_end.mean("peak_memory_bytes")  # type: ignore[union-attr]
    assert found.to_end_to_end(found.best, memory) == pytest.approx(expected)
    assert found.to_end_to_end(found.best, {}) is None
