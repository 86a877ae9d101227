"""Shared by the scripts of the three tasks: flags, the training loop, and the JSON with the results."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import localgrad

MOMENTA: dict[str, dict[str, Any]] = {
    "none": {},
    "man": {},
    "ema": {"bias": False},
    "bias": {"ema": False},
    "residual": {"form": "residual"},
}
"""Settings of `localgrad.man` for each value of `--momentum`."""


def flags(doc: str | None, methods: Sequence[str], momenta: Sequence[str], data: str) -> argparse.ArgumentParser:
    """A parser with the flags that all tasks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--method", choices=methods, default="e2e")
    parser.add_argument("--momentum", choices=momenta, default="none", help="between a block and its head")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def momentum_of(options: argparse.Namespace, **settings: Any) -> Any:
    """The argument `momentum` of `isolate`."""
    return None if options.momentum == "none" else localgrad.man(**settings, **MOMENTA[options.momentum])


def mixed(options: argparse.Namespace) -> torch.autocast:
    """Autocast to bfloat16 on a GPU; no autocast on a CPU."""
    return torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled="cuda" in options.device)


def allocated(options: argparse.Namespace) -> int:
    """Allocated memory of the GPU in bytes; 0 on a CPU."""
    return torch.cuda.memory_allocated() if "cuda" in options.device else 0


class Fitted(NamedTuple):
    """Results of a training."""

    loss: float
    """Loss of the last step."""
    curve: list[tuple[int, float]]
    """Pairs of a step and the value of `evaluate` after it."""
    seconds: float
    """Seconds of the training steps, without evaluations."""
    peak_bytes: int | None
    """Peak memory of the steps before the first evaluation; None on a CPU."""


def fit(
    options: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    batch: Callable[[], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    *,
    clipped: Iterable[list[nn.Parameter]] = (),
    evaluate: Callable[[], float] | None = None,
    evaluations: int = 1,
) -> Fitted:
    """A plain PyTorch training loop without any code for blocks: `loss_of(*batch())`, backward pass, optimizer step.

    Args:
        options: flags; this function reads the device, and the name of the result for the progress bar.
        model: the model, in training mode except during evaluations.
        optimizer: optimizer of all trained parameters.
        schedule: schedule of the learning rate, stepped after each optimizer step.
        steps: number of training steps.
        batch: draws a batch.
        loss_of: computes the loss of a batch; called under autocast.
        clipped: lists of parameters; the gradients of each list are clipped to norm 1.
        evaluate: measures the model; called in evaluation mode.
        evaluations: evaluate after every `steps // evaluations` steps, and after the last step.
    """
    curve: list[tuple[int, float]] = []
    loss, peak, seconds, began = torch.zeros(()), None, 0.0, time.perf_counter()
    every = max(1, steps // evaluations)
    progress = tqdm(range(1, steps + 1), desc=options.out.stem, disable=None)
    for step in progress:
        given = batch()
        with mixed(options):
            loss = loss_of(*given)
        loss.backward()
        for parameters in clipped:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            shown = {} if not curve else {"validation": f"{curve[-1][1]:.3f}"}
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}", **shown)
        if step == steps or (evaluate is not None and step % every == 0):
            loss = loss.detach()
            float(loss)  # waits for the device
            seconds += time.perf_counter() - began
            if "cuda" in options.device and peak is None:
                peak = torch.cuda.max_memory_allocated()
            if evaluate is not None:
                model.eval()
                with mixed(options):
                    curve.append((step, evaluate()))
                model.train()
            began = time.perf_counter()
    return Fitted(float(loss), curve, seconds, peak)


def write(
    options: argparse.Namespace,
    task: str,
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    fitted: Fitted,
    held: int,
    **found: Any,
) -> dict[str, Any]:
    """Write the results as JSON, with seconds, peak memory and machine.

    Args:
        options: flags; all are written except `out`, which is the path of the file.
        task: name of the task.
        model: the whole model.
        trained: all trained parameters, including those of heads and momentum copies.
        fitted: results of the training.
        held: bytes of GPU memory that the data take; they are subtracted from the peak.
        found: results of the task.
    """
    result = {
        "kind": "benchmark",
        "schema": 1,
        "task": task,
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        **found,
        "seconds": fitted.seconds,
        "peak_mib": None if fitted.peak_bytes is None else (fitted.peak_bytes - held) / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if "cuda" in options.device else "processor",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result
