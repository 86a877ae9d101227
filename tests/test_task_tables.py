"""Tables of what the examples found: means, deviations, shares, order."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "task_tables.py"
SPEC = importlib.util.spec_from_file_location("task_tables", PATH)
assert SPEC is not None and SPEC.loader is not None
task_tables: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(task_tables)


def put(path: Path, **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": 10.0, "peak_mib": 100.0, **fields}))


def text(loss: float, *exits: float) -> dict[str, Any]:
    return {"validation_loss": loss, "perplexity": 2.0, "exits": exits, "trained_parameters": 3_000_000}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_language(tmp_path: Path) -> None:
    for seed, loss in enumerate((1.5, 1.6)):
        put(tmp_path / "language" / f"large-e2e-seed{seed}.json", **text(loss))
    put(tmp_path / "language" / "large-k3-man-seed0.json", **text(1.575, 1.8, 1.7))
    put(tmp_path / "language" / "large-k3-readout-seed0.json", **text(1.65, 1.9, 1.7))
    put(tmp_path / "language" / "small-e2e-seed0.json", **text(1.9))
    lines = task_tables.language_table(tmp_path, "large").splitlines()
    assert len(lines) == 5
    assert cells(lines[2])[:5] == ["1", "end-to-end", "2", "1.5500 ± 0.0707", "2.00"]
    assert cells(lines[3])[1:8] == ["readout", "1", "1.6500", "2.00", "+0.1000", "", "1.900"]
    assert cells(lines[4])[1:8] == ["readout, MAN", "1", "1.5750", "2.00", "+0.0250", "75 %", "1.800"]
    assert cells(lines[4])[8:] == ["3.00 M", "100", "10"]


def test_segmentation(tmp_path: Path) -> None:
    put(tmp_path / "segmentation" / "k4-seed0.json", mean_iou=50.0, peak_mib=60.0)
    put(tmp_path / "segmentation" / "k4-seed1.json", mean_iou=52.0, peak_mib=60.0)
    put(tmp_path / "segmentation" / "e2e-seed0.json", mean_iou=53.0)
    put(tmp_path / "segmentation" / "k4-man-seed0.json", mean_iou=49.0, average_frozen=True)
    lines = task_tables.segmentation_table(tmp_path).splitlines()
    assert cells(lines[2]) == ["end-to-end", "1", "53.00", "100", "100 %", "10"]
    assert cells(lines[3]) == ["K = 4", "2", "51.00 ± 1.41", "60", "60 %", "10"]
    assert cells(lines[4])[:3] == ["K = 4, MAN, EMA frozen", "1", "49.00"]


def test_selfsupervised(tmp_path: Path) -> None:
    put(tmp_path / "selfsupervised" / "e2e-seed0.json", probe_accuracies=[40.0, 50.0, 60.0, 70.0], peak_mib=None)
    lines = task_tables.selfsupervised_table(tmp_path).splitlines()
    assert cells(lines[2]) == ["end-to-end", "1", "40.0", "50.0", "60.0", "70.0", "", "10"]


@pytest.fixture
def goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from the results in `tmp_path` to measured value, n and verdict of each goal."""
    monkeypatch.syspath_prepend(PATH.parent)
    import task_goals

    peaks = {("local", 24): 7.0, ("checkpointed", 1): 5.0}
    peaks |= {("local, recompute", 24): 5.5, ("local, recompute, steps by block", 24): 4.5}
    rows = [
        {"row": row, "blocks": blocks, "peak_gib": peak, "largest_local_gib": 3.0, "last_gib": peak}
        for (row, blocks), peak in peaks.items()
    ]
    put(tmp_path / "results" / "language_memory.json", rows=rows)

    def found() -> dict[str, list[str]]:
        table = map(cells, task_goals.goals_table(tmp_path).splitlines()[2:])
        return {goal: [value, n, verdict] for goal, value, n, verdict in table}

    return found


def test_goals_without_runs_are_not_known(goals: Any) -> None:
    verdicts = [verdict for _, _, verdict in goals().values()]
    assert verdicts == ["not known: not run", "met", "missed", "met", *["not known: not run"] * 5]


def test_goals_follow_from_the_results(goals: Any, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "tasks"
    for seed in range(3):
        put(folder / f"language/small-e2e-seed{seed}.json", **text(1.905))
        for row, loss in {"e2e": 1.5, "k3-readout": 1.6, "k3-man": 1.54, "k3-bias": 1.57}.items():
            put(folder / f"language/large-{row}-seed{seed}.json", **text(loss))
            frozen = {"average_frozen": True} if row == "k3-man" else {}
            put(folder / f"language/mid-{row}-seed{seed}.json", **text(loss), **frozen)
    for row, iou, peak in (("e2e", 50, 100), ("k4-man-recompute", 49.5, 70), ("k4-man-recompute-wide", 51, 99)):
        put(folder / f"segmentation/{row}-seed0.json", mean_iou=iou, peak_mib=peak)
    for row, accuracy in (("e2e", 65.0), ("k4", 62.9)):
        put(folder / f"selfsupervised/{row}-seed0.json", probe_accuracy=accuracy)
    found = list(goals().values())
    assert found[0] == ["1.905", "3", "missed"]
    assert found[1] == ["60 %; trained copy alone: 30 %", "3", "not known: the EMA stood still"]
    assert found[2] == ["60 %; trained copy alone: 30 %", "3", "met"]
    assert found[6:9] == [["0.50 behind", "1", "met"], ["70 %", "1", "missed"], ["+1.00", "1", "met"]]
    assert found[9:] == [["2.10 behind", "1", "missed"], ["", "0", "not known: not run"]]
    (folder / "language/large-k3-man-seed2.json").unlink()
    assert list(goals().values())[2][1:] == ["2", "not known: fewer than 3 seeds"]


def test_curves_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PATH.parent)
    import pictures

    def run(seed: int, *losses: float) -> dict[str, Any]:
        return {"settings": {"seed": seed}, "curve": [[100 * (i + 1), loss] for i, loss in enumerate(losses)]}

    runs = {"e2e": [run(0, 3.0, 2.0), run(1, 4.0, 2.5)], "k3-man": [run(1, 4.5, 2.0), run(0, 3.5, 2.5), run(2, 9, 9)]}
    runs["k3-man"][0]["average_frozen"] = True
    whole, man = pictures.curves(runs, differences=False)
    assert (whole.label, whole.steps, whole.means) == ("end-to-end (n = 2)", [100, 200], [3.5, 2.25])
    assert whole.deviations == pytest.approx([0.5**0.5, 0.125**0.5])
    assert man.label == "the same, MAN, EMA frozen (n = 3)"
    (difference,) = pictures.curves(runs, differences=True)
    assert difference.label.endswith("(n = 2)"), "a seed without end-to-end training has no difference"
    assert (difference.means, difference.deviations) == ([0.5, 0.0], pytest.approx([0.0, 0.5**0.5]))


@pytest.mark.parametrize(("task", "titles"), [("language", "LANGUAGE"), ("segmentation", "PIXELS")])
def test_every_job_has_a_title(task: str, titles: str) -> None:
    spec = importlib.util.spec_from_file_location("task_jobs", PATH.with_name("task_jobs.py"))
    assert spec is not None and spec.loader is not None
    task_jobs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task_jobs)
    names = {name.rsplit("-seed", 1)[0] for name, *_ in getattr(task_jobs, task)()}
    known = set(getattr(task_tables, titles))
    plain = {name.split("-", 1)[1] if task == "language" else name for name in names}
    plain = {name.split("-", 1)[1] if task == "language" and name[:1] == "k" else name for name in plain}
    assert plain <= known
