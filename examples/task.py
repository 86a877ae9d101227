"""What the scripts of the three tasks share: flags, the loop of a training, and the JSON that it leaves."""

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
"""Settings of `localgrad.man`."""


def flags(doc: str | None, methods: Sequence[str], momenta: Sequence[str], data: str) -> argparse.ArgumentParser:
    """A parser with the flags of every task."""
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
    """What `isolate` takes as `momentum`."""
    return None if options.momentum == "none" else localgrad.man(**settings, **MOMENTA[options.momentum])


def mixed(options: argparse.Namespace) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled="cuda" in options.device)


def allocated(options: argparse.Namespace) -> int:
    """Bytes of the device that are taken; 0 on a processor."""
    return torch.cuda.memory_allocated() if "cuda" in options.device else 0


class Fitted(NamedTuple):
    """What a training took."""

    loss: float
    """Of the last step."""
    curve: list[tuple[int, float]]
    """Steps, and what `evaluate` gave after them."""
    seconds: float
    """Of the steps, evaluations aside."""
    peak_bytes: int | None
    """Largest memory of the steps before the first evaluation; None on a processor."""


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
    """Plain PyTorch: `loss_of(*batch())`, backward, step. Nothing here knows of blocks.

    Args:
        options: with device and the name of the result, for the progress bar.
        model: in training mode but for evaluations.
        optimizer: over all that is trained.
        schedule: of the learning rate, a step each.
        steps: how many.
        batch: draws one.
        loss_of: the loss of a batch, under autocast.
        clipped: lists of parameters, whose gradients are clipped to norm 1 each.
        evaluate: measures the model in evaluation mode.
        evaluations: how often, evenly over the steps, and after the last.
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
    """Write what was found as JSON, with what it took and on what.

    Args:
        options: all of them are written but `out`, which is the file.
        task: its name.
        model: the whole one.
        trained: its parameters, and those of heads and copies.
        fitted: of the training.
        held: bytes of the device that the data take; the peak is without them.
        found: what the task measures.
    """
    result = {
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
