"""Error against cost: which runs count as which row, the front, and pictures and claims that match the results."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accuracy_tables

    return accuracy_tables


def put(path: Path, **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """End-to-end, the same checkpointed, DGL with two seeds, and three rows of a GPU, one cut off early."""
    costs = {"e2e": (1.0, 1.0), "e2e-checkpointed": (1.3, 0.3), "k16-dgl": (0.9, 0.25), "k16-dgl-reach2": (1.2, 0.4)}
    costs |= {"k8-dgl": (0.95, 0.31), "k4-dgl": (0.97, 0.43)}
    rows = [
        {"row": row, "blocks": 2, "operations_to_e2e": operations, "peak_to_e2e": peak}
        for row, (operations, peak) in costs.items()
    ]
    put(tmp_path / "results/operations.json", rows=rows)
    speed = {"row": "cifar10-resnet32-e2e", "seconds_per_step": 0.003}
    put(tmp_path / "results/gpu/speed.json", rows=[{**speed, "graph": True}, {**speed, "graph": False}])
    folder = tmp_path / "results/cifar10-ten-epochs"
    plain: dict[str, Any] = {"name": "cifar10-resnet32-e2e", "recompute": False}
    put(folder / "step-times.json", rows=[{"config": plain, "ratio_to_first": 1.0}])
    errors = [90.0 - 7 * epoch for epoch in range(1, 11)]
    put(folder / "e2e-seed0.json", config=plain, test_errors=errors)
    put(folder / "e2e-recompute-seed0.json", config={**plain, "recompute": True}, test_errors=errors)
    for seed in (0, 1):
        config = {"name": "cifar10-resnet32-k16-dgl"}
        put(folder / f"dgl-seed{seed}.json", config=config, test_errors=[error + 4 * seed for error in errors])
    cut = {"k16-dgl-reach2": (10, errors[:8]), "k8-dgl": (10, errors[:3]), "e2e": (30, errors)}
    runs = [
        {"recipe": f"cifar10-resnet32-{row}", "epochs_planned": planned, "num_blocks": 2, "test_errors": found}
        for row, (planned, found) in [("k16-dgl-reach2", (10, errors[:2])), *cut.items()]
    ]
    put(tmp_path / "results/gpu/trainings.json", rows=runs)
    return tmp_path


def test_runs_are_those_of_their_row_and_schedule(tables: Any, results: Path) -> None:
    rows = {row.name: row for row in tables.rows(results)}
    assert list(rows)[-1] == "k4-dgl"  # not trained
    assert len(rows["e2e"].cpu) == len(rows["e2e-checkpointed"].cpu) == 1
    assert rows["e2e"].gpu == []  # of thirty epochs
    assert (rows["k16-dgl"].error(8), rows["k16-dgl"].errors(10)) == (36.0, [20.0, 24.0])
    assert (len(rows["k16-dgl-reach2"].gpu), rows["k16-dgl-reach2"].error(8)) == (8, 34.0)
    assert rows["k8-dgl"].error(8) is None
    assert [rows[name].reach for name in ("k16-dgl", "k16-dgl-reach2")] == [1, 2]
    assert rows["e2e"].milliseconds == 3.0


def test_the_front_has_what_nothing_beats(tables: Any, results: Path) -> None:
    trained = tables.rows(results)
    assert {row.name for row in tables.front(trained, lambda row: row.peak)} == {"e2e-checkpointed", "k16-dgl"}
    assert {row.name for row in tables.front(trained, lambda row: row.operations)} == {"e2e", "k16-dgl"}
    assert [row.name for row in tables.front(trained, lambda row: row.seconds)] == ["e2e"], "the only measured one"


def test_a_table_has_every_row_once(tables: Any, results: Path) -> None:
    trained, others = tables.accuracy_table(results), tables.costs_table(results)
    for name in ("e2e", "e2e-checkpointed", "k16-dgl", "k16-dgl-reach2", "k8-dgl"):
        assert (f"| `{name}` |" in trained, f"| `{name}` |" in others) == (True, False)
    assert "| `k4-dgl` | 2 | 1 | 0.97 | 0.43 |  |" in others
    assert "36.00 ± 2.83 | 22.00 ± 2.83 | 2 | peak, operations |" in trained
    assert "| 34.00 | 20.00 | 1 | operations, CPU |" in trained
    assert "34.00 |  | 1, GPU |" in trained
    by_epoch = tables.epochs_table(results)
    assert "| `k8-dgl` | GPU | 1 | 83.0 | 76.0 | 69.0 |  |" in by_epoch
    assert "`k16-dgl` |" not in by_epoch
    assert tables.thirty_table(results).count("`e2e`") == 1


def test_the_pictures_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pictures

    for name, draw in pictures.DRAWN.items():
        assert (pictures.PICTURES / name).read_text() == draw(), f"python benchmarks/pictures.py draws {name} anew"
        assert any(name in page.read_text() for page in (ROOT / "docs").glob("*.md")), name


def test_every_claim_has_a_verdict_and_says_how_often_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import claims_table

    kinds = claims_table.HOLDS, claims_table.NOT_SEEN, claims_table.FAILS, claims_table.OPEN
    for says, measured, on, n, verdict in [*claims_table.MAN, *claims_table.OTHERS]:
        assert verdict.startswith(kinds), says
        assert bool(measured) == bool(on) == (n != "0"), says
        assert measured or verdict == claims_table.OPEN, says
