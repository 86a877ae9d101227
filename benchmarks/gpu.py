"""Everything that needs a GPU, in one call that ends in time and goes on where it stopped.

    python benchmarks/gpu.py --data path/to/cifar10 --minutes 9 -o results/gpu
    python benchmarks/gpu.py --parts train --recipes cifar10-resnet32-k16-dgl-man --data path/to/cifar10 -o results/gpu

- memory: the allocator's peak of a step beside the planner's prediction, in float32 and under bf16 autocast.
- speed: seconds a step, bf16, channels last, of the same rows, and of those that nothing is recomputed in as a CUDA
  graph too.
- train: whole recipes, as CUDA graphs with `--cuda-graph`; a run that the time does not allow is saved and continued
  by the next call.

Rows go to `gpu.json` in the output folder as they are done, and a row that is there is not measured again. With
`--device cpu --tiny` every line runs on small networks.
"""

import argparse
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import localgrad
from localgrad.config.build import build_model
from localgrad.config.schema import ModelConfig
from localgrad.core.units import units
from localgrad.planning.profile import profile
from localgrad.planning.simulation import Precision
from localgrad.planning.step_peak import step_peak
from localgrad.recipes import recipe
from localgrad.runs.folder import RunFolder
from localgrad.training.cuda_graphs import WARM_UPS, GraphedStep
from report import environment, print_table, write

HALF = (0.5, 0.5, 0.5)
PARTS = ("memory", "speed", "train")
RECIPES = ("cifar10-resnet32-k16-dgl-man", "cifar10-resnet32-e2e", "cifar10-resnet32-k16-dgl")
SPARE_SECONDS = 20.0


@dataclass(frozen=True)
class Network:
    """What is measured: a model by name, its batch, and the number of blocks."""

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
    """How a network is trained."""

    objective: str | None
    momentum: Any
    recompute: bool = False


NETWORKS = (
    Network("cifar_resnet", 32, 10, 1024, 32, 15),
    Network("cifar_resnet", 110, 10, 1024, 32, 32),
    Network("torchvision:resnet50", 0, 1000, 128, 224, 4),
    Network("torchvision:resnet101", 0, 1000, 128, 224, 4),
    Network("torchvision:resnet152", 0, 1000, 128, 224, 4),
)
TINY = (Network("cifar_resnet", 8, 10, 4, 16, 3),)
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


class Results:
    """The rows so far, on disk after each."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.path = folder / "gpu.json"
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.left: list[str] = []

    def add(self, part: str, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there, or the time is up."""
        if any((row["part"], row["row"]) == (part, key) for row in self.rows):
            return
        if self.seconds_left <= 0:
            self.left.append(f"{part}: {key}")
            return
        measured = measure()
        if measured:
            self.rows.append({"part": part, "row": key, **measured})
            write(self.path, {"rows": self.rows, **environment()})
        else:
            self.left.append(f"{part}: {key}")

    @property
    def seconds_left(self) -> float:
        """Until no further row is begun."""
        return self.deadline - SPARE_SECONDS - time.monotonic()


