"""Build the auxiliary networks of blocks (momentum and objective), and keep them on the model's device."""

# pyright: reportUnnecessaryIsInstance=false

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.isolated_block import IsolatedBlock
from localgrad.core.momentum import Momentum
from localgrad.core.site import Criterion, Objective, Site
from localgrad.core.units import Unit
from localgrad.errors import LocalGradError


def build_auxiliary(
    last: Unit,
    following: Sequence[Unit],
    rest: Sequence[Unit],
    example: Tensor,
    index: int,
    num_blocks: int,
    objective: Objective,
    momentum: Momentum | None,
    criterion: Criterion = F.cross_entropy,
    model: nn.Module | None = None,
) -> tuple[nn.Module | None, nn.Module]:
    """The momentum auxiliary network (or None) and the objective of a block that ends with the unit `last`.

    The momentum copies first units of `following`, the next block's units. The objective's site holds `rest`, the
    model's units after `last`, without the copied ones. The objective has the dtype of the features that it gets, or
    float32 if they are integers.
    """
    like = next((p for unit in (last, *following) for p in unit.module.parameters()), example)
    with torch.device(like.device):
        branches = None if momentum is None else momentum(following)
        copies = 0 if branches is None else branches.depth
        seen = following[copies - 1] if copies else last
        features = seen.features if branches is None else branches.features(seen)
        after = tuple(rest[copies:])
        site = Site(
            features, seen.channel_dim, example.shape, index, num_blocks, after, model=model, criterion=criterion
        )
        head = objective(site)
    if not isinstance(head, nn.Module):
        raise LocalGradError(
            f"objective gave {type(head).__name__} for block {index}: a factory takes a Site and returns an nn.Module "
            "with forward(features, targets, inputs) -> loss"
        )
    return branches, head.to(like.device, seen.dtype if seen.dtype.is_floating_point else torch.float32)


def build_auxiliaries(
    model: nn.Module,
    blocks: Sequence[IsolatedBlock],
    inputs: Tensor | None,
    objective: Objective,
    momentum: Momentum | None,
) -> Iterator[tuple[nn.Module | None, nn.Module | None]]:
    """Momentum auxiliary network (or None) and objective of each local block; None for both if the block is frozen.

    Raises:
        LocalGradError: with momentum, no module that could be copied reads the output of a cut.
    """
    example = torch.empty(0) if inputs is None else inputs
    for index, block in enumerate(blocks[:-1]):
        assert block.unit is not None
        if momentum is not None and not block.following:
            raise LocalGradError(
                f"no module after the cut {block.unit.name!r} takes its output (outside of the model's own activation "
                "checkpointing), so momentum has nothing to copy: cut right before a module with parameters, give "
                "isolate(..., recompute=True) for the model's checkpointing, or momentum=None"
            )
        if any(parameter.requires_grad for parameter in block.parameters):
            yield build_auxiliary(
                block.unit, block.following, block.rest, example, index, len(blocks), objective, momentum, model=model
            )
        else:
            yield None, None


def follow_model(networks: nn.Module, momenta: Iterable[Any], model: nn.Module) -> None:
    """Move auxiliary networks to the model's device, put them in training mode, and do postponed updates of the EMA.

    Raises:
        LocalGradError: modules that a momentum copies have changed since it copied them.
    """
    device = next(model.parameters()).device
    if any(parameter.device != device for parameter in itertools.islice(networks.parameters(), 1)):
        networks.to(device)
    if not networks.training:
        networks.train()
    for momentum in momenta:
        if momentum is not None:
            if not momentum.is_current():
                raise LocalGradError(
                    "modules that a momentum auxiliary network copies have changed since isolate (requires_grad, an "
                    "adapter, a layer), and the copies are of what they were: change the model first, then isolate it"
                )
            momentum.settle()
            momentum.match_modes()
