"""Trainings that share a GPU: one process each, several at the same time, until a deadline.

The processes are forked from one that has loaded the images and never uses CUDA. Each trains a config as `localgrad
train` does (with the same network, batches, learning rates and local step), replays the step as a CUDA graph, and
writes its result after each epoch. So a run that is cut off at the deadline still has the results of its finished
epochs. The result says whether the run is finished; only unfinished runs are trained again, from the start.
"""

import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import localgrad
from gpu_jobs import Training
from localgrad.config.build import build_blocks, build_model, build_optimizers
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.core.step import apply_updates, local_gradients
from localgrad.data.sets import Images
from localgrad.results.kinds import kind_of
from localgrad.runs.result import SCHEMA
from localgrad.training.cuda_graphs import GraphedStep
from localgrad.training.schedule import learning_rate

Sets = dict[str, tuple[Images, Images]]
FORK = multiprocessing.get_context("fork")


class Loop:
    """A network with its blocks and optimizers on one device.

    Args:
        config: config of the run.
        num_classes: number of classes of its images.
        device: device of the network.
        graphed: replay the step as a CUDA graph.
    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device, graphed: bool) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, num_classes)
        self.blocks = build_blocks(config, self.model, num_classes)
        for module in (self.model, *self.blocks):
            module.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.rate = torch.zeros((), device=device)
        self.optimizers = build_optimizers(config.optim, self.blocks, capturable=graphed)
        self.run: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = GraphedStep(self.step) if graphed else self.step
        self.graphed = graphed

    def set_rate(self, value: float) -> None:
        """Set the learning rate, as a tensor on the device if a graph reads it."""
        self.rate.fill_(value)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate if self.graphed else value

    def autocast(self, index: int = 0) -> AbstractContextManager[Any]:
        """The precision of `auto`: bf16 autocast on CUDA, float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """One local step; returns the mean loss of each block."""
        parts = min(self.config.optim.accumulate, len(inputs))
        total = inputs.new_zeros(len(self.blocks))
        for part, part_targets in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
            share = len(part) / len(inputs)
            losses = local_gradients(
                self.blocks, part, part_targets, scale=share, context=self.autocast, reach=self.config.reach
            )
            total = total + share * torch.stack(losses).float()
        apply_updates(self.blocks, self.optimizers)
        return (total,)

    @torch.no_grad()
    def error(self, images: Images) -> float:
        """Test error in percent of the model's own forward pass."""
        modules: Sequence[nn.Module] = (self.model, *self.blocks)
        for module in modules:
            module.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for inputs, targets in images.batches(1000, train=False, channels_last=True):
            with self.autocast():
                wrong += (self.model(inputs).argmax(1) != targets).sum()
        for module in modules:
            module.train()
        return 100 * int(wrong) / len(images)

    def epoch(self, images: Images, epoch: int) -> list[float]:
        """Train one epoch; returns the mean loss of each block."""
        optim = self.config.optim
        self.set_rate(
            learning_rate(
                epoch,
                epochs=optim.epochs,
                peak=optim.lr,
                warmup_epochs=optim.warmup_epochs,
                first_epoch=optim.first_epoch,
            )
        )
        sums = torch.zeros(len(self.blocks), device=self.device)
        seen = 0
        for inputs, targets in images.batches(
            optim.batch_size, train=True, seed=self.config.seed, epoch=epoch, channels_last=True
        ):
            sums += self.run(inputs, targets)[0] * len(inputs)
            seen += len(inputs)
        return (sums / seen).tolist()


def train(job: Training, sets: Sets, options: Any) -> None:
    """Train a job and write its result after each epoch."""
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    path = options.output / f"{job.name}.json"
    train_set, test_set = (images.to(device) for images in sets[job.data])
    config = job.config()
    graphed, noted = device.type == "cuda" and not options.no_graph and not config.recompute, ""
    try:
        _train(job, Loop(config, train_set.num_classes, device, graphed), train_set, test_set, path, options, noted)
    except RuntimeError as error:
        if not graphed or "out of memory" in str(error):
            raise
        noted = f"without a graph, for {str(error).splitlines()[0]}"
        _train(job, Loop(config, train_set.num_classes, device, False), train_set, test_set, path, options, noted)