@dataclass(frozen=True)
class Job:
    """One network trained by one method on one device."""

    network: Network
    name: str
    device: torch.device
    precision: Precision

    @property
    def method(self) -> Method:
        """How it is trained."""
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
        """The best cuts for the number of blocks, and the peak that is predicted for them."""
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
        """GiB, predicted and measured."""
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

    @property
    def recomputes(self) -> bool:
        """Whether anything is, which a CUDA graph cannot."""
        return self.method.recompute or "recomputed" in self.name

    def seconds_per_step(self, rounds: int, *, graphed: bool = False) -> dict[str, Any]:
        """Median over the rounds, after those that warm up or are recorded."""
        cuts, _ = self.plan()
        model, inputs = self.model(), torch.randn_like(self.example())
        targets = torch.arange(len(inputs), device=self.device) % self.network.classes
        blocks = localgrad.split(
            model,
            inputs[:2],
            cuts=cuts,
            objective=self.objective(),
            momentum=self.method.momentum,
            recompute=self.method.recompute,
        )
        if self.precision == "bf16-mixed":
            for block in blocks:
                block.forward = torch.autocast(self.device.type, torch.bfloat16)(block.forward)
        optimizers = [
            torch.optim.SGD(block.trainable_parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
            for block in blocks
        ]

        def step(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (torch.stack(localgrad.local_step(blocks, optimizers, inputs, targets)),)

        run = GraphedStep(step) if graphed else step
        seconds = []
        for _ in range(rounds + WARM_UPS + 1):
            begin = time.perf_counter()
            run(inputs, targets)
            _wait(self.device)
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds[WARM_UPS + 1 :])
        return {"blocks": len(blocks), "seconds_per_step": median, "rounds": rounds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def jobs(options: argparse.Namespace, precision: Precision) -> Iterator[tuple[str, Job]]:
    """Every network by every method, under the names of their rows."""
    for network in TINY if options.tiny else NETWORKS:
        for name in TINY_METHODS if options.tiny else METHODS:
            job = Job(network, name, torch.device(options.device), precision)
            yield f"{network.label}, {name}, {precision}", job


def train(name: str, results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe as far as the time allows; nothing if it is not at its end."""
    from localgrad.training.trainer import fit

    config = recipe(name).config
    if options.data is not None:
        config = replace(config, data=replace(config.data, source=options.data))
    if options.tiny:
        config = replace(config, data=replace(config.data, train_limit=60, test_limit=40))
    epochs = options.epochs or config.optim.epochs
    warmup = min(config.optim.warmup_epochs, epochs - 1)
    config = replace(config, optim=replace(config.optim, epochs=epochs, warmup_epochs=warmup))
    config = replace(
        config, accelerator=options.device, evaluate_every=max(1, epochs // 40), cuda_graph=options.cuda_graph
    )
    folder = RunFolder((options.runs or options.output / "runs") / name)
    timer = threading.Timer(results.seconds_left, partial(os.kill, os.getpid(), signal.SIGINT))
    timer.start()
    try:
        result = fit(config, folder.path, resume=folder.checkpoint.exists(), quiet=True)
    except KeyboardInterrupt as interruption:
        if results.seconds_left > 0:
            raise  # by hand, not by the timer
        print(f"{name}: {interruption}")
        return {}
    finally:
        timer.cancel()
    return {
        "blocks": result.num_blocks,
        "epochs": epochs,
        "test_error": result.test_error,
        "wall_seconds": result.wall_seconds,
        "seconds_per_step": result.seconds_per_step,
        "peak_gib": result.peak_memory_bytes / 2**30,
        "precision": result.precision,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--data", help="images to train on, a folder or a hub name; the recipes' own if not given")
    parser.add_argument("--recipes", nargs="+", default=None, help="what to train")
    parser.add_argument("--epochs", type=int, help="passes over the images; the recipes' own unless given")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop")
    parser.add_argument("--rounds", type=int, default=20, help="steps that are timed")
    parser.add_argument("--cuda-graph", action="store_true", help="train by replaying the step as a CUDA graph")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and batches, to see that it runs")
    parser.add_argument("--runs", type=Path, help="folder of the trainings; `runs` in the output folder unless given")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/gpu"))
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts is {options.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny shows that everything runs")
    results = Results(options.output, options.minutes)
    if "memory" in parts:
        for precision in ("bf16-mixed", "32-true"):
            for key, job in jobs(options, precision):
                results.add("memory", key, job.measured_peak)
    if "speed" in parts:
        torch.backends.cudnn.benchmark = True
        for key, job in jobs(options, "bf16-mixed"):
            results.add("speed", key, partial(job.seconds_per_step, options.rounds))
            if job.device.type == "cuda" and not job.recomputes:
                results.add("speed", f"{key}, CUDA graph", partial(job.seconds_per_step, options.rounds, graphed=True))
    if "train" in parts:
        for name in options.recipes or (("digits-dgl-man",) if options.tiny else RECIPES):
            results.add("train", name, partial(train, name, results, options))
    for part in parts:
        rows = [
            {key: value for key, value in row.items() if key != "part"} for row in results.rows if row["part"] == part
        ]
        if rows:
            print_table(part, rows)
    if results.left:
        print("the time was up before\n  " + "\n  ".join(results.left) + "\nthe same command goes on from here")


if __name__ == "__main__":
    main()
