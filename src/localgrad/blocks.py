"""Blocks: runs of units, isolated from each other's gradients, each with a local loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.errors import LocalGradError
from localgrad.momentum import Momentum
from localgrad.partition import cut_by_cost, cut_evenly
from localgrad.recompute import recomputed
from localgrad.tracing import TwoModes
from localgrad.units import Unit, find_unit, match_mode, units

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """Where an objective sits; what a factory needs to know to build it.

    Attributes:
        features: shape of the features that it gets, `(N, C, H, W)`, `(N, H, W, C)`, `(N, C, L)`, `(N, L, D)` or
            `(N, D)`.
        channel_dim: the dimension of `features` that holds channels, 1 or the last.
        inputs: shape of the network's input, `(N, 3, H, W)` for images.
        index: of the block, from 0.
        num_blocks: K, the last block included, which has no objective.
    """

    features: torch.Size
    channel_dim: int
    inputs: torch.Size
    index: int
    num_blocks: int


Objective = Callable[[Site], nn.Module]
"""Builds, for a site, a module with `forward(features, targets, inputs) -> loss`."""

Balance = Literal["memory", "compute", "count"]


class Block(nn.Module):
    """A run of units with a local loss.

    Attributes:
        body: the units, the model's own modules.
        momentum: the momentum auxiliary network, or None.
        objective: the auxiliary network and local loss, or None on the last block.
        criterion: loss of the model's output, or None on all blocks but the last.
        recompute: whether the activations of each unit are computed again in the backward pass.
        names: names of the units.
    """

    def __init__(
        self,
        found: Sequence[Unit],
        momentum: nn.Module | None,
        objective: nn.Module | None,
        criterion: Criterion | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(*(unit.module for unit in found))
        self.momentum = momentum
        self.objective = objective
        self.criterion = criterion
        self.recompute = recompute
        self.names = tuple(unit.name for unit in found)
        # a tuple is not registered a second time
        self._in_place = tuple(unit.module for unit in found if unit.writes_input)
        self._layers = [module for module in self.body.modules() if module._parameters]
        self._modes = [module for module in self.body if isinstance(module, TwoModes)]

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features before the block to features after it, and the block's loss.

        Args:
            features: output of the block before, detached; the inputs for the first block.
            targets: class of each sample, `(N,)`, or what the criterion takes.
            inputs: the batch, `(N, 3, H, W)`; an objective may reconstruct it.

        Returns:
            The body's output, still attached to the block's graph, and a scalar loss. The last block's output is the
            model's.
        """
        if self.body[0] in self._in_place and features.data_ptr() == inputs.data_ptr():
            features = features.clone()  # objectives of later blocks read the inputs too
        for unit in self.body:
            features = recomputed(unit, features, unit, unit in self._in_place) if self.recompute else unit(features)
        if self.objective is None:
            assert self.criterion is not None
            return features, self.criterion(features, targets)
        version = features._version
        loss = self.objective(self._mixed(features), targets, inputs)
        if features._version != version:
            raise LocalGradError(
                f"the objective of block {self.names[0]}..{self.names[-1]} changes its features in place, and the next "
                "block would get them changed: start it without inplace=True, or with features.clone()"
            )
        return features, loss

    def _mixed(self, features: Tensor) -> Tensor:
        return features if self.momentum is None else self.momentum(features)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters to hand to this block's optimizer: all but frozen ones, as the sum's EMA branch is."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_training(self) -> None:
        """Refuse to train in evaluation mode, as `model.eval()` leaves the body, and `model.train()` the rest."""
        body = not self._layers or any(module.training for module in self._layers)
        if not body or not all(module.training for module in (self.momentum, self.objective, *self._modes) if module):
            raise LocalGradError(
                f"block {self.names[0]}..{self.names[-1]} is in evaluation mode (after model.eval()?), so its norms "
                "and dropout would not train: call block.train() for every block before the next step"
            )

    def update_momentum(self) -> None:
        """Move the EMA branch towards the next block's first unit; nothing where there is none."""
        if self.momentum is not None:
            self.momentum.update()  # pyright: ignore[reportCallIssue]

    def local_logits(self, features: Tensor) -> Tensor | None:
        """Class scores of the block's own head, `(N, num_classes)`; the model's output on the last block.

        Args:
            features: output of this block's body.

        Returns:
            None if the objective has no `predict(features)` that gives class scores.
        """
        if self.objective is None:
            return features
        predict: Callable[[Tensor], Tensor | None] | None = getattr(self.objective, "predict", None)
        return None if predict is None else predict(self._mixed(features))

    def auxiliary_state_dict(self) -> dict[str, Tensor]:
        """Momentum and objective tensors, under `momentum.` and `objective.`; the model has the body's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("body.")}

    def load_auxiliary_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `auxiliary_state_dict` gave.

        Raises:
            LocalGradError: keys or shapes are those of another objective or momentum.
        """
        own = self.auxiliary_state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            raise LocalGradError(
                f"auxiliary state of the block {self.names[0]}..{self.names[-1]} does not fit: {wrong[0]!r} and "
                f"{len(wrong) - 1} more differ; load it into a split with the same cuts, objective and momentum"
            )
        self.load_state_dict(state, strict=False)


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
) -> list[Block]:
    """Split `model` into gradient-isolated blocks, each with a local loss.

    Block j minimises `L_j = objective(momentum(h_j), y, x)` with `h_j = body_j(stop_gradient(h_{j-1}))`, the last
    `criterion(model(x), y)`. The model is trained in place: the blocks hold its own modules, its `state_dict` keeps
    its keys, and there is nothing to unwrap. Move the model to its device and dtype first; copy or pickle the list of
    blocks as a whole, since each momentum reads the next block.

    Args:
        model: any classification model with one tensor in and one out (see `units`).
        example: a batch of the shape that will be trained on; only shape, dtype and device count.
        cuts: names of the units after which gradients are isolated. A submodule's name stands for its last unit;
            an empty list leaves one block, which is end-to-end training.
        num_blocks: K, instead of `cuts`.
        balance: what the K blocks share evenly: `"memory"` (activation bytes kept for the backward pass, auxiliary
            network included), `"compute"` (floating-point operations, likewise) or `"count"` (units). Of equal choices
            the one with the smallest auxiliary networks is taken. For the smallest peak of a given batch see `plan`.
        objective: the local objective, such as `dgl(num_classes=10)`. Needed for more than one block.
        momentum: `man(...)`, `manpp(...)` or None.
        criterion: loss of the model's output and the targets, for the last block.
        recompute: activation checkpointing inside the blocks: keep only what is between units, and compute each unit
            again in the backward pass. Weights and running statistics come out the same, bit for bit.
        names: the units by name, for a model that cannot be traced.

    Returns:
        K blocks in order. Auxiliary networks are made on the model's device in its dtype, from the global generator.

    Raises:
        LocalGradError: a cut is no unit, K is out of range, the cuts do nothing, no objective is given, the objective
            cannot sit at a cut, two blocks share a parameter, or the model cannot be traced.

    Source: Nokland and Eidnes 2019 (arXiv 1901.06656), section 2; Belilovsky et al. 2020 (arXiv 1901.08164),
    Algorithm 1; Su et al. 2024 (arXiv 2407.05623) for the momentum.
    """
    if (cuts is None) == (num_blocks is None):
        raise LocalGradError(
            f"cuts is {cuts!r} and num_blocks is {num_blocks!r}: give one of them, "
            'such as cuts=["layer1", "layer2"] or num_blocks=4'
        )
    for name, given, example_of in (("objective", objective, "dgl(num_classes=10)"), ("momentum", momentum, "man()")):
        if given is not None and (not callable(given) or isinstance(given, nn.Module)):
            raise LocalGradError(f"{name} is {given!r}: it must be a factory, such as localgrad.{example_of}, or None")
    if not callable(criterion):
        raise LocalGradError(f"criterion is {criterion!r}: give a function of scores and targets, as F.cross_entropy")
    if cuts is not None and not (isinstance(cuts, list | tuple) and all(isinstance(name, str) for name in cuts)):
        raise LocalGradError(f'cuts is {cuts!r}: give a list of names, as ["layer1"]; `units` lists them')
    found = units(model, example, names)
    if cuts is not None:
        ends = cut_positions(found, cuts)
    else:
        ends = choose_cuts(found, example, num_blocks or 0, balance, objective, momentum)
    if ends and objective is None:
        raise LocalGradError(
            f"objective is None with {len(ends) + 1} blocks: every block but the last needs a local objective, "
            "such as localgrad.dgl(num_classes=10)"
        )
    edges = [0, *(end + 1 for end in ends), len(found)]
    runs = [found[start:stop] for start, stop in pairwise(edges)]
    _check_no_sharing(model, runs)
    blocks = []
    for index, run in enumerate(runs[:-1]):
        assert objective is not None
        following = runs[index + 1]
        if following is runs[-1]:
            following = following[:-1] or following  # the model's head is copied only where nothing else is left
        auxiliary = build_auxiliary(run[-1], following, example, index, len(runs), objective, momentum)
        blocks.append(Block(run, *auxiliary, None, recompute))
    blocks.append(Block(runs[-1], None, None, criterion, recompute))
    match_mode(blocks, model)
    return blocks


