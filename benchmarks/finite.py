"""Measure the time of the check for non-finite gradients: the same step with and without gradient norms, in turns.

    python benchmarks/finite.py --rounds 30 -o results/finite.json

ResNet-32 in 15 blocks with DGL+MAN, on random images. The ratio is the median over the rounds.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localgrad.core.step import local_gradients
from localgrad.data import config as data
from localgrad.recipes import recipe
from localgrad.training import nonfinite, step
from localgrad.training.build import build_run
from report import environment, print_table, write


def measure(batch_size: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step with and without the gradient norms, and of the norms alone."""
    config = recipe("cifar10-resnet32-k16-dgl-man").config
    config = replace(
        config, data=data.digits(), optim=replace(config.optim, batch_size=batch_size), precision="32-true"
    )
    run = build_run(config)
    inputs, targets = torch.randn(batch_size, 3, 32, 32), torch.arange(batch_size) % 10
    without = torch.zeros(len(run.blocks))
    seconds: dict[str, list[float]] = {"checked": [], "unchecked": [], "norms": []}
    for _ in range(rounds + 1):
        for name, norms in (("checked", nonfinite.gradient_norms), ("unchecked", lambda run, like: without)):
            step.gradient_norms = norms
            begin = time.perf_counter()
            step.train_step(run, inputs, targets)
            seconds[name].append(time.perf_counter() - begin)
        local_gradients(run.blocks, inputs, targets)
        begin = time.perf_counter()
        nonfinite.gradient_norms(run.blocks, without)
        seconds["norms"].append(time.perf_counter() - begin)
    checked, unchecked, norms = (values[1:] for values in seconds.values())
    return {
        "batch": batch_size,
        "step": statistics.median(unchecked),
        "checked_step": statistics.median(checked),
        "ratio": statistics.median(one / other for one, other in zip(checked, unchecked, strict=True)),
        "norms_alone_ms": 1000 * statistics.median(norms),
        "norms_percent_of_step": 100 * statistics.median(norms) / statistics.median(unchecked),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    for batch_size in (16, 128):
        rows.append(measure(batch_size, options.rounds))
    print_table("Gradient check, seconds", rows)
    if options.output:
        write(options.output, {"rows": rows, **environment()})
