"""The command lines of the examples to run on a GPU, by priority; each writes one JSON file.

    python benchmarks/task_jobs.py --data path/to/data --out results/tasks            # print them
    python benchmarks/task_jobs.py --data path/to/data --out results/tasks --run --workers 4

`jobs(data, out)` returns the list. A job has a name, arguments, a priority (0 first), and the seconds that it may take
alone on an H100. `data` contains the folders cifar10, camvid and shakespeare.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SMALL = ""  # the defaults are nanoGPT's small setting
MIDDLE = "--layers 6 --steps 1200 --lr 0.003"
SHORT = {
    "lr0.001": "--layers 6 --steps 1200",
    "lr0.006": "--layers 6 --steps 1200 --lr 0.006",
    "batch32": "--layers 6 --steps 1200 --batch-size 32",
}
"""Other learning rates and another batch size for `MIDDLE`, end-to-end and with a plain readout."""
THREE = "--layers 3 --batch-size 32 --steps 1200 --lr 0.003"
"""One layer a block: on a CPU in minutes, with a first block too small to be as good as the whole."""
LARGE = "--layers 6 --heads 8 --width 256 --context 128 --batch-size 32 --dropout 0.1"
LOCAL = "--method local --blocks {blocks}"
HEADS = {
    "private": "--head private",
    "readout": "",
    "man": "--momentum man",
    "ema": "--momentum ema",
    "bias": "--momentum bias",
    "residual": "--momentum residual",
    "depth1": "--depth 1",
    "depth2": "--depth 2",
    "private-man": "--head private --momentum man",
}
PIXELS = "--steps 1500"
INSIDE = "backbone.layer1.0 backbone.layer2.0 backbone.layer3.0"
STAGES = "--epochs 30 --images 20000"


class Job(NamedTuple):
    """One command line."""

    name: str
    arguments: list[str]
    priority: int
    seconds: float


def language() -> list[tuple[str, str, int, float]]:
    """Name, flags, priority and seconds of each job."""
    rows = [(f"small-e2e-seed{seed}", f"{SMALL} --seed {seed}", 0, 12.0) for seed in range(3)]
    rows += [
        (f"small-k2-{head}-seed0", f"{LOCAL.format(blocks=2)} {HEADS[head]}", 3, 20.0) for head in ("readout", "man")
    ]
    for seed in range(3):
        rows.append((f"mid-e2e-seed{seed}", f"{MIDDLE} --seed {seed}", 3, 12.0))
        rows.append((f"mid-l2-seed{seed}", f"{MIDDLE} --layers 2 --seed {seed}", 3, 5.0))
        for head, flags in HEADS.items():
            flags = f"{MIDDLE} {LOCAL.format(blocks=3)} {flags} --seed {seed}"
            rows.append((f"mid-k3-{head}-seed{seed}", flags, 3, 20.0))
        rows.append((f"three-e2e-seed{seed}", f"{THREE} --seed {seed}", 3, 12.0))
        for head in ("readout", "man", "ema", "bias", "depth1"):
            flags = f"{THREE} {LOCAL.format(blocks=3)} {HEADS[head]} --seed {seed}"
            rows.append((f"three-k3-{head}-seed{seed}", flags, 3, 20.0))
        rows.append((f"large-e2e-seed{seed}", f"{LARGE} --seed {seed}", seed, 18.0))
        for head, flags in HEADS.items():
            wanted = seed if head not in ("private-man", "ema", "depth2") or seed == 0 else seed + 1
            rows.append(
                (f"large-k3-{head}-seed{seed}", f"{LARGE} {LOCAL.format(blocks=3)} {flags} --seed {seed}", wanted, 30.0)
            )
        for blocks in (2, 6):
            for head in ("private", "readout", "man", "bias", "residual", "depth2"):
                flags = f"{LARGE} {LOCAL.format(blocks=blocks)} {HEADS[head]} --seed {seed}"
                rows.append((f"large-k{blocks}-{head}-seed{seed}", flags, seed + 1, 22.0 + 3 * blocks))
    for setting, flags in SHORT.items():
        for seed in range(3):
            rows.append((f"{setting}-e2e-seed{seed}", f"{flags} --seed {seed}", 4, 12.0))
            local = f"{flags} {LOCAL.format(blocks=3)} --seed {seed}"
            rows.append((f"{setting}-k3-readout-seed{seed}", local, 4, 20.0))
    rows.append(("large-checkpointed-seed0", f"{LARGE} --method checkpointed", 1, 22.0))
    return rows


def segmentation() -> list[tuple[str, str, int, float]]:
    """Name, flags, priority and seconds of each job."""
    k4 = f"{PIXELS} {LOCAL.format(blocks=4)}"
    wide = "--crop 180 240"
    rows = {
        "e2e": (PIXELS, 0),
        "k4": (k4, 0),
        "k4-man": (f"{k4} --momentum man", 1),
        "k4-man-recompute": (f"{k4} --momentum man --recompute", 0),
        "k4-reconstruction": (f"{k4} --reconstruction 1", 0),
        "checkpointed": (f"{PIXELS} --method checkpointed", 1),
        "k2": (f"{PIXELS} {LOCAL.format(blocks=2)}", 1),
        "k4-man-recompute-wide": (f"{k4} --momentum man --recompute {wide}", 1),
        "k4-inside-man-recompute": (f"{k4} --cuts {INSIDE} --momentum man --recompute", 0),
        "k4-inside": (f"{k4} --cuts {INSIDE}", 1),
        "k4-wide": (f"{k4} {wide}", 1),
        "e2e-wide": (f"{PIXELS} {wide}", 2),
        "checkpointed-wide": (f"{PIXELS} --method checkpointed {wide}", 2),
        "k4-bias": (f"{k4} --momentum bias", 2),
        "k2-man": (f"{PIXELS} {LOCAL.format(blocks=2)} --momentum man", 2),
    }
    return [
        (f"{name}-seed{seed}", f"{flags} --seed {seed}", priority + seed, 60.0 if wide in flags else 40.0)
        for seed in range(3)
        for name, (flags, priority) in rows.items()
    ]


def selfsupervised() -> list[tuple[str, str, int, float]]:
    """Name, flags, priority and seconds of each job."""
    rows = {
        "e2e": ("", 0),
        "k4": ("--method local", 0),
        "k4-noise": ("--method local --noise 0.25", 0),
        "k4-man": ("--method local --momentum man", 0),
        "k4-man-noise": ("--method local --momentum man --noise 0.25", 1),
        "k4-bias": ("--method local --momentum bias", 1),
    }
    return [
        (f"{name}-seed{seed}", f"{STAGES} {flags} --seed {seed}", priority + 2 * seed, 45.0)
        for seed in range(2)
        for name, (flags, priority) in rows.items()
    ]


def jobs(data: Path, out: Path) -> list[Job]:
    """All commands, sorted by priority; within a priority the longest first."""
    tasks = (("language", "shakespeare", language()), ("segmentation", "camvid", segmentation()))
    tasks = (*tasks, ("selfsupervised", "cifar10", selfsupervised()))
    found = []
    for task, folder, rows in tasks:
        for name, flags, priority, seconds in rows:
            where = ["--data", str(data / folder), "--out", str(out / task / f"{name}.json")]
            found.append(
                Job(
                    f"{task}/{name}", [sys.executable, f"examples/{task}.py", *where, *flags.split()], priority, seconds
                )
            )
    return sorted(found, key=lambda job: (job.priority, -job.seconds))


def run(wanted: Sequence[Job], out: Path, workers: int, deadline: float) -> list[str]:
    """Run the jobs that have no JSON yet, `workers` at a time; returns the names of failed jobs.

    A job that the deadline cuts off leaves no JSON.
    """

    def one(job: Job) -> str | None:
        left = deadline - time.monotonic()
        if left <= 0 or (out / f"{job.name}.json").exists():
            return None
        log = out / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("w") as file:
                code = subprocess.run(job.arguments, stdout=file, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return None
        print(f"{job.name}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
        if code == 0:
            log.unlink()
        return None if code == 0 else job.name

    with ThreadPoolExecutor(workers) as pool:
        return [name for name in pool.map(one, wanted) if name is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("results/tasks"))
    parser.add_argument("--only", nargs="+", default=None, help="beginnings of names, such as language/small")
    parser.add_argument("--run", action="store_true", help="run what has no JSON yet")
    parser.add_argument("--workers", type=int, default=1, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=600.0, help="when to stop")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    wanted = [
        job for job in jobs(options.data, options.out) if not options.only or job.name.startswith(tuple(options.only))
    ]
    if not options.run:
        for job in wanted:
            print(f"{job.priority}  {job.seconds:5.0f} s  {job.name:45}  {' '.join(job.arguments[1:])}")
    elif failed := run(wanted, options.out, options.workers, deadline):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
