"""Test error of a trained network and of each block's local head; early exit after a block."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from localgrad.core.block import Block
from localgrad.errors import LocalGradError
from localgrad.results.finished import load_trained
from localgrad.training.error_rates import error_rates


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    test_error: float
    """Test error in percent."""
    local_errors: list[float | None] | None
    """Test error in percent of each block's own head, None for a block without a class head. None if not requested."""
    images: int
    """Number of test images."""


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    test_split: str | None = None,
    local_heads: bool = False,
    accelerator: str = "auto",
) -> Evaluation:
    """Evaluate the saved weights of a finished run.

    Args:
        run_dir: the run folder.
        data: other images, as a hub name or a folder; all of them are used. None takes the test images of the run.
        test_split: split to test on; None takes that of the run.
        local_heads: also evaluate each block's own head, loaded from the checkpoint.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        Errors in percent, and the number of images.

    Raises:
        LocalGradError: the folder holds no finished run, a file in it is damaged, the images have other classes than
            the network, or local heads are requested and the last checkpoint is missing or damaged.
    """
    trained = load_trained(run_dir, data=data, test_split=test_split, with_blocks=local_heads, accelerator=accelerator)
    test_error, local_errors = error_rates(
        trained.fabric,
        trained.model,
        trained.blocks,
        trained.test,
        batch_size=trained.config.optim.batch_size,
        channels_last=trained.config.channels_last,
    )
    return Evaluation(test_error, local_errors, len(trained.test))


@dataclass(frozen=True)
class EarlyExit:
    """Result of `early_exit`."""

    test_error: float
    """Test error in percent of the block's own head."""
    images: int
    """Number of test images."""
    num_blocks: int
    """Number of blocks of the whole network."""
    compute: float
    """Floating-point operations of the forward pass up to this head, divided by those of the whole network."""
    parameters: float
    """Number of parameters up to this head, divided by that of the whole network."""


def early_exit(
    run_dir: str | Path,
    block: int,
    *,
    data: str | None = None,
    test_split: str | None = None,
    accelerator: str = "auto",
) -> EarlyExit:
    """Evaluate the first blocks of a finished run with the own head of the last of them, as a smaller network.

    The head consists of the momentum auxiliary network, if any, and the class head, both as local training left them.
    `compute` and `parameters` include the head, so they exceed 1 if the head is larger than the rest of the network.

    Args:
        run_dir: the run folder.
        block: number of the block, from 1. The head of the last block is that of the network.
        data, test_split, accelerator: as in `evaluate`.

    Raises:
        LocalGradError: there is no such block, its head has no class scores, the folder holds no finished run, or a
            file in it is damaged.
    """
    trained = load_trained(run_dir, data=data, test_split=test_split, with_blocks=True, accelerator=accelerator)
    count = len(trained.blocks)
    if not 1 <= block <= count:
        raise LocalGradError(f"exit-at is {block}: {run_dir} has {count} block(s); give a number from 1 to {count}")
    exit_network = _Exit(trained.blocks[:block])
    for module in (trained.model, exit_network):
        module.eval()
    size = trained.config.data.image_size
    example = torch.zeros(1, 3, size, size, device=trained.fabric.device)
    compute = _operations(exit_network, example) / _operations(trained.model, example)
    parameters = _size(exit_network.parts) / _size([trained.model])
    test_error, _ = error_rates(
        trained.fabric,
        exit_network,
        (),
        trained.test,
        batch_size=trained.config.optim.batch_size,
        channels_last=trained.config.channels_last,
    )
    return EarlyExit(test_error, len(trained.test), count, compute, parameters)


class _Exit(nn.Module):
    """The first blocks of a network, and the head of the last of them."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.bodies = [block.body for block in blocks]
        self.last = blocks[-1]

    @property
    def parts(self) -> list[nn.Module]:
        """Modules of the forward pass: bodies, momentum auxiliary network and class head, without a decoder."""
        auxiliary = (self.last.momentum, getattr(self.last.objective, "classifier", None))
        return [*self.bodies, *(module for module in auxiliary if module is not None)]

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs
        for body in self.bodies:
            features = body(features)
        scores = self.last.local_logits(features)
        if scores is None:
            raise LocalGradError(
                f"block {len(self.bodies)} gives no class scores (its local loss trains none, as a contrastive one): "
                "exit at another block; evaluate --local-heads lists those that have a class head"
            )
        return scores


@torch.no_grad()
def _operations(module: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(example)
    return counter.get_total_flops()


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
