"""Split a model into gradient-isolated blocks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.auxiliary import build_auxiliary
from localgrad.core.block import Block
from localgrad.core.momentum import Momentum
from localgrad.core.origin import Origin
from localgrad.core.partition import check_num_blocks, cut_by_cost, cut_evenly
from localgrad.core.site import Criterion, Objective
from localgrad.core.units import Unit, check_model, find_unit, match_mode, units, why_whole
from localgrad.core.wrapped import unwrapped
from localgrad.errors import LocalGradError, SettingsError, warn

Balance = Literal["memory", "compute", "count"]


def split(
    model: nn.Module,
    example: Tensor,
    *,
    cuts: Sequence[str] | None = None,
    num_blocks: int | None = None,
    balance: Balance = "memory",
    objective: Objective | None = None,
    momentum: Momentum | None = None,
    criterion: Criterion = F.cross_entropy,
    recompute: bool = False,
    names: Sequence[str] | None = None,
    channel_dim: int | Mapping[str, int] | None = None,
    targets: Any = None,
) -> list[Block]:
    """Split `model` into gradient-isolated blocks, each with a local loss.

    Block j minimises `L_j = objective(momentum(h_j), y, x)` with `h_j = body_j(stop_gradient(h_{j-1}))`; the last block
    minimises `criterion(model(x), y)`. The model is trained in place: the blocks hold its own modules, its `state_dict`
    keeps its keys, and there is nothing to unwrap. Before `split`, move the model to its device and dtype, load its
    weights, freeze layers and add adapters: `local_step` refuses blocks that are no longer the model's. Copy or pickle
    the list of blocks as a whole, since each momentum reads the next block. A loss that a module stores as an attribute
    (a balance loss of experts) is not trained. A block of frozen layers alone has no objective; its optimizer is None.

    Args:
        model: any model with one tensor in and one out (see `units`); others go to `isolate`.
        example: a batch of the shape that will be trained on (see `units`).
        cuts: names of the units after which gradients are isolated. A submodule's name stands for its last unit;
            an empty list leaves one block, which is end-to-end training.
        num_blocks: K, instead of `cuts`.
        balance: cost that the K blocks share evenly: `"memory"` (bytes saved for the backward pass), `"compute"`
            (floating-point operations), both with the auxiliary networks, or `"count"` (units). Of equal choices the
            one with the smallest auxiliary networks is taken. For the smallest peak memory of a batch see `plan`.
        objective: the local objective, such as `dgl(num_classes=10)`. Needed for more than one block.
        momentum: `man(...)`, `manpp(...)` or None.
        criterion: loss of the model's output and the targets, for the last block. Heads use it too, unless their
            factory gets another.
        recompute: activation checkpointing inside the blocks: only features between units are saved, and the backward
            pass computes each unit again. Weights and running statistics come out the same, bit for bit.
        names: the units by name, for a model that cannot be traced (see `units`).
        channel_dim: the dimension of the features that holds channels, if `units` does not find it (see `units`).
        targets: an example of the targets of `example`. With `num_blocks` the costs of auxiliary networks are counted
            with them; classes `(N,)` if None.

    Returns:
        K blocks in order. Auxiliary networks are on the model's device, in the dtype of its features. Their initial
        values are drawn from the global random generator.

    Raises:
        LocalGradError: a cut is no unit or the last unit, cuts are not in the model's order, K is out of range, no
            objective is given, the objective cannot be built at a cut, two blocks share a parameter, or the model
            cannot be traced.

    Source: Nøkland and Eidnes 2019 (https://arxiv.org/abs/1901.06656), section 2; Belilovsky et al. 2020
    (https://arxiv.org/abs/1901.08164), Algorithm 1; Su et al. 2024 (https://arxiv.org/abs/2407.05623) for the momentum.
    """
    _check_arguments(cuts, num_blocks, objective, momentum, criterion)
    check_model(model)
    model = unwrapped(model)
    found = units(model, example, names, channel_dim=channel_dim)
    if cuts is not None:
        ends = cut_positions(found, cuts)
    else:
        ends = choose_cuts(found, example, num_blocks or 0, balance, objective, momentum, targets, criterion)
    if ends and objective is None:
        raise LocalGradError(
            f"objective is None with {len(ends) + 1} blocks: every block but the last needs a local objective, "
            "such as localgrad.dgl(num_classes=10)"
        )
    edges = [0, *(end + 1 for end in ends), len(found)]
    runs = [found[start:stop] for start, stop in pairwise(edges)]
    _check_no_sharing(model, runs)
    blocks: list[Block] = []
    for index, run in enumerate(runs[:-1]):
        assert objective is not None
        if _is_frozen(index, run):
            blocks.append(Block(run, None, None, None, recompute))
            continue
        following = runs[index + 1]
        if following is runs[-1]:
            following = following[:-1] or following  # the model's head is copied only where nothing else is left
        rest = found[edges[index + 1] :]
        auxiliary = build_auxiliary(
            run[-1], following, rest, example, index, len(runs), objective, momentum, criterion, model
        )
        blocks.append(Block(run, *auxiliary, None, recompute))
    blocks.append(Block(runs[-1], None, None, criterion, recompute))
    match_mode(blocks, model)
    origin = Origin(model, blocks)
    for block in blocks:
        block.match_modes()
        block.origin, block.takes = origin, example.shape[1:]
    return blocks


def _check_arguments(cuts: Any, num_blocks: Any, objective: Any, momentum: Any, criterion: Any) -> None:
    if (cuts is None) == (num_blocks is None):
        raise SettingsError(
            f"cuts is {cuts!r} and num_blocks is {num_blocks!r}: give one of them, "
            'such as cuts=["layer1", "layer2"] or num_blocks=4'
        )
    for name, given, example_of in (("objective", objective, "dgl(num_classes=10)"), ("momentum", momentum, "man()")):
        if given is not None and (not callable(given) or isinstance(given, nn.Module)):
            raise SettingsError(f"{name} is {given!r}: it must be a factory, such as localgrad.{example_of}, or None")
    if not callable(criterion):
        raise SettingsError(f"criterion is {criterion!r}: give a function of scores and targets, as F.cross_entropy")
    if cuts is not None and not (
        isinstance(cuts, list | tuple) and all(isinstance(name, str) for name in cast(Any, cuts))
    ):
        raise SettingsError(f'cuts is {cuts!r}: give a list of names, as ["layer1"]; `units` lists them')


def _is_frozen(index: int, run: Sequence[Unit]) -> bool:
    """Whether a block has parameters and trains none of them, so that a local loss trains nothing. Warns if so."""
    trains = [parameter.requires_grad for unit in run for parameter in unit.module.parameters()]
    if not trains or any(trains):
        return False
    warn(f"block {index} ({run[0].name} to {run[-1].name}) trains nothing: it gets no head, and None for an optimizer")
    return True


def cut_positions(found: Sequence[Unit], cuts: Sequence[str]) -> list[int]:
    """Indices of the units after which to cut, from names in the order of the forward pass."""
    ends = [find_unit(found, name) for name in cuts]
    if ends != sorted(set(ends)):
        raise LocalGradError(
            f"cuts are {', '.join(cuts)}: they must be different units in the model's order, "
            f"{', '.join(found[end].name for end in sorted(set(ends)))}"
        )
    if ends and ends[-1] == len(found) - 1:
        raise LocalGradError(
            f"cut {cuts[-1]!r} is at the end of the model ({found[-1].name} is its last unit): nothing is left for the "
            "last block; leave this cut out"
        )
    return ends


def choose_cuts(
    found: Sequence[Unit],
    example: Tensor,
    num_blocks: int,
    balance: Balance,
    objective: Objective | None,
    momentum: Momentum | None,
    targets: Any = None,
    criterion: Criterion = F.cross_entropy,
) -> list[int]:
    """Indices of the units after which to cut for K blocks that share memory, compute or units evenly."""
    check_num_blocks(num_blocks, len(found), why_whole(found))
    if balance == "count":
        return cut_evenly(len(found), num_blocks)
    if balance not in ("memory", "compute"):
        raise LocalGradError(f"balance is {balance!r}: it is 'memory', 'compute' or 'count'")
    from localgrad.core.costs import CannotCountError, unit_costs  # here, as counters of operations import slowly

    try:
        costs = unit_costs(found, example, objective, momentum, num_blocks, targets, criterion)
    except CannotCountError as error:
        warn(
            f"{error}: blocks get the same number of units instead of the same {balance}; give targets=, an example of "
            'the batch\'s targets, or cuts=[...], or balance="count"'
        )
        return cut_evenly(len(found), num_blocks)
    weights = [cost.end_parameters for cost in costs]
    if balance == "memory":
        return cut_by_cost([c.activations for c in costs], num_blocks, [c.end_activations for c in costs], weights)
    return cut_by_cost([c.flops for c in costs], num_blocks, [c.end_flops for c in costs], weights)


def _check_no_sharing(model: nn.Module, runs: Sequence[Sequence[Unit]]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    owner: dict[Any, int] = {}
    for index, run in enumerate(runs):
        for unit in run:
            for parameter in unit.module.parameters():
                if owner.setdefault(parameter, index) != index:
                    raise LocalGradError(
                        f"parameter {names.get(parameter, '?')!r} is shared by blocks {owner[parameter]} and {index}: "
                        "gradients cannot be isolated between them; cut so that one block has it, or untie it"
                    )