def _train(job: Training, loop: Loop, images: Images, test: Images, path: Path, options: Any, noted: str) -> None:
    begin, errors, losses, seconds = time.perf_counter(), [], [], []
    epochs = loop.config.optim.epochs
    every = max(1, epochs // 40)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        losses.append(loop.epoch(images, epoch))
        last = epoch == epochs
        errors.append(loop.error(test) if last or epoch % every == 0 else None)
        seconds.append(time.perf_counter() - start)
        told = [error for error in errors if error is not None]
        result = {
            "command": f"python benchmarks/gpu.py --only {job.name}",
            "finished": last,
            "config": to_dict(loop.config),
            "test_error": told[-1] if told else None,
            "best_test_error": min(told, default=None),
            "best_epoch": 1 + errors.index(min(told)) if told else None,
            "local_errors": None,
            "cuts": [block.names[-1] for block in loop.blocks[:-1]],
            "num_blocks": len(loop.blocks),
            "parameters": parameters(loop),
            "peak_memory_bytes": None,  # not that of a step: the allocator holds the images too
            "seconds_per_step": None,  # not comparable: other processes share the GPU
            "wall_seconds": time.perf_counter() - begin,
            "precision": "bf16-mixed" if loop.device.type == "cuda" else "32-true",
            "skipped": 0,
            "num_classes": images.num_classes,
            "test_errors": errors,
            "train_losses": losses,
            "epoch_seconds": seconds,
            "noted": noted or ("CUDA graph" if loop.graphed else "eager") + f", {options.workers} at a time",
            **machine(loop.device),
            "commit": options.commit,
        }
        save(path, result)
        if any(value != value for value in losses[-1]):
            save(path, {**result, "finished": True, "noted": f"a loss is NaN in epoch {epoch}"})
            return


def parameters(loop: Loop) -> dict[str, int]:
    """Numbers of parameters, as in the result of a run."""
    backbone = sum(p.numel() for p in loop.model.parameters())
    every = {id(p): p for block in loop.blocks for p in block.parameters()}
    return {
        "backbone": backbone,
        "auxiliary": sum(p.numel() for p in every.values()) - backbone,
        "trainable": sum(p.numel() for p in every.values() if p.requires_grad),
    }


def peak(device: torch.device) -> int:
    """Peak of the allocator in bytes, including images and graphs; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions. Also works if localgrad is not installed."""
    import platform

    import torchvision

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}
    return {"device": name, "versions": {"localgrad": localgrad.__version__, **versions}}


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON atomically, with its kind and schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    content = {"kind": kind_of(result) or "benchmark", "schema": SCHEMA, **result}
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


# Several at the same time


@dataclass
class Queue:
    """Runs jobs by priority, each in its own process and at most `workers` at the same time, until the deadline.

    Attributes:
        running: processes that run, with their start times, by name of the job.
        left: names of the jobs that did not finish before the deadline.
        failed: names of the jobs that failed.
    """

    workers: int
    deadline: float
    output: Path
    running: dict[str, tuple[Any, float]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[tuple[str, Callable[[], None], Callable[[], float]]]) -> None:
        """Run jobs: each has a name, a function to run in its own process, and a function for its predicted seconds."""
        waiting = list(jobs)
        try:
            while waiting or self.running:
                self._reap()
                now = time.monotonic()
                if now > self.deadline:
                    break
                for job in waiting if len(self.running) < self.workers else ():
                    if now + job[2]() < self.deadline:
                        waiting.remove(job)
                        self._start(job[0], job[1])
                        break
                else:
                    if waiting and not self.running:
                        break
                    time.sleep(0.02)
        finally:
            self.left += [job[0] for job in waiting] + list(self.running)
            self._stop()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        process = FORK.Process(target=_noted, args=(name, work, self.output))
        process.start()
        self.running[name] = process, time.monotonic()

    def _reap(self) -> None:
        for name, (process, begin) in list(self.running.items()):
            if not process.is_alive():
                process.join()
                del self.running[name]
                self.failed += [name] if process.exitcode else []
                print(
                    f"{time.monotonic() - begin:6.1f} s  {name}"
                    + f" ended with {process.exitcode}" * bool(process.exitcode),
                    flush=True,
                )

    def _stop(self) -> None:
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.join(5)
            if process.is_alive():
                process.kill()


