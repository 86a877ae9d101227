"""What a local step checks of its blocks and optimizers."""

from collections.abc import Sequence

from torch.optim import Optimizer

from localgrad.core.block import Block
from localgrad.errors import LocalGradError


def check_optimizers(blocks: Sequence[Block], optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that are not one a block."""
    if isinstance(blocks, Block) or isinstance(optimizers, Optimizer) or not hasattr(optimizers, "__len__"):
        raise LocalGradError(
            f"blocks is a {type(blocks).__name__} and optimizers a {type(optimizers).__name__}: give two lists, "
            "what `split` gave and one optimizer a block"
        )
    if not len(blocks):
        raise LocalGradError("blocks is empty: give the list that `split` gave")
    if len(optimizers) != len(blocks):
        raise LocalGradError(
            f"{len(optimizers)} optimizers for {len(blocks)} blocks: give one a block, "
            "[SGD(block.trainable_parameters(), lr=0.1) for block in blocks]"
        )


def check_parameters(index: int, block: Block, optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps what is not its block's, or leaves out what its block would train."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise LocalGradError(
            f"optimizer {index} is a {type(optimizer).__name__}: give a torch optimizer for each block"
        )
    given = {id(parameter) for group in groups for parameter in group["params"]}
    own = {id(parameter): parameter.requires_grad for parameter in block.parameters()}
    foreign = len(given - own.keys())
    missing = sum(trains and key not in given for key, trains in own.items())
    if foreign or missing:
        raise LocalGradError(
            f"optimizer {index} has {foreign} parameters that are not of block {index} and lacks {missing} that are: "
            "give each block an optimizer over its own, as SGD(block.trainable_parameters(), lr=0.1), and what is not "
            "to be trained requires_grad_(False)"
        )
