"""Cost of each unit, counted on `meta` tensors."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from localgrad.core.auxiliary import build_auxiliary
from localgrad.core.copies import deep_copy
from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.core.units import Unit
from localgrad.errors import CannotSitError

NOWHERE = (float("inf"), float("inf"), float("inf"))


# --- cost of each unit -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class UnitCost:
    """What one unit costs for the example batch, and what ending a block after it would.

    Attributes:
        name: of the unit.
        parameters: number of elements.
        activations: bytes kept for the backward pass, the output included.
        flops: floating-point operations of the forward pass (a multiply-add counts two).
        end_activations: bytes kept by the momentum auxiliary network and the objective of a block that ends here;
            infinite where they cannot sit, or at the last unit.
        end_flops: floating-point operations of their forward pass, likewise.
        end_parameters: number of elements of their parameters, likewise.
    """

    name: str
    parameters: int
    activations: float
    flops: float
    end_activations: float
    end_flops: float
    end_parameters: float


def unit_costs(
    found: Sequence[Unit],
    example: Tensor,
    objective: Objective | None = None,
    momentum: Momentum | None = None,
    num_blocks: int = 2,
) -> list[UnitCost]:
    """Cost of each unit for a batch like `example`, counted on `meta` tensors: nothing is computed or allocated.

    Args:
        found: the units, from `localgrad.units`.
        example: a batch; the costs are those of its shape and dtype, and of two samples at least.
        objective: what would end a block; nothing if None.
        momentum: likewise.
        num_blocks: K, as the objective is told.
    """
    samples = max(2, len(example))  # batch norm needs more than one value
    features = example.new_empty((samples, *example.shape[1:]), device="meta")
    inputs = features
    targets = torch.zeros(samples, dtype=torch.long, device="meta")
    on_meta = [replace(unit, module=to_meta(unit.module)) for unit in found]
    costs = []
    for position, unit in enumerate(on_meta):
        result, kept, flops = _forward_cost(unit.module, features)
        end: tuple[float, float, float] = NOWHERE
        following = on_meta[position + 1 : -1] or on_meta[position + 1 :]
        if objective is None:
            end = (0.0, 0.0, 0.0)
        elif following:
            end = _end_cost(
                unit, following, on_meta[position + 1 :], result, targets, inputs, objective, momentum, num_blocks
            )
        parameters = sum(parameter.numel() for parameter in unit.module.parameters())
        costs.append(UnitCost(unit.name, parameters, kept, flops, *end))
        features = result.detach()
    return costs


def _end_cost(
    unit: Unit,
    following: Sequence[Unit],
    rest: Sequence[Unit],
    features: Tensor,
    targets: Tensor,
    inputs: Tensor,
    objective: Objective,
    momentum: Momentum | None,
    num_blocks: int,
) -> tuple[float, float, float]:
    try:
        branches, head = build_auxiliary(unit, following, rest, inputs, 0, num_blocks, objective, momentum)
    except CannotSitError:
        return NOWHERE
    mixed, kept, flops = (features, 0, 0) if branches is None else _forward_cost(branches, features)
    _, head_kept, head_flops = _forward_cost(head, mixed, targets, inputs)
    parameters = sum(p.numel() for module in (branches, head) if module is not None for p in module.parameters())
    return kept + head_kept, flops + head_flops, parameters


def to_meta(module: nn.Module) -> nn.Module:
    """A copy on `meta`, in training mode."""
    return deep_copy(module).to("meta").train()


def _forward_cost(module: nn.Module, features: Tensor, *rest: Tensor) -> tuple[Tensor, int, int]:
    """Output, bytes kept for the backward pass (output included, input and parameters left out), and operations."""
    features = features.detach().requires_grad_(features.is_floating_point())
    known = [features, *rest, *module.parameters(), *module.buffers()]
    kept = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        entry = features.clone()  # a unit may start in place, which a leaf cannot
        known.append(entry)
        result = module(entry, *rest)
    keep(result)
    for tensor in known:
        kept.pop(tensor.untyped_storage(), None)
    return result, sum(kept.values()), counter.get_total_flops()
