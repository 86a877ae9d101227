"""Count the operations and the peak memory of a step of each row on `meta` tensors, relative to end-to-end.

    python benchmarks/operations.py -o results/operations.json

Operations are the floating-point operations of the forward and backward passes (matrix products and convolutions, as
PyTorch counts them), without the optimizer step. The peak is that of a float32 step with SGD, including weights and
optimizer state. Rows can be compared before they are trained.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_jobs import TEN, TRAININGS, Training
from localgrad.config.build import build_blocks, build_factories, build_model
from localgrad.config.schema import TrainConfig
from localgrad.core.step import local_gradients
from localgrad.planning.step_peak import step_peak
from report import print_table, write

MORE = (
    *("e2e-checkpointed", "e2e-accumulate4-checkpointed", "k16-dgl-manpp", "k16-infopro", "k16-infopro-man"),
    *("k16-predsim", "k16-predsim-man"),
)


def operations(config: TrainConfig, num_classes: int, batch_size: int) -> int:
    """Floating-point operations of the forward and backward passes of a step."""
    model = build_model(config.model, num_classes)
    blocks = [block.to("meta") for block in build_blocks(config, model, num_classes)]
    parts = config.optim.accumulate
    inputs = torch.empty(batch_size // parts, 3, config.data.image_size, config.data.image_size, device="meta")
    targets = torch.zeros(batch_size // parts, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        local_gradients(blocks, inputs, targets, reach=config.reach)
    return parts * counter.get_total_flops()


def peak(config: TrainConfig, num_classes: int, batch_size: int) -> int:
    """Peak memory of a float32 step in bytes."""
    objective, momentum = build_factories(config, num_classes)
    model = build_model(config.model, num_classes).to("meta")
    size = config.data.image_size
    example = torch.empty(batch_size, 3, size, size, device="meta")
    ways: dict[str, Any] = {"recompute": config.recompute, "parts": config.optim.accumulate, "reach": config.reach}
    return step_peak(model, example, list(config.cuts or ()), objective, momentum, **ways)


def measure(name: str, batch_size: int) -> dict[str, Any]:
    """The row of a recipe, with the settings of the runs on CIFAR-10."""
    config = Training(f"cifar10-resnet32-{name}", "", TEN).config()
    return {
        "row": name,
        "blocks": len(config.cuts or ()) + 1,
        "operations": operations(config, 10, batch_size),
        "peak_mib": peak(config, 10, batch_size) / 2**20,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [job.recipe for job in TRAININGS if job.folder == "cifar10-ten-epochs"]
    every = [*dict.fromkeys([*(name.removeprefix("cifar10-resnet32-") for name in trained), *MORE])]
    parser.add_argument("--rows", nargs="+", default=every, help="recipes, less the network")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/operations.json"))
    options = parser.parse_args(arguments)
    reference = measure("e2e", options.batch_size)
    rows = []
    for name in options.rows:
        row = measure(name, options.batch_size)
        row["operations_to_e2e"] = row["operations"] / reference["operations"]
        row["peak_to_e2e"] = row["peak_mib"] / reference["peak_mib"]
        rows.append(row)
    print_table("a step of ResNet-32", rows)
    versions = {"torch": torch.__version__}
    write(options.output, {"batch_size": options.batch_size, "network": "cifar_resnet 32", "rows": rows, **versions})


if __name__ == "__main__":
    main()
