"""The benchmarks run: every part of the one for a GPU, on a small network of a processor, and that of the step."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_benchmark_does_each_row_once_and_stops_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    arguments = ["--device", "cpu", "--tiny", "--rounds", "1", "--epochs", "4", "-o", str(tmp_path)]
    gpu.main([*arguments, "--minutes", "0"])
    assert not (tmp_path / "gpu.json").exists()
    assert "the time was up before\n  memory: cifar_resnet 8, end-to-end, checkpointed" in capsys.readouterr().out

    gpu.main(arguments)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["memory"] * 6 + ["speed"] * 3 + ["train"]
    assert all(abs(row["error_percent"]) < 5 for row in rows[:6])
    assert all(row["seconds_per_step"] > 0 for row in rows[6:])
    assert rows[-1]["epochs"] == 4

    monkeypatch.setattr(gpu.Job, "plan", lambda job: pytest.fail("measured again"))
    monkeypatch.setattr(gpu, "train", lambda *arguments: pytest.fail("trained again"))
    gpu.main(arguments)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows


def test_a_training_that_the_time_does_not_allow_is_saved_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    arguments = ["--device", "cpu", "--tiny", "--parts", "train", "--epochs", "100000", "-o", str(tmp_path)]
    monkeypatch.setattr(gpu, "SPARE_SECONDS", 0.0)
    gpu.main([*arguments, "--minutes", "0.05"])
    assert "the same command goes on from here" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-dgl-man" / "checkpoint.pt").exists()
    assert not (tmp_path / "gpu.json").exists()


def test_the_speed_benchmark_compares_the_trainer_with_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed

    output = tmp_path / "speed.json"
    arguments = ["--data", "digits", "--batch-size", "4", "--rounds", "2", "--rows", "EMA branch", "-o", str(output)]
    speed.main(arguments)
    rows = {row.pop("row"): row for row in json.loads(output.read_text())["rows"]}
    first, *loops = rows
    assert first == "DGL+MAN, 15 blocks, EMA branch alone"
    assert len(loops) == 2
    reference = rows["plain loop, float32 NCHW"]
    assert (reference["ratio_to_float32_nchw"], reference["ratio_of_operations"]) == (1.0, 1.0)
    assert rows[first]["ratio_of_operations"] > 1.2
    assert all(row["seconds_per_step"] > 0 for row in rows.values())


def test_pairs_in_the_wrong_order_are_counted_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    peaks = [(1.0, 1.0), (2.0, 2.0), (3.0, 2.001), (4.0, 1.5)]
    rows = [{"row": "m", "precision": "p", "predicted_mib": p, "measured_mib": m} for p, m in peaks]
    assert memory.order(rows) == {"pairs": 5, "wrong": 2}
