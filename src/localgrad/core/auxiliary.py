"""The auxiliary networks of a block: momentum and objective, built for one site, and kept beside the model."""

# pyright: reportUnnecessaryIsInstance=false

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.momentum import Momentum
from localgrad.core.parts import Part
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

    The momentum copies from `following`, the next block's units; the objective is told of `rest`, the model's units
    after `last` (after the copied ones, where there is a momentum). The objective is made in the dtype of the features
    that it gets, float32 where they are integers.
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
    model: nn.Module, parts: Sequence[Part], inputs: Tensor | None, objective: Objective, momentum: Momentum | None
) -> Iterator[tuple[nn.Module | None, nn.Module | None]]:
    """Momentum auxiliary network (or None) and objective of each local block; None for both where nothing is trained.

    Raises:
        LocalGradError: momentum is to copy the module that takes what a cut gives, and there is none.
    """
    example = torch.empty(0) if inputs is None else inputs
    for block, part in enumerate(parts[:-1]):
        assert part.unit is not None
        if momentum is not None and not part.following:
            raise LocalGradError(
                f"no module after the cut {part.unit.name!r} takes its output, so momentum has nothing to copy: cut "
                "right before a module with parameters, or give momentum=None"
            )
        if any(parameter.requires_grad for parameter in part.parameters):
            yield build_auxiliary(
                part.unit, part.following, part.rest, example, block, len(parts), objective, momentum, model=model
            )
        else:
            yield None, None


def follow_model(networks: nn.Module, momenta: Iterable[Any], model: nn.Module) -> None:
    """Put auxiliary networks on the model's device and in training mode, and settle their averages."""
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
