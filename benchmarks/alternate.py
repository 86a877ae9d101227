"""Train every other local block in each step, which halves the work of the heads and of the backward passes.

    python benchmarks/alternate.py cifar10-resnet32-k16-dgl-man --data path/to/cifar10 --epochs 5 \\
        --run-dir runs/alternate

Takes the arguments of `localgrad train`. In even steps blocks 1, 3, ... train, in odd steps blocks 2, 4, ... The last
block always trains. A block that does not train runs its forward pass without a graph and has no loss. Its running
statistics and EMA are still updated. The library has no such setting, and no row has been trained so far.
"""

import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from localgrad.commands.main import main
from localgrad.core import step
from localgrad.core.block import Block

forward, check_loss = Block.forward, step._check_loss
calls: dict[int, int] = {}
"""Forward passes of each block in training so far, plus its index, by id of the block."""


def alternating(self: Block, features: Tensor, targets: Any, inputs: Tensor, **options: Any) -> Any:
    """The forward pass of a block; in every other step without a graph and with a loss of 0."""
    if not self.training or self.objective is None:
        return forward(self, features, targets, inputs, **options)
    calls[id(self)] = calls.get(id(self), len(calls)) + 1  # the first step of block j is number j
    if calls[id(self)] % 2:
        return forward(self, features, targets, inputs, **options)
    with torch.no_grad():
        for unit in self.body:
            features = unit(features)
    return features, torch.zeros((), device=features.device)


def unless_zero(loss: Tensor, block: Block) -> None:
    """Check the loss of a block only if the block trains in this step."""
    if loss.requires_grad:
        check_loss(loss, block)


if __name__ == "__main__":
    with mock.patch.object(Block, "forward", alternating), mock.patch.object(step, "_check_loss", unless_zero):
        sys.exit(main(["train", *sys.argv[1:]]))
