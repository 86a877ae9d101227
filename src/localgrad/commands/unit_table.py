"""The table of a model's units: where the model can be cut, and the cost of each unit."""

import torch

from localgrad.config.build import build_model, build_planned
from localgrad.config.methods import DEFAULT_OBJECTIVE
from localgrad.config.schema import ModelConfig
from localgrad.core.costs import UnitCost, unit_costs
from localgrad.core.units import Unit, units
from localgrad.data.config import MAX_IMAGE_SIZE
from localgrad.errors import LocalGradError
from localgrad.results.terminal import print_table


def inspect_model(name: str, *, depth: int, image_size: int, batch_size: int) -> tuple[list[Unit], list[UnitCost]]:
    """Units of a model by name, and their costs for a batch, including a local head at a cut after the unit.

    Args:
        name: `cifar_resnet`, `torchvision:NAME` or `timm:NAME`.
        depth: number of layers of a `cifar_resnet`.
        image_size: height and width of the images in pixels.
        batch_size: number of images.

    Raises:
        LocalGradError: there is no such model, a size is out of range, or the model cannot be traced.
    """
    if not (1 <= image_size <= MAX_IMAGE_SIZE and 2 <= batch_size < 2**20):
        raise LocalGradError(
            f"image_size is {image_size} and batch_size {batch_size}: image_size is from 1 to {MAX_IMAGE_SIZE}, "
            "batch_size at least 2 (a batch norm cannot normalise one image) and less than 2**20"
        )
    num_classes = 10 if name == "cifar_resnet" else 1000
    model = build_model(ModelConfig(name=name, depth=depth), num_classes)
    found = units(model, torch.empty(2, 3, image_size, image_size))
    objective = build_planned(DEFAULT_OBJECTIVE, num_classes, image_size)
    return found, unit_costs(found, torch.empty(batch_size, 3, image_size, image_size, device="meta"), objective)


def show_units(name: str, found: list[Unit], costs: list[UnitCost], batch_size: int) -> None:
    """Print the table of units."""
    print_table(
        ["cut after", "features", "parameters", "activations", "GFLOP", "head"],
        [
            (
                f"({unit.name}, the end)" if unit is found[-1] else unit.name,
                "x".join(map(str, unit.features[1:])),
                f"{cost.parameters:,}",
                _mebibytes(cost.activations),
                f"{cost.flops / 1e9:.2f}",
                "-" if cost.end_activations == float("inf") else _mebibytes(cost.end_activations),
            )
            for unit, cost in zip(found, costs, strict=True)
        ],
        title=f"{name}: {len(found)} units, so 1 to {len(found)} blocks; batch {batch_size}, float32",
        note="Activations: MiB kept for the backward pass. Head: what the local head of `localgrad plan` would add at "
        "a cut there; - where none can sit. Give names to split(cuts=[...]) or --cuts, or a number to --num-blocks.",
        narrow=[0, 3, 5],
        width=72,
    )


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}"
