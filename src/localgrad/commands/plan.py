"""Predict the peak memory of a training step, and find the cuts with the smallest peak. Needs no GPU.

Compares end-to-end training, with and without activation checkpointing, and local learning for several numbers of
blocks, with and without momentum.

Examples:
  localgrad plan torchvision:resnet101 --budget 8GiB
  localgrad plan cifar_resnet --depth 110 --batch-size 1024 --output runs/plan
"""

from collections.abc import Sequence
from typing import Literal

from tyro.conf import Positional

from localgrad.commands.parse import Output, call, loading
from localgrad.runs.files import check_writable


def plan(
    model: Positional[str],
    *,
    batch_size: int = 128,
    image_size: int | None = None,
    num_classes: int | None = None,
    depth: int = 32,
    objective: str | None = None,
    momentum: str = "man",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    reach: int = 1,
    step_each_block: bool = False,
    budget: str | None = None,
    num_blocks: tuple[int, ...] = (),
    output: Output = None,
) -> int:
    """Print the plan.

    Args:
        model: cifar_resnet, torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.
        batch_size: Images of a batch.
        image_size: Height and width of the images in pixels; by default 32 for cifar_resnet and 224 for others.
        num_classes: Number of classes; by default 10 for cifar_resnet and 1000 for others.
        depth: Number of layers of a cifar_resnet.
        objective: Local loss, by its name in a config; by default dgl. For images above 96 px the plan takes the
            objective's heads for large images.
        momentum: Momentum auxiliary network: none, man or manpp.
        precision: 32-true, or bf16-mixed for float32 weights and a forward pass under CUDA's bf16 autocast.
        reach: Number of neighbouring blocks that each local loss trains. Above 1 each row is measured in a step on
            tensors without data, which takes longer; float32 only.
        step_each_block: Step each block right after its own backward pass, so that memory holds the gradients of one
            block at a time.
        budget: Memory that a step may take, such as 8GiB.
        num_blocks: Numbers of blocks to try; by default 1, 2, 4, 8, ...
        output: Folder for plan.json and plan.png; by default nothing is written.
    """
    if output is not None:
        check_writable(output)
    with loading():
        from localgrad.commands.plan_table import parse_bytes, plan_model, show_sheets, write_sheets
        from localgrad.config.methods import DEFAULT_OBJECTIVE, planned_objective

    objective = objective or DEFAULT_OBJECTIVE
    small = model == "cifar_resnet"
    size = (32 if small else 224) if image_size is None else image_size
    room = None if budget is None else parse_bytes(budget)
    sheets = plan_model(
        model,
        depth=depth,
        num_classes=(10 if small else 1000) if num_classes is None else num_classes,
        batch_size=batch_size,
        image_size=size,
        objective=objective,
        momentum=momentum,
        budget=room,
        num_blocks=num_blocks or None,
        precision=precision,
        reach=reach,
        step_each_block=step_each_block,
    )
    name = f"cifar_resnet {depth}" if small else model
    head = planned_objective(objective, size).head
    loss = objective if head is None else f"{objective} with head {head}"
    title = f"{name}, batch {batch_size}, {size} px, {'float32' if precision == '32-true' else precision}, SGD, {loss}"
    title += f", reach {reach}" if reach > 1 else ""
    title += ", each block stepped at once" if step_each_block else ""
    show_sheets(title, sheets, room)
    if output is not None:
        write_sheets(output, title, sheets, room)
        print(f"wrote {output / 'plan.json'} and {output / 'plan.png'}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad plan MODEL`."""
    return call(plan, arguments, "localgrad plan", __doc__)
