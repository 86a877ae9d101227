"""Measure how the time of a step grows with the number of blocks, the depth and the batch size.

    python benchmarks/scaling.py --data path/to/cifar10 -o results/scaling.json

The trainer trains CIFAR ResNets with DGL and DGL+MAN, with cuts spread evenly over the units. There are three sweeps: K
at ResNet-32 and batch size 128; depth at K = 4 and batch size 128; batch size at ResNet-32 and K = 8. A line a + b x is
fitted to the seconds of each sweep, and another to the counted operations (a multiply-add counts as two). In the sweep
over K, `explained_seconds` is the time that the operations of one more block would take at the rate of the network
without added blocks (operations a in seconds a). The rest of b is the overhead of a block. The rows of a sweep run one
step each in turn, and a row's time is the median.
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
"""Values of the other two variables in each sweep."""


def config_at(method: str, data: str, *, blocks: int, depth: int, batch: int) -> TrainConfig:
    """The config of one point of a sweep."""
    config = of_recipe(METHODS[method], batch, data)
    if blocks == 1:
        config = replace(config, objective=type(config.objective)(), momentum=type(config.momentum)())
    model = replace(config.model, depth=depth)
    return replace(config, model=model, cuts=None, num_blocks=blocks, balance="count")


def line(x: list[int], y: list[float]) -> dict[str, float]:
    """Least-squares fit y = a + b x, and R², the fraction of the variance that it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.var(np.asarray(y) - intercept - slope * np.asarray(x))
    return {
        "a": float(intercept),
        "b": float(slope),
        "r_squared": float(1 - residual / np.var(y)),
    }


def sweep(name: str, method: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one sweep, and the two lines fitted to them."""
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
