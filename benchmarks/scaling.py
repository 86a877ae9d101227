"""How the time of a step grows with the number of blocks, the depth of the network and the batch.

    python benchmarks/scaling.py --data path/to/cifar10 -o results/scaling.json

CIFAR ResNets through the trainer, DGL and DGL+MAN, cuts spread evenly over the units. Three sweeps: K at ResNet-32 and
batch 128; depth at K = 4 and batch 128; batch at ResNet-32 and K = 8. Each is fitted by seconds = a + b x, and the
operations of a step, counted (a multiply-add counts two), by a line of their own. In the sweep over K,
`explained_seconds` is what the operations that a block adds would take at the rate of the network alone, a of the
operations in a of the seconds; what b has more is what a block costs beside them. The rows of a sweep take turns, a
step each, and a row's time is the median.
"""

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localgrad.config.schema import TrainConfig
from localgrad.results.step_times import Step, take_turns, timed_step
from report import environment, print_table, write
from speed import of_recipe, operations

METHODS = {"DGL": "cifar10-resnet32-k16-dgl", "DGL+MAN": "cifar10-resnet32-k16-dgl-man"}
SWEEPS: dict[str, list[int]] = {"blocks": [1, 2, 4, 8, 16], "depth": [20, 32, 44, 56], "batch": [32, 64, 128, 256]}
FIXED = {
    "blocks": {"depth": 32, "batch": 128},
    "depth": {"blocks": 4, "batch": 128},
    "batch": {"blocks": 8, "depth": 32},
}
"""What the other two are in each sweep."""


def config_at(method: str, data: str, *, blocks: int, depth: int, batch: int) -> TrainConfig:
    """One point of a sweep."""
    config = of_recipe(METHODS[method], batch, data)
    if blocks == 1:
        config = replace(config, objective=type(config.objective)(), momentum=type(config.momentum)())
    model = replace(config.model, depth=depth)
    return replace(config, model=model, cuts=None, num_blocks=blocks, balance="count")


def line(x: list[int], y: list[float]) -> dict[str, float]:
    """Least squares y = a + b x, and the share of the variance that it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.var(np.asarray(y) - intercept - slope * np.asarray(x))
    return {
        "a": float(intercept),
        "b": float(slope),
        "r_squared": float(1 - residual / np.var(y)),
    }


def sweep(name: str, method: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one sweep, and the two lines through them."""
    values = SWEEPS[name]
    points = {value: {**FIXED[name], name: value} for value in values}
    with ExitStack() as held:
        steps: dict[str, Step] = {}
        for value, point in points.items():
            steps[str(value)], _ = timed_step(config_at(method, options.data, **point), held)
        counted = [operations(step) for step in steps.values()]
        seconds = [statistics.median(times) for times in take_turns(steps, options.rounds).values()]
    rows = [
        {"row": f"{method}, {name} {value}", "seconds_per_step": second, "gflop_per_step": count / 1e9}
        for value, second, count in zip(values, seconds, counted, strict=True)
    ]
    fits = {"seconds": line(values, seconds), "gflop": line(values, [count / 1e9 for count in counted])}
    return rows, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10, a hub name or a folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("results/scaling.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    per_block: dict[str, dict[str, float]] = {}
    for name in SWEEPS:
        for method in METHODS:
            found, lines = sweep(name, method, options)
            rows += found
            if name == "blocks":
                rate = lines["seconds"]["a"] / lines["gflop"]["a"]
                added = lines["gflop"]["b"]
                per_block[method] = {
                    "seconds": lines["seconds"]["b"],
                    "gflop": added,
                    "explained_seconds": added * rate,
                }
            fits += [{"row": f"{method}, {name}, {what}", **values} for what, values in lines.items()]
    print_table("a step of a CIFAR ResNet", rows)
    print_table("y = a + b x", fits)
    print_table("what a block adds", [{"row": method, **values} for method, values in per_block.items()])
    settings = {"rounds": options.rounds, "threads": options.threads}
    write(options.output, {"settings": settings, "rows": rows, "fits": fits, "per_block": per_block, **environment()})


if __name__ == "__main__":
    main()
