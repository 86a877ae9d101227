"""Peak memory and operations of a step of ResNet-101: local learning beside what every user of PyTorch has.

    python benchmarks/rivals.py -o results/rivals-resnet101.json

The cuts are those of `results/plan-resnet101/plan.json`: batch 128, 224 px, float32, SGD with momentum, `dgl` with
light heads. Rivals are activation checkpointing of every unit, gradient accumulation in four parts, and both, which
local rows can have too. All is counted on `meta` tensors, so no GPU is needed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from localgrad import dgl, man
from localgrad.core.split import split
from localgrad.core.step import local_gradients
from localgrad.planning.step_peak import step_peak
from report import environment, print_table, write

PLAN = Path(__file__).parents[1] / "results" / "plan-resnet101" / "plan.json"
BATCH = 128
PARTS = 4
"""Of a batch whose gradients are accumulated."""
ROWS = (
    *((1, "no momentum", checkpointed, parts) for parts in (1, PARTS) for checkpointed in (False, True)),
    *((blocks, "no momentum", False, 1) for blocks in (2, 4, 8, 16)),
    *((blocks, "no momentum", checkpointed, PARTS) for blocks, checkpointed in ((4, False), (4, True))),
    *((blocks, "man", False, 1) for blocks in (2, 4, 8, 16)),
)
"""Blocks, momentum as the plan names it, whether every unit is checkpointed, and parts of the batch."""


def title(blocks: int, momentum: str, checkpointed: bool, parts: int) -> str:
    method = "end-to-end" if blocks == 1 else f"DGL{'+MAN' if momentum == 'man' else ''}, {blocks} blocks"
    return f"{method}{', checkpointed' if checkpointed else ''}{f', in {parts} parts' if parts > 1 else ''}"


def measure(blocks: int, momentum: str, checkpointed: bool, parts: int) -> dict[str, Any]:
    """Peak and operations of a step of the whole batch."""
    planned = json.loads(PLAN.read_text())["rows"]
    kind = ("no momentum" if blocks == 1 else momentum, blocks, checkpointed)
    cuts = next(row["cuts"] for row in planned if (row["training"], row["num_blocks"], row["recompute"]) == kind)
    objective = dgl(num_classes=1000, head="light") if cuts else None
    auxiliary = man() if cuts and momentum == "man" else None
    with torch.device("meta"):
        model = torchvision.models.resnet101()
        inputs = torch.empty(BATCH // parts, 3, 224, 224)
        targets = torch.zeros(BATCH // parts, dtype=torch.long)
        peak = step_peak(model, inputs, cuts, objective, auxiliary, recompute=checkpointed)
        split_up = split(model, inputs, cuts=cuts, objective=objective, momentum=auxiliary, recompute=checkpointed)
        with FlopCounterMode(display=False) as counter:
            local_gradients(split_up, inputs, targets)
    return {
        "row": title(blocks, momentum, checkpointed, parts),
        "blocks": blocks,
        "momentum": auxiliary is not None,
        "checkpointed": checkpointed,
        "parts": parts,
        "peak_gib": peak / 2**30,
        "operations": parts * counter.get_total_flops(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/rivals-resnet101.json"))
    options = parser.parse_args(arguments)
    rows = [measure(*row) for row in ROWS]
    for row in rows:
        row["operations_to_e2e"] = row["operations"] / rows[0]["operations"]
    print_table(f"ResNet-101, batch {BATCH}, 224 px, float32", rows)
    settings = {"network": "torchvision:resnet101", "batch_size": BATCH, "image_size": 224, "parts": PARTS}
    write(options.output, {"settings": settings, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
