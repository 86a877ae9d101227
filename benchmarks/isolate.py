"""Compare seconds and peak memory of a step of `isolate` and `split`: ResNet-50 at 128 px, four blocks, DGL.

    python benchmarks/isolate.py -o results/isolate.json

Both use the same cuts and the same batch, and SGD with momentum with one optimizer per block. An end-to-end loop is the
third row. The rows run one step each in turn on one thread. A ratio is the median over the rounds of the ratio of two
times in the same round. CPU seconds are those of the process, which depend less on other work on the machine. Peak
memory is that of the live tensors that a step creates. On a shared machine, put `chrt -f 10 taskset -c 1` before the
command to give it one core; the committed file was measured in this way.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

import localgrad
from localgrad.planning.measure import measure_peak
from localgrad.results.step_times import ratio
from report import environment, print_table, write

CUTS = ["layer1.2", "layer2.3", "layer3.5"]
CLASSES = 1000


def steps(size: int, batch_size: int, momentum: Any, device: torch.device) -> dict[str, Callable[[], None]]:
    """A function for one step of each row, each with its own network."""
    inputs = torch.randn(batch_size, 3, size, size, device=device)
    targets = torch.randint(0, CLASSES, (batch_size,), device=device)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torchvision.models.resnet50().to(device)

    def sgd(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.01, 0.9)

    objective = localgrad.dgl(CLASSES, head="light")
    first = model()
    blocks = localgrad.split(first, inputs, cuts=CUTS, objective=objective, momentum=momentum)
    optimizers = [sgd(block.trainable_parameters()) for block in blocks]
    second = model()
    isolation = localgrad.isolate(second, CUTS, objective=objective, momentum=momentum, example=inputs[:2])
    own = [sgd(isolation.trainable_parameters(block)) for block in range(len(blocks))]
    third = model()
    whole = [sgd(list(third.parameters()))]

    def split_step() -> None:
        localgrad.local_step(blocks, optimizers, inputs, targets)

    def loop(network: torch.nn.Module, used: list[torch.optim.Optimizer]) -> None:
        F.cross_entropy(network(inputs), targets).backward()
        for optimizer in used:
            optimizer.step()
            optimizer.zero_grad()

    def isolate_step() -> None:
        isolation.targets = targets
        loop(second, own)

    return {"split": split_step, "isolate": isolate_step, "end-to-end": lambda: loop(third, whole)}


def measure(rows: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds and peak memory of each row, and the ratios to `split`."""
    peaks = {name: measure_peak(step, device)[1] for name, step in rows.items()}  # this also warms up
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    of_process: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, step in rows.items():
            begun, begun_cpu = time.perf_counter(), time.process_time()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
            of_process[name].append(time.process_time() - begun_cpu)
    return [
        {
            "row": name,
            "seconds": statistics.median(seconds[name]),
            "to split": ratio(seconds[name], seconds["split"]),
            "CPU seconds": statistics.median(of_process[name]),
            "CPU to split": ratio(of_process[name], of_process["split"]),
            "peak MiB": peaks[name] / 2**20,
            "peak to split": peaks[name] / peaks["split"],
            "every_round": [round(each, 4) for each in seconds[name]],
            "every_round_cpu": [round(each, 4) for each in of_process[name]],
        }
        for name in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write, without momentum and with MAN."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--momenta", nargs="*", default=["none", "man"], choices=["none", "man"])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment(), "size": options.size, "batch_size": options.batch_size}
    for name in options.momenta:
        momentum = None if name == "none" else localgrad.man()
        rows = steps(options.size, options.batch_size, momentum, options.device)
        found[name] = measure(rows, options.rounds, options.device)
        shown = [{key: value for key, value in row.items() if not key.startswith("every")} for row in found[name]]
        print_table(f"ResNet-50, {options.size} px, batch {options.batch_size}, DGL, momentum {name}", shown)
    if options.output:
        write(options.output, found)


if __name__ == "__main__":
    main()
