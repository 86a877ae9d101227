"""Train for many steps and check that the memory and the open files of the process do not grow.

    python benchmarks/long_run.py --steps 2000 -o results/long_run.json

The run is the tiny digits run of `kills.py`, with a checkpoint every 25 steps and an evaluation of every local head
after each epoch. After each step the script reads the resident memory and the number of open files from /proc (Linux).
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from kills import CONFIG
from localgrad.training import trainer
from localgrad.training.run import Run
from localgrad.training.trainer import fit
from report import environment, write

STEPS_PER_EPOCH = 7
WARM_UP = 200
"""Number of steps after which memory must not grow."""


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(steps: int, run_dir: Path) -> dict[str, Any]:
    """Train; returns memory and open files of the process, and checks of the metrics."""
    epochs = -(-steps // STEPS_PER_EPOCH)
    config = replace(CONFIG, checkpoint_every=25, optim=replace(CONFIG.optim, epochs=epochs))
    sizes: list[int] = []
    files: list[int] = []
    original = trainer.train_step

    def watched(run: Run, *batch: Any) -> Any:
        losses = original(run, *batch)
        sizes.append(resident())
        files.append(len(list(Path("/proc/self/fd").iterdir())))
        return losses

    trainer.train_step = watched
    result = fit(config, run_dir, quiet=True)
    trainer.train_step = original
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    after = sizes[WARM_UP : WARM_UP + 100]
    return {
        "steps": len(sizes),
        "resident_MiB_after_200_steps": statistics.median(after) / 2**20,
        "resident_MiB_at_the_end": statistics.median(sizes[-100:]) / 2**20,
        "largest_resident_MiB_after_200_steps": max(sizes[WARM_UP:]) / 2**20,
        "growth_percent": 100 * (statistics.median(sizes[-100:]) / statistics.median(after) - 1),
        "open_files_after_200_steps": [min(files[WARM_UP:]), max(files[WARM_UP:])],
        "metrics_complete": [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        and [line["step"] for line in lines] == [STEPS_PER_EPOCH * epoch for epoch in range(1, epochs + 1)],
        "test_error": result.test_error,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = watch(options.steps, Path(scratch) / "run")
    print(json.dumps(found, indent=1))
    if options.output:
        write(options.output, {**found, **environment()})
