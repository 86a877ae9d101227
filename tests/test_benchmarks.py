"""The benchmarks run: every part of the one for a GPU, on a small network of a processor, and that of the step."""

import json
import tarfile
from pathlib import Path

import pytest

from localgrad.commands.main import COMMANDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_gpu_benchmark_does_everything_once_and_packs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    output = tmp_path / "gpu"
    arguments = ["--device", "cpu", "--tiny", "--parts", "speed,memory,train", "--rounds", "2", "--workers", "2"]
    arguments += ["--minutes", "5", "-o", str(output), "--pack", str(tmp_path / "gpu.tar.gz")]
    gpu.main(arguments)
    files = {str(path.relative_to(output)) for path in output.rglob("*.json")}
    assert files == {
        "memory.json",
        *(f"speed/cifar10-resnet32-{row}.json" for row in ("e2e-graph", "e2e-eager", "k16-auglocal-d2-reach2-graph")),
        *(f"tiny/cifar10-resnet32-{row}-seed0.json" for row in ("e2e", "k16-auglocal-d2-reach2")),
    }
    assert {json.loads((output / name).read_text())["kind"] for name in files} == {"benchmark", "run"}
    assert all(abs(row["error_percent"]) < 5 for row in json.loads((output / "memory.json").read_text())["rows"])
    result = json.loads((output / "tiny/cifar10-resnet32-k16-auglocal-d2-reach2-seed0.json").read_text())
    assert (result["finished"], result["num_blocks"], len(result["test_errors"])) == (True, 14, 2)
    assert all(len(losses) == 14 for losses in result["train_losses"])
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert {name.partition("/")[2] for name in archive.getnames() if name.endswith(".json")} == files

    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.*")}
    gpu.main(arguments)
    assert "failed" not in capfd.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.*")} == before, "done again"


def test_the_gpu_benchmark_starts_nothing_that_the_time_does_not_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import time

    from gpu_train import Queue

    done = tmp_path / "done"
    queue = Queue(workers=1, deadline=time.monotonic() + 4.0, output=tmp_path)
    work = [
        ("long", lambda: None, lambda: 60.0),
        ("short", lambda: done.write_text("short"), lambda: 0.0),
        ("broken", lambda: 1 / 0, lambda: 0.0),
        ("endless", lambda: time.sleep(100), lambda: 0.0),
    ]
    queue.run(work)  # pyright: ignore[reportArgumentType]
    assert done.read_text() == "short"
    assert queue.failed == ["broken"]
    assert "ZeroDivisionError" in (tmp_path / "errors" / "broken.txt").read_text()
    assert queue.left == ["long", "endless"]


def test_what_is_trained_on_a_gpu_is_what_the_trainer_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from dataclasses import replace

    import torch

    from gpu_train import Loop
    from localgrad.data.loading import load_images
    from localgrad.recipes import recipe
    from localgrad.training.trainer import fit

    config = recipe("digits-dgl-man").config
    config = replace(
        config,
        precision="32-true",
        accelerator="cpu",
        reach=2,
        optim=replace(config.optim, epochs=3, warmup_epochs=1, batch_size=16, accumulate=2),
        data=replace(config.data, train_limit=52, test_limit=40),
    )
    result = fit(config, tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train, test = load_images(config.data)
    loop = Loop(config, 10, torch.device("cpu"), graphed=False)
    for epoch, line in enumerate(lines, start=1):
        assert loop.epoch(train, epoch) == pytest.approx(line["train_loss"], rel=1e-4)  # pyright: ignore
    assert loop.error(test) == pytest.approx(result.test_error)  # pyright: ignore[reportArgumentType]


def test_images_for_the_gpu_are_those_that_the_project_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    datasets = pytest.importorskip("datasets")
    import numpy as np
    import torch
    from PIL import Image

    from gpu_data import load
    from localgrad.data.config import cifar10
    from localgrad.data.loading import load_images

    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train", 12), ("test", 6)):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        rows = datasets.Dataset.from_dict({"img": images, "label": [i % 2 for i in range(count)]}, features=features)
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    config = cifar10(str(tmp_path))
    for ours, theirs in zip(load(tmp_path, config, 2), load_images(config), strict=True):
        assert torch.equal(ours.images, theirs.images)  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.class_names == theirs.class_names


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


@pytest.mark.slow
def test_the_benchmarks_of_isolate_measure_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("timm")
    import isolate
    import isolate_sweep

    output = tmp_path / "isolate.json"
    isolate.main(["--size", "32", "--batch-size", "2", "--rounds", "1", "--momenta", "none", "-o", str(output)])
    rows = {row["row"]: row for row in json.loads(output.read_text())["none"]}
    assert rows["isolate"]["peak to split"] < 1.05
    isolate_sweep.main(["vit_tiny_patch16_224", "crossvit_tiny_240"])
    assert "man: 1 of 2 train in four blocks" in capfd.readouterr().out


def test_rows_at_equal_time_get_the_epochs_that_take_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import equal_time

    times = {"e2e": (1, 0.4), "half": (4, 0.2), "dear": (8, 1.1), "dearest": (8, 99.0)}
    rows = [
        {"num_blocks": blocks, "seconds_per_step": seconds, "config": {"name": name}}
        for name, (blocks, seconds) in times.items()
    ]
    found = {name: (epochs, round(share, 2)) for name, epochs, share in equal_time.budgets(rows, 10)}
    assert found == {"e2e": (10, 1.0), "half": (20, 1.0), "dear": (4, 1.1), "dearest": (1, 24.75)}
    rows.append({"num_blocks": 1, "seconds_per_step": 0.5, "config": {"name": "e2e", "recompute": True}})
    (tmp_path / "times.json").write_text(json.dumps({"rows": rows[::-1]}))
    equal_time.main([str(tmp_path / "times.json"), "--data", "my data", "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[5].startswith("localgrad train dear --data 'my data' --epochs 4 ")
    assert lines[0].startswith("localgrad train e2e --recompute --data 'my data' --epochs 8 ")
    folders = {line.partition("--run-dir ")[2].split()[0] for line in lines}
    assert len(folders) == len(lines), "each run has its own folder"
    with pytest.raises(SystemExit, match="end-to-end"):
        list(equal_time.budgets(rows[1:], 10))


def test_the_first_seconds_of_every_command_were_measured() -> None:
    found = json.loads((BENCHMARKS.parent / "results" / "first_sign.json").read_text())
    assert {row["row"].split()[0] for row in found["first_byte"]} >= {*COMMANDS}
    assert max(row["worst"] for row in found["first_byte"]) <= found["bar"]
    assert max(row["seconds"] for row in found["no_network"]) <= found["hub_bar"]
    later = [row[moment] for row in found["interrupts"] for moment in row if moment != "row" and float(moment) >= 0.05]
    assert {*later} <= {"one line", "ended before", "silent"} and later.count("one line") > 20
