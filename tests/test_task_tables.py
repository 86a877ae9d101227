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