def _noted(name: str, work: Callable[[], None], output: Path) -> None:
    """Run a job; writes the traceback of an error to a file."""
    try:
        work()
    except BaseException:
        path = output / "errors" / f"{name.replace('/', '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # skips cleanup, which would close the files of the parent process


def predicted(job: Training, output: Path) -> float:
    """Predicted seconds of a training, from measured epochs of its recipe, or the slowest of its data set."""
    rates: dict[str, float] = {}
    for path in output.glob("*/*.json"):
        result = json.loads(path.read_text())
        if "epoch_seconds" in result and len(result["epoch_seconds"]) > 1:
            name = result["config"]["name"]
            rates[name] = statistics.median(result["epoch_seconds"][1:])
    same = [rate for name, rate in rates.items() if name.split("-")[0] == job.recipe.split("-")[0]]
    rate = rates.get(job.recipe, max(same, default=0.0))
    return rate * (job.optim.get("epochs") or job.config().optim.epochs)


def is_finished(job: Training, output: Path) -> bool:
    """Whether the result of a training exists and is finished."""
    path = output / f"{job.name}.json"
    return path.exists() and bool(json.loads(path.read_text())["finished"])


# Seconds per step, one row after the other


def time_steps(rows: Sequence[tuple[Training, bool]], sets: Sets, options: Any) -> Iterator[None]:
    """Time the rows: several processes set up at the same time, then run one after the other, alone on the GPU."""
    at_once = options.workers
    for first in range(0, len(rows), at_once):
        group = rows[first : first + at_once]
        ready, turn = FORK.Barrier(len(group)), FORK.Lock()
        processes = [
            FORK.Process(
                target=_noted,
                args=(job.name, partial(_timed, job, graphed, sets, options, ready, turn), options.output),
            )
            for job, graphed in group
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
            if process.is_alive():
                process.kill()
        yield


def _timed(job: Training, graphed: bool, sets: Sets, options: Any, ready: Any, turn: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = on_cuda
    images = sets[job.data][0]
    config = job.config()
    loop = inputs = targets = None
    seconds: list[float] = []
    try:
        loop = Loop(config, images.num_classes, device, graphed and on_cuda)
        loop.set_rate(0.01)
        inputs, targets = next(iter(images.batches(config.optim.batch_size, train=True, channels_last=True)))
        inputs, targets = inputs.to(device), targets.to(device)
        for _ in range(4):
            loop.run(inputs, targets)
        if on_cuda:
            torch.cuda.synchronize()
    finally:
        ready.wait(60)
    with turn:
        for _ in range(options.rounds):
            begin = time.perf_counter()
            loop.run(inputs, targets)
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    row = f"{job.recipe}-{'graph' if graphed else 'eager'}"
    save(
        options.output / "speed" / f"{row}.json",
        {
            "row": job.recipe,
            "graph": graphed,
            "batch_size": config.optim.batch_size,
            "blocks": len(loop.blocks),
            "seconds_per_step": statistics.median(seconds[1:]),
            "rounds": options.rounds,
            "allocated_bytes": peak(device),
            **machine(device),
            "commit": options.commit,
        },
    )
