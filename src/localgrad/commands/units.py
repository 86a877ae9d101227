"""List the units of a network: where it can be cut, and what each unit costs.

Examples:
  localgrad units cifar_resnet --depth 110
  localgrad units torchvision:resnet50 --image-size 128
  localgrad units timm:vit_tiny_patch16_224 --batch-size 64
"""

from collections.abc import Sequence

from tyro.conf import Positional

from localgrad.commands.parse import call, loading


def units(model: Positional[str], *, image_size: int | None = None, batch_size: int = 128, depth: int = 32) -> int:
    """Print the table of units.

    Args:
        model: cifar_resnet, torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.
        image_size: Height and width of the images in pixels; by default 32 for cifar_resnet and 224 for others.
        batch_size: Images of the batch that the costs are for.
        depth: Number of layers of a cifar_resnet.
    """
    with loading():
        from localgrad.commands.unit_table import inspect_model, show_units

    size = (32 if model == "cifar_resnet" else 224) if image_size is None else image_size
    found, costs = inspect_model(model, depth=depth, image_size=size, batch_size=batch_size)
    show_units(model, found, costs, batch_size)
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad units MODEL`."""
    return call(units, arguments, "localgrad units", __doc__)
