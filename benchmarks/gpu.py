"""Run everything that needs a GPU, within a time limit; the same command continues where it stopped.

    python benchmarks/gpu.py --data path/to/folders --minutes 9 -o results/gpu --pack results/gpu.tar.gz

- speed: seconds per step of the rows of `gpu_jobs.TIMED`, each alone on the GPU, with CUDA graphs and for some rows
  also without.
- tests: the tests of the suite that need a GPU.
- memory: the predicted peak of a step and that of the allocator, in float32 and under bf16 autocast.
- train: `gpu_jobs.TRAININGS`, several at the same time (with NVIDIA's MPS if it can be started). Each writes a JSON.
- tasks: the command lines of the examples (`task_jobs.jobs`), in the same way; only if --parts names it.

Finished work is not repeated. `--data` has a folder for each data set (`gpu_data.py` packs them). With `--device cpu
--tiny` every part runs on small networks and random images.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import localgrad
from gpu_data import load
from gpu_jobs import EAGER, TEN, TIMED, TINY, TRAININGS, Training
from gpu_train import Queue, Sets, is_finished, machine, predicted, save, time_steps, train
from localgrad.config.build import build_model
from localgrad.config.schema import ModelConfig
from localgrad.core.units import units
from localgrad.data.config import cifar10
from localgrad.data.sets import Images
from localgrad.planning.profile import profile
from localgrad.planning.simulation import Precision
from localgrad.planning.step_peak import step_peak
from task_jobs import Job as Task
from task_jobs import jobs as task_jobs

HALF = (0.5, 0.5, 0.5)
PARTS = ("speed", "tests", "memory", "train")
ALL_PARTS = (*PARTS, "tasks")
SPARE_SECONDS = 12.0
"""Seconds before the time limit that are kept for stopping the processes and packing the results."""
MPS_FOLDER = Path("/tmp/localgrad-mps")


@dataclass(frozen=True)
class Network:
    """A network to measure: model by name, batch and number of blocks."""

    name: str
    depth: int
    classes: int
    batch_size: int
    image_size: int
    num_blocks: int

    @property
    def label(self) -> str:
        return f"cifar_resnet {self.depth}" if self.name == "cifar_resnet" else self.name


@dataclass(frozen=True)
class Method:
    """A training method: objective, momentum and checkpointing."""

    objective: str | None
    momentum: Any
    recompute: bool = False


NETWORKS = (
    Network("cifar_resnet", 32, 10, 1024, 32, 15),
    Network("torchvision:resnet50", 0, 1000, 128, 224, 4),
)
TINY_NETWORKS = (Network("cifar_resnet", 8, 10, 4, 16, 3),)
TINY_METHODS = ("end-to-end, checkpointed", "DGL", "InfoPro+MAN, recomputed")
METHODS = {
    "end-to-end": Method(None, None),
    "end-to-end, checkpointed": Method(None, None, recompute=True),
    "DGL": Method("dgl", None),
    "DGL+MAN": Method("dgl", localgrad.man()),
    "DGL+MAN, recomputed": Method("dgl", localgrad.man(recompute=True)),
    "DGL+MAN, recomputed, checkpointed": Method("dgl", localgrad.man(recompute=True), recompute=True),
    "InfoPro": Method("infopro", None),
    "InfoPro+MAN": Method("infopro", localgrad.man()),
    "InfoPro+MAN, recomputed": Method("infopro", localgrad.man(recompute=True)),
}


_KNOWN: dict[Any, Any] = {}


@dataclass(frozen=True)
class Job:
    """One network trained by one method on one device."""

    network: Network
    name: str
    device: torch.device
    precision: Precision

    @property
    def method(self) -> Method:
        """The training method with this name."""
        return METHODS[self.name]

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = ModelConfig(name=self.network.name, depth=self.network.depth)
        model = build_model(config, self.network.classes)
        return model.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def example(self) -> torch.Tensor:
        size = self.network.image_size
        shape = (self.network.batch_size, 3, size, size)
        return torch.zeros(shape, device=self.device).to(memory_format=torch.channels_last)

    def objective(self) -> Any:
        large = self.network.image_size > 96
        if self.method.objective == "infopro":
            head = "imagenet" if large else "1c2f"
            return localgrad.infopro(self.network.classes, HALF, HALF, task=(0.5, 0.5), head=head)
        return localgrad.dgl(self.network.classes, head="light" if large else "compact")

    def plan(self) -> tuple[list[str], float]:
        """The best cuts for the number of blocks, and their predicted peak in bytes."""
        example = self.example()
        found = units(self.model(), example[:2])
        profiled = profile(
            found,
            example,
            self.objective(),
            self.method.momentum,
            recompute=self.method.recompute,
            precision=self.precision,
            known=_KNOWN,
        )
        cuts = profiled.best_cuts(self.network.num_blocks if self.method.objective else 1)
        return [found[cut].name for cut in cuts], profiled.peak(cuts)

    def measured_peak(self) -> dict[str, Any]:
        """Predicted and measured peak in GiB."""
        cuts, predicted = self.plan()
        measured = step_peak(
            self.model(),
            self.example(),
            cuts,
            self.objective(),
            self.method.momentum,
            recompute=self.method.recompute,
            precision=self.precision,
        )
        return {
            "blocks": len(cuts) + 1,
            "predicted_gib": predicted / 2**30,
            "measured_gib": measured / 2**30,
            "error_percent": 100 * (predicted / measured - 1),
        }


def jobs(options: argparse.Namespace, precision: Precision) -> Iterator[tuple[str, Job]]:
    """Every network with every method, each with the name of its row."""
    for network in TINY_NETWORKS if options.tiny else NETWORKS:
        for name in TINY_METHODS if options.tiny else METHODS:
            job = Job(network, name, torch.device(options.device), precision)
            yield f"{network.label}, {name}, {precision}", job


def measure_memory(options: argparse.Namespace) -> None:
    """Measure predicted and allocated peaks; writes the file after each row."""
    path = options.output / "memory.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for precision in ("bf16-mixed", "32-true"):
        for key, job in jobs(options, precision):
            if all(row["row"] != key for row in rows):
                rows.append({"row": key, **job.measured_peak()})
                save(path, {"rows": rows, **machine(torch.device(options.device)), "commit": options.commit})


def run_tests(options: argparse.Namespace) -> None:
    """Run `test_cuda.py`, the tests on a GPU that need no trainer, and write the output of pytest to a file."""
    options_of_pytest = ["-m", "gpu", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options_of_pytest, "tests/training/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=200)
    (options.output / "tests.txt").write_text(done.stdout[-20000:] + done.stderr[-2000:])


def run_task(task: Task, log: Path) -> None:
    """Replace this process by the command of a task, with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    root = Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = f"{root / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    os.execv(task.arguments[0], [task.arguments[0], str(root / task.arguments[1]), *task.arguments[2:]])


