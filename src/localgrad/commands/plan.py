"""TODO commands.plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localgrad.commands.parse import parse

PLAN_HELP = """Predict the peak memory of a training step, and find the cuts that make it smallest. Needs no GPU.

Compares end-to-end training, with and without activation checkpointing, and local learning for several numbers of
blocks, with and without momentum.

Examples:
  localgrad plan torchvision:resnet101 --budget 8GiB
  localgrad plan cifar_resnet --depth 110 --batch-size 1024 --output runs/plan
"""


def plan(arguments: Sequence[str]) -> int:
    """`localgrad plan MODEL`."""
    import tyro

    from localgrad.config.methods import DEFAULT_OBJECTIVE, planned_objective

    @dataclass(frozen=True)
    class Plan:
        model: tyro.conf.Positional[str]
        """cifar_resnet, torchvision:NAME or timm:NAME."""
        batch_size: int = 128
        """Images of a batch."""
        image_size: int | None = None
        """Height and width of the images in pixels; 32 for cifar_resnet and 224 for others unless given."""
        num_classes: int | None = None
        """Number of classes; 10 for cifar_resnet and 1000 for others unless given."""
        depth: int = 32
        """Layers of a cifar_resnet."""
        objective: str = DEFAULT_OBJECTIVE
        """Local loss, by name as in a config; above 96 px with the heads for wide features."""
        momentum: str = "man"
        """Momentum auxiliary network: none, man or manpp."""
        precision: str = "32-true"
        """32-true, or bf16-mixed for float32 weights and a forward pass under CUDA's bf16 autocast."""
        step_each_block: bool = False
        """Step each block right after its own backward pass, so that gradients of one block live at a time."""
        budget: str | None = None
        """Memory that a step may take, such as 8GiB."""
        num_blocks: tuple[int, ...] = ()
        """Numbers of blocks to try; 1, 2, 4, 8, ... unless given."""
        output: Path | None = None
        """Folder for plan.json and plan.png; nothing is written unless given."""

    options = parse(Plan, arguments, "localgrad plan", PLAN_HELP)
    from localgrad.commands.plan_table import parse_bytes, plan_model, show_sheets, write_sheets

    small = options.model == "cifar_resnet"
    size = (32 if small else 224) if options.image_size is None else options.image_size
    budget = None if options.budget is None else parse_bytes(options.budget)
    sheets = plan_model(
        options.model,
        depth=options.depth,
        num_classes=(10 if small else 1000) if options.num_classes is None else options.num_classes,
        batch_size=options.batch_size,
        image_size=size,
        objective=options.objective,
        momentum=options.momentum,
        budget=budget,
        num_blocks=options.num_blocks or None,
        precision=options.precision,
        step_each_block=options.step_each_block,
    )
    name = f"cifar_resnet {options.depth}" if small else options.model
    precision = "float32" if options.precision == "32-true" else options.precision
    head = planned_objective(options.objective, size).head
    loss = options.objective if head is None else f"{options.objective} with head {head}"
    title = f"{name}, batch {options.batch_size}, {size} px, {precision}, SGD, {loss}"
    title += ", each block stepped at once" if options.step_each_block else ""
    show_sheets(title, sheets, budget)
    if options.output is not None:
        write_sheets(options.output, title, sheets, budget)
        print(f"wrote {options.output / 'plan.json'} and {options.output / 'plan.png'}")
    return 0
