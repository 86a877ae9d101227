"""Predict throughput by number of ranks: block-parallel local learning, 1F1B pipelines, and data-parallel training.

The prediction uses the times of blocks, measured here on one thread, the bandwidth of a link, and the rules below. The
script first checks the rules against the measurements of `benchmarks/pipeline.py` on 2 and 3 ranks.

    python benchmarks/pipeline_model.py --measured results/pipeline.json -o results/pipeline_model.json

The rules for R ranks, each on its own CPU:

- block-parallel: rank r starts batch t when it has finished batch t - 1 and has received the features. Rank r - 1 sends
  them before the backward pass of its last block, which takes two thirds of that block's time. With momentum, rank r
  has finished batch t only when it has received the weights that rank r + 1 sends when it starts batch t. The script
  simulates this batch by batch.
- 1F1B with m micro-batches: (m + R - 1) / m times the time of the slowest rank, and 2 (m + R - 1) / m messages.
- data-parallel: 1 / R of the time of one rank, and an all-reduce of the gradients, which sends 2 (R - 1) / R of the
  bytes of the weights. It overlaps with the backward pass (two thirds of the time).

If R ranks share fewer than R CPUs, as in the check, they are slower by R / CPUs. The rules ignore latency, the lower
efficiency of small batches, and the memory bandwidth that ranks share.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import localgrad
from localgrad.core.block import Block
from localgrad.models import cifar_resnet
from localgrad.parallel.pipeline import block_seconds, place
from report import environment, print_table, write

RANKS = (2, 4, 8, 16, 32, 54)
LINKS = {"0.1 GB/s": 1e8, "1 GB/s": 1e9, "10 GB/s": 1e10, "100 GB/s": 1e11}
MICRO_BATCHES = (8, 64)


@dataclass(frozen=True)
class Chain:
    """For each block: seconds for a batch, bytes of the features it sends, and of the weights it receives."""

    seconds: list[float]
    features: list[int]
    weights: list[int]
    parameters: int


def measured_chain(depth: int, batch_size: int, num_blocks: int, method: str) -> Chain:
    """A CIFAR ResNet cut into K blocks by compute, in channels last and float32, timed on one thread."""
    torch.manual_seed(0)
    model = cifar_resnet(depth).to(memory_format=torch.channels_last)
    blocks = localgrad.split(
        model,
        torch.empty(2, 3, 32, 32),
        num_blocks=num_blocks,
        balance="compute",
        objective=localgrad.classifier(10) if method == "end-to-end" else localgrad.dgl(10),
        momentum=localgrad.man() if method == "DGL+MAN" else None,
    )
    inputs = torch.rand(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    seconds = block_seconds(blocks, inputs, torch.randint(10, (batch_size,)), rounds=5)
    return Chain(seconds, _feature_bytes(blocks, inputs), [_weight_bytes(block) for block in blocks], _bytes(model))


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _feature_bytes(blocks: Sequence[Block], inputs: torch.Tensor) -> list[int]:
    found, features = [], inputs
    with torch.no_grad():
        for block in blocks:
            features = block.body(features)
            found.append(features.nbytes)
    return found


def _weight_bytes(block: Block) -> int:
    momentum: Any = block.momentum
    return 0 if momentum is None else sum(parameter.nbytes for parameter in momentum.followed())


def block_parallel(chain: Chain, ranks: int, link: float, slower: float = 1.0, batches: int = 400) -> float:
    """Predicted seconds per batch of block-parallel training."""
    edges = [*place(chain.seconds, ranks), len(chain.seconds)]
    compute = [slower * sum(chain.seconds[a:b]) for a, b in pairwise(edges)]
    last = [slower * chain.seconds[end - 1] for end in edges[1:]]
    forward = [chain.features[end - 1] / link for end in edges[1:]]
    back = [chain.weights[end - 1] / link for end in edges[1:]]
    done = [0.0] * ranks
    for _ in range(batches):
        start, arrives = [0.0] * ranks, 0.0
        for rank in range(ranks):
            start[rank] = max(done[rank], arrives)
            arrives = start[rank] + compute[rank] - last[rank] * 2 / 3 + forward[rank]
        for rank in range(ranks):
            done[rank] = start[rank] + compute[rank]
            if rank + 1 < ranks and back[rank]:
                done[rank] = max(done[rank], start[rank + 1] + back[rank])
    return max(done) / batches


def one_f_one_b(chain: Chain, ranks: int, link: float, micro_batches: int, slower: float = 1.0) -> float:
    """Predicted seconds per batch of a 1F1B pipeline."""
    edges = [*place(chain.seconds, ranks), len(chain.seconds)]
    slowest = slower * max(sum(chain.seconds[a:b]) for a, b in pairwise(edges))
    message = max(chain.features[end - 1] for end in edges[1:-1]) / link
    return (slowest + 2 * message) * (micro_batches + ranks - 1) / micro_batches


def data_parallel(chain: Chain, ranks: int, link: float, slower: float = 1.0) -> float:
    """Predicted seconds per batch of data-parallel training."""
    compute = slower * sum(chain.seconds) / ranks
    return compute + max(0.0, 2 * (ranks - 1) / ranks * chain.parameters / link - compute * 2 / 3)


def check(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured gains over one rank, for the measured numbers of ranks."""
    settings, rows = measured["settings"], []
    depth, batch_size, num_blocks = (int(settings[name]) for name in ("depth", "batch_size", "blocks"))
    chains = {method: measured_chain(depth, batch_size, num_blocks, method) for method in ("DGL", "DGL+MAN")}
    chains["end-to-end"] = whole = measured_chain(depth, batch_size, (depth - 2) // 2, "end-to-end")
    for part in measured["measured"]:
        ranks, link = part["ranks"], part["bytes_per_second"]
        slower = max(1.0, ranks / len(os.sched_getaffinity(0)))
        gains = {row["row"]: row["times_one_rank"] for row in part["rows"]}
        for label, method, seconds in (
            ("DGL, block-parallel", "DGL", block_parallel(chains["DGL"], ranks, link, slower)),
            ("DGL+MAN, block-parallel", "DGL+MAN", block_parallel(chains["DGL+MAN"], ranks, link, slower)),
            ("end-to-end, 1F1B, 8 micro-batches", "end-to-end", one_f_one_b(whole, ranks, link, 8, slower)),
            ("end-to-end, data-parallel", "end-to-end", data_parallel(whole, ranks, link, slower)),
        ):
            predicted = sum(chains[method].seconds) / seconds
            found = {"row": label, "ranks": ranks, "predicted": predicted, "measured": gains[label]}
            rows.append({**found, "predicted_to_measured": predicted / gains[label]})
    return rows


def predict(chains: dict[str, Chain], batch_size: int) -> list[dict[str, Any]]:
    """Predicted images per second for every number of ranks and every link."""
    rows = []
    for name, link in LINKS.items():
        for ranks in RANKS:
            whole = chains["end-to-end"]
            seconds = {
                "DGL by blocks": block_parallel(chains["DGL"], ranks, link),
                "DGL+MAN by blocks": block_parallel(chains["DGL+MAN"], ranks, link),
                **{f"1F1B, {m} parts": one_f_one_b(whole, ranks, link, m) for m in MICRO_BATCHES},
                "data-parallel": data_parallel(whole, ranks, link),
            }
            speed = {label: batch_size / value for label, value in seconds.items()}
            rows.append({"row": name, "ranks": ranks, **speed, "fastest": max(speed, key=lambda label: speed[label])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=Path("results/pipeline.json"))
    parser.add_argument("--depth", type=int, default=110, help="layers of the CIFAR ResNet that is predicted")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/pipeline_model.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    checked = check(json.loads(options.measured.read_text()))
    print_table("Gain over one rank, predicted and measured", checked)
    num_units = (options.depth - 2) // 2
    chains = {
        method: measured_chain(options.depth, options.batch_size, num_units, method)
        for method in ("DGL", "DGL+MAN", "end-to-end")
    }
    predicted = predict(chains, options.batch_size)
    print_table(f"CIFAR ResNet-{options.depth}, {num_units} blocks: predicted images a second", predicted)
    settings = {"depth": options.depth, "batch_size": options.batch_size}
    write(options.output, {"settings": settings, "check": checked, "predicted": predicted, **environment()})


if __name__ == "__main__":
    main()
