"""Kill a training at random moments, resume it each time, and compare its result with an uninterrupted run.

    python benchmarks/kills.py --kills 200 -o results/kills.json

A sitting is a forked process that trains or evaluates the tiny digits run and gets SIGKILL after a random time. After
each kill the script reads every file: no file may be half-written. The next sitting must start at most one checkpoint
interval before the last step of the killed one. The finished run must equal the uninterrupted run bit for bit in
weights, auxiliary networks, optimizer states, metrics and result; only times may differ.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.fabric  # noqa: F401 (imported once, before the forks)
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch
from safetensors.torch import load_file

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.results import evaluation
from localgrad.runs.files import versions
from localgrad.training import trainer
from report import environment, write

CONFIG = TrainConfig(
    name="tiny",
    model=ModelConfig(depth=8),
    data=replace(data.digits(), image_size=8, padding=1, train_limit=200, test_limit=360),
    cuts=("layer1.0", "layer2.0"),
    objective=ObjectiveConfig(name="dgl"),
    momentum=MomentumConfig(name="man"),
    optim=OptimConfig(lr=0.1, batch_size=32, epochs=4, warmup_epochs=1),
    accelerator="cpu",
    precision="32-true",
    local_heads=True,
    checkpoint_every=3,
)
TIMES = {"seconds_per_step", "images_per_second", "elapsed_seconds", "wall_seconds", "commit", "date"}
"""Fields that may differ: times, and the commit if the code changes during the benchmark."""
PHASES = ("set-up", "training", "saving", "evaluating", "finishing", "localgrad evaluate")


class Board:
    """Shared memory that the sitting writes and the killer reads: phase, first step, and number of finished steps."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)
        self.write(0, -1, 0)

    def write(self, phase: int, first: int, done: int) -> None:
        self._memory[:] = struct.pack("qqq", phase, first, done)

    def read(self) -> tuple[int, int, int]:
        phase, first, done = struct.unpack("qqq", self._memory[:])
        return phase, first, done


def train(board: Board, run_dir: Path) -> None:
    """One sitting of `localgrad train` or `localgrad train --resume`, which writes its progress to the board."""
    board.write(0, -1, 0)
    names = {"train_step": 1, "save": 2, "finish_epoch": 3}
    originals: dict[str, Callable[..., Any]] = {name: getattr(trainer, name) for name in names}

    def noted(name: str) -> Callable[..., Any]:
        def call(run: Any, *arguments: Any) -> Any:
            first = board.read()[1]
            board.write(names[name], first if first >= 0 else run.state.step, run.state.step)
            result = originals[name](run, *arguments)
            done = run.state.step + (name == "train_step")  # the trainer increments its counter right after
            board.write(4 if run.state.epoch > run.config.optim.epochs else 1, board.read()[1], done)
            return result

        return call

    for name in names:
        setattr(trainer, name, noted(name))
    trainer.fit(CONFIG, run_dir, resume=(run_dir / "config.json").exists(), quiet=True)


def evaluate(board: Board, run_dir: Path) -> None:
    """`localgrad evaluate --local-heads`."""
    board.write(5, -1, 0)
    evaluation.evaluate(run_dir, local_heads=True, accelerator="cpu")


def sitting(work: Callable[[Board, Path], None], board: Board, run_dir: Path, after: float | None) -> bool:
    """Runs the work in its own process; returns whether the process was killed before it finished.

    Raises:
        RuntimeError: the process failed by itself.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(board, run_dir)
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # before waitpid, so the process id still belongs to the child
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"a sitting in {run_dir} failed with status {status}")
    return False


def contents(run_dir: Path) -> dict[str, Any]:
    """The contents of all files in a run folder, without times; a half-written file raises."""
    found: dict[str, Any] = {}
    for name in ("config.json", "result.json"):
        if (run_dir / name).exists():
            values = json.loads((run_dir / name).read_text())
            found[name] = {key: value for key, value in values.items() if key not in TIMES}
    if (run_dir / "metrics.jsonl").exists():
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        found["metrics.jsonl"] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    for path in versions(run_dir / "checkpoint.pt").values():
        found[path.name] = torch.load(path, weights_only=True)
        state = found[path.name]["state"]
        found[path.name]["state"] = {key: value for key, value in state.items() if key not in TIMES}
    if (run_dir / "model.safetensors").exists():
        found["model.safetensors"] = load_file(run_dir / "model.safetensors")
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether two nested structures of dicts, lists, tensors and plain values are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def kill_runs(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills and resumes runs until each is finished, and repeats this until there were enough kills.

    Raises:
        AssertionError: a kill lost more than one checkpoint interval, or a finished run differs from the uninterrupted
            one.
    """
    chance, board = random.Random(seed), Board()
    straight = folder / "straight"
    begin = time.monotonic()
    sitting(train, board, straight, None)
    duration = time.monotonic() - begin
    expected, files = contents(straight), sorted(path.name for path in straight.iterdir())
    phases: Counter[str] = Counter()
    lost: list[int] = []
    runs = left_over = readings = 0

    def kill(work: Callable[[Board, Path], None], run_dir: Path, longest: float) -> bool:
        killed = sitting(work, board, run_dir, chance.uniform(0, longest))
        phases.update([PHASES[board.read()[0]]] if killed else [])
        return killed

    while phases.total() < kills:
        run_dir, reached, going = folder / f"run{runs}", 0, True
        while going:
            going = kill(train, run_dir, duration) if phases.total() < kills else sitting(train, board, run_dir, None)
            _, first, done = board.read()
            if first >= 0:  # the sitting reached its first step
                lost.append(reached - first)
                assert 0 <= lost[-1] <= CONFIG.checkpoint_every, f"{run_dir}: {lost[-1]} steps were lost"
                reached = done
            if run_dir.exists():
                contents(run_dir)  # raises if a file is half-written
                readings += 1
                left_over += bool(list(run_dir.glob(".*.tmp")))
        for _ in range(2):
            if phases.total() < kills:
                kill(evaluate, run_dir, duration / 3)
        names = sorted(path.name for path in run_dir.iterdir())
        assert names == files, f"{run_dir} holds {names}, not {files}"
        found = contents(run_dir)
        wrong = [name for name, value in expected.items() if not equal(found[name], value)]
        assert not wrong, f"{', '.join(wrong)} of {run_dir} are not those of the run that was left alone"
        shutil.rmtree(run_dir)
        runs += 1
    return {
        "kills": phases.total(),
        "kills_by_phase": {name: phases[name] for name in PHASES},
        "runs_finished_bit_identical": runs,
        "steps_of_a_run": expected["checkpoint.pt"]["state"]["step"],
        "checkpoint_every": CONFIG.checkpoint_every,
        "most_steps_lost": max(lost),
        "mean_steps_lost": sum(lost) / len(lost),
        "folders_read_with_every_file_whole": readings,
        "temporary_files_cleared_away": left_over,
        "seconds_of_an_uninterrupted_run": duration,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = kill_runs(options.kills, options.seed, Path(scratch))
    print(json.dumps(found, indent=1))
    if options.output:
        write(options.output, {**found, **environment()})
