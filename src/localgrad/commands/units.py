"""TODO commands.units."""

from collections.abc import Sequence
from dataclasses import dataclass

from localgrad.commands.parse import parse

UNITS_HELP = """List the units of a network: where it may be cut, and what each costs.

Examples:
  localgrad units cifar_resnet --depth 110
  localgrad units torchvision:resnet50 --image-size 128
  localgrad units timm:vit_tiny_patch16_224 --batch-size 64
"""


def units(arguments: Sequence[str]) -> int:
    """`localgrad units MODEL`."""
    import tyro

    @dataclass(frozen=True)
    class Units:
        model: tyro.conf.Positional[str]
        """cifar_resnet, torchvision:NAME or timm:NAME."""
        image_size: int | None = None
        """Height and width of the images in pixels; 32 for cifar_resnet and 224 for others unless given."""
        batch_size: int = 128
        """Images of a batch, for the costs."""
        depth: int = 32
        """Layers of a cifar_resnet."""

    options = parse(Units, arguments, "localgrad units", UNITS_HELP)
    from localgrad.commands.unit_table import inspect_model, show_units

    size = (32 if options.model == "cifar_resnet" else 224) if options.image_size is None else options.image_size
    found, costs = inspect_model(options.model, depth=options.depth, image_size=size, batch_size=options.batch_size)
    show_units(options.model, found, costs, options.batch_size)
    return 0