def load_sets(options: argparse.Namespace) -> Sets:
    """The data sets whose folders exist, by name."""
    if options.tiny:
        pixels = torch.randint(0, 256, (72, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(72) % 10
        images = Images(labels, cifar10("random"), 10, pixels)
        return {"cifar10": (images.subset(torch.arange(48)), images.subset(torch.arange(48, 72)))}
    sets: Sets = {}
    for name in sorted({job.data for job in TRAININGS}):
        folder = options.data / name
        config = next(job for job in TRAININGS if job.data == name).config().data
        if folder.is_dir():
            begin = time.monotonic()
            sets[name] = load(folder, config, options.processes)
            print(
                f"{time.monotonic() - begin:6.1f} s  {name}: {len(sets[name][0])} and {len(sets[name][1])} images",
                flush=True,
            )
        else:
            print(f"{folder} is not there: what needs it is left out", flush=True)
    return sets


def start_mps() -> bool:
    """Start NVIDIA's MPS, which runs kernels of several processes at the same time; returns whether it works."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        return False
    MPS_FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": str(MPS_FOLDER), "CUDA_MPS_LOG_DIRECTORY": str(MPS_FOLDER)}
    subprocess.run([control, "-d"], capture_output=True, timeout=20, check=False)
    probe = "import torch; torch.ones(8, device='cuda').sum().item()"
    try:
        works = (
            subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=60, check=False).returncode == 0
        )
    except subprocess.TimeoutExpired:
        works = False
    if not works:
        stop_mps()
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            del os.environ[name]
    return works


def stop_mps() -> None:
    """Stop the MPS that `start_mps` started."""
    subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", capture_output=True, timeout=20, check=False)


def wanted(options: argparse.Namespace, sets: Sets) -> list[Training]:
    """The requested trainings whose images exist and that are not finished."""
    chosen = [job for job in (TINY if options.tiny else TRAININGS) if not options.only or job.name in options.only]
    return [job for job in chosen if job.data in sets and not is_finished(job, options.output)]


def do(options: argparse.Namespace, parts: Sequence[str], deadline: float) -> Queue:
    """Run the parts in order until the deadline."""
    sets = load_sets(options) if {"speed", "train"} & {*parts} else {}
    if "speed" in parts:
        rows = TINY if options.tiny else [Training(f"cifar10-resnet32-{row}", "", TEN) for row in TIMED]
        eager = [job for job in rows if job.recipe.removeprefix("cifar10-resnet32-") in EAGER]
        todo = [(job, True) for job in rows if "checkpointed" not in job.recipe] + [(job, False) for job in eager]
        there = {path.stem for path in (options.output / "speed").glob("*.json")}
        todo = [
            row
            for row in todo
            if f"{row[0].recipe}-{'graph' if row[1] else 'eager'}" not in there and row[0].data in sets
        ]
        for _ in time_steps(todo, sets, options):
            if time.monotonic() > deadline - 120:
                break
        print(f"{time.monotonic() - deadline + 60 * options.minutes:6.1f} s  speed is done", flush=True)
    work: list[tuple[str, Callable[[], None], Callable[[], float]]] = []
    if "tests" in parts and not (options.output / "tests.txt").exists():
        work.append(("tests", partial(run_tests, options), lambda: 0.0))
    if "memory" in parts and not (options.output / "memory.json").exists():
        work.append(("memory", partial(measure_memory, options), lambda: 0.0))
    for job in wanted(options, sets) if "train" in parts else ():
        work.append((job.name, partial(train, job, sets, options), partial(predicted, job, options.output)))
    for task in task_jobs(options.data, options.output) if "tasks" in parts else ():
        data = Path(task.arguments[task.arguments.index("--data") + 1])
        if data.exists() and not (options.output / f"{task.name}.json").exists():
            log = options.output / "logs" / f"{task.name.replace('/', '-')}.txt"
            work.append((task.name, partial(run_task, task, log), partial(float, task.seconds)))
    queue = Queue(options.workers, deadline, options.output)
    queue.run(work)
    return queue


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(ALL_PARTS)}, with commas")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="folder of the folders of images")
    parser.add_argument("--only", nargs="+", default=None, help="trainings by name, as cifar10-ten-epochs/RECIPE-seed0")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop")
    parser.add_argument("--rounds", type=int, default=30, help="steps that are timed")
    parser.add_argument(
        "--workers", type=int, default=0, help="trainings at a time; 12 with MPS and 6 without, unless given"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    parser.add_argument("--no-graph", action="store_true", help="train without CUDA graphs")
    parser.add_argument("--no-mps", action="store_true", help="do not start MPS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and random images, to see that it runs")
    parser.add_argument("--commit", help="of the code, for the record, where there is no repository")
    parser.add_argument("--pack", type=Path, help="archive of the output folder, written at the end")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/gpu"))
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes - SPARE_SECONDS
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in ALL_PARTS]:
        parser.error(f"--parts is {options.parts}: {', '.join(unknown)} is none of {', '.join(ALL_PARTS)}")
    names = [job.name for job in (TINY if options.tiny else TRAININGS)]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"--only is {' '.join(unknown)}: it is one of {' '.join(names)}")
    torch.set_num_threads(1)  # this process forks, and never touches CUDA
    options.output.mkdir(parents=True, exist_ok=True)
    mps = options.device == "cuda" and not options.no_mps and start_mps()
    options.workers = options.workers or (12 if mps else 6 if options.device == "cuda" else 1)
    print(f"MPS {'on' if mps else 'off'}, {options.workers} at a time, {options.processes} processors", flush=True)
    try:
        queue = do(options, parts, deadline)
    finally:
        if mps:
            stop_mps()
        if options.pack:
            options.pack.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(options.pack, "w:gz") as archive:
                archive.add(options.output, arcname=options.output.name)
    for what, which in (
        ("failed (see errors/)", queue.failed),
        ("not done: the same command goes on from here", queue.left),
    ):
        if which:
            print(f"{what}:\n  " + "\n  ".join(which))


if __name__ == "__main__":
    main()