def cut_positions(found: Sequence[Unit], cuts: Sequence[str]) -> list[int]:
    """Indices of the units after which to cut, from names in the order of the model."""
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
) -> list[int]:
    """Indices of the units after which to cut for K blocks that share memory, compute or units evenly."""
    if balance == "count":
        return cut_evenly(len(found), num_blocks)
    if balance not in ("memory", "compute"):
        raise LocalGradError(f"balance is {balance!r}: it is 'memory', 'compute' or 'count'")
    from localgrad.memory import unit_costs

    try:
        costs = unit_costs(found, example, objective, momentum, num_blocks)
    except RuntimeError as error:
        raise LocalGradError(
            f"what the units cost cannot be counted without data ({str(error).strip().splitlines()[0]}): "
            'give cuts=[...], or balance="count"'
        ) from error
    weights = [cost.end_parameters for cost in costs]
    if balance == "memory":
        return cut_by_cost([c.activations for c in costs], num_blocks, [c.end_activations for c in costs], weights)
    return cut_by_cost([c.flops for c in costs], num_blocks, [c.end_flops for c in costs], weights)


def build_auxiliary(
    last: Unit,
    following: Sequence[Unit],
    example: Tensor,
    index: int,
    num_blocks: int,
    objective: Objective,
    momentum: Momentum | None,
) -> tuple[nn.Module | None, nn.Module]:
    """The momentum auxiliary network (or None) and the objective of a block that ends with the unit `last`."""
    like = next((p for unit in (last, *following) for p in unit.module.parameters()), example)
    with torch.device(like.device):
        branches = None if momentum is None else momentum(following)
        seen = last if branches is None else following[branches.depth - 1]
        site = Site(seen.features, seen.channel_dim, example.shape, index, num_blocks)
        head = objective(site)
    if not isinstance(head, nn.Module):
        raise LocalGradError(
            f"objective gave {type(head).__name__} for block {index}: a factory takes a Site and returns an nn.Module "
            "with forward(features, targets, inputs) -> loss"
        )
    return branches, head.to(like.device, like.dtype)


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
