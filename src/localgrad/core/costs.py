"""Memory, operations and parameters of each unit, counted on the meta device."""

import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from localgrad.core.auxiliary import build_auxiliary
from localgrad.core.meta import to_meta
from localgrad.core.momentum import Momentum
from localgrad.core.site import Criterion, Objective
from localgrad.core.tracing import first_line
from localgrad.core.trees import leaves, mapped
from localgrad.core.units import Unit
from localgrad.errors import CannotSitError, LocalGradError

NOWHERE = (float("inf"), float("inf"), float("inf"))


@dataclass(frozen=True)
class UnitCost:
    """Cost of one unit for the example batch, and of the auxiliary networks of a block that would end after it.

    Attributes:
        name: name of the unit.
        parameters: number of elements of its parameters.
        activations: bytes saved for the backward pass, the output included.
        flops: floating-point operations of the forward pass (a multiply-add counts two).
        end_activations: bytes that momentum auxiliary network and objective save for the backward pass; infinite, like
            the two values below, at the last unit and where they cannot be built.
        end_flops: floating-point operations of their forward pass.
        end_parameters: number of elements of their parameters, without those that they share with the model.
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
    targets: Any = None,
    criterion: Criterion = F.cross_entropy,
) -> list[UnitCost]:
    """Cost of each unit for a batch like `example`, counted on the meta device: nothing is computed or allocated.

    Args:
        found: the units, from `localgrad.units`.
        example: a batch. Costs are counted for its shape and dtype, with at least two samples.
        objective: the local objective of a block; with None the end of a block costs nothing.
        momentum: the momentum auxiliary network of a block, or None.
        num_blocks: K, which the objective's site holds.
        targets: an example of the objective's targets: tensors with as many samples as `example`, in any nesting;
            classes `(N,)` if None.
        criterion: loss of the model's output, which heads use by default.

    Raises:
        CannotCountError: a unit or the objective does not run on tensors without data, or not on these targets.
    """
    samples = max(2, len(example))  # batch norm needs more than one value
    features = example.new_empty((samples, *example.shape[1:]), device="meta")
    inputs = features
    targets = without_data(targets, len(example), samples, torch.device("meta"))
    on_meta = [replace(unit, module=to_meta(unit.module).train()) for unit in found]
    model = found[0].frozen.model
    model = None if model is None or objective is None else to_meta(model)
    costs: list[UnitCost] = []
    for position, unit in enumerate(on_meta):
        with _counting(f"the unit {unit.name!r}"):
            result, kept, flops = _forward_cost(unit.module, features)
        end: tuple[float, float, float] = NOWHERE
        following = on_meta[position + 1 : -1] or on_meta[position + 1 :]
        if objective is None:
            end = (0.0, 0.0, 0.0)
        elif following:
            end = _end_cost(
                unit,
                following,
                on_meta[position + 1 :],
                result,
                targets,
                inputs,
                objective,
                momentum,
                num_blocks,
                criterion,
                model,
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
    targets: Any,
    inputs: Tensor,
    objective: Objective,
    momentum: Momentum | None,
    num_blocks: int,
    criterion: Criterion,
    model: nn.Module | None,
) -> tuple[float, float, float]:
    with _counting(f"the objective after {unit.name!r}"):
        try:
            branches, head = build_auxiliary(
                unit, following, rest, inputs, 0, num_blocks, objective, momentum, criterion, model
            )
        except CannotSitError:
            return NOWHERE
        mixed, kept, flops = (features, 0, 0) if branches is None else _forward_cost(branches, features)
        _, head_kept, head_flops = _forward_cost(head, mixed, targets, inputs)
    shared = {id(parameter) for each in rest for parameter in each.module.parameters()}
    added = [p for module in (branches, head) if module is not None for p in module.parameters() if id(p) not in shared]
    parameters = sum(parameter.numel() for parameter in added)
    return kept + head_kept, flops + head_flops, parameters


class CannotCountError(LocalGradError):
    """A unit or an objective needs data, or other targets, to run."""


@contextmanager
def _counting(what: str) -> Generator[None, None, None]:
    """Context: an error inside becomes a CannotCountError, which says that `what` does not run without data."""
    try:
        yield
    except Exception as error:  # of any class: it is the user's code
        raise CannotCountError(f"{what} does not run on tensors without data ({first_line(error)})") from error


def without_data(targets: Any, given: int, samples: int, device: torch.device) -> Any:
    """Zeros shaped like `targets`, but for `samples` instead of `given` samples; classes `(N,)` if None."""
    if targets is None:
        return torch.zeros(samples, dtype=torch.long, device=device)

    def empty(tensor: Tensor) -> Tensor:
        shape = (samples, *tensor.shape[1:]) if tensor.ndim and len(tensor) == given else tensor.shape
        return torch.zeros(shape, dtype=tensor.dtype, device=device)

    return mapped(empty, targets)


def _forward_cost(module: nn.Module, features: Tensor, *rest: Any) -> tuple[Tensor, int, int]:
    """Output, bytes saved for the backward pass (with the output, without input and parameters), and operations."""
    features = features.detach().requires_grad_(features.is_floating_point())
    known = [
        features,
        *(leaf for leaf in leaves(rest) if isinstance(leaf, Tensor)),
        *module.parameters(),
        *module.buffers(),
    ]
    kept = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        entry = features.clone()  # a unit may change its input in place, which autograd refuses for a leaf
        known.append(entry)
        result = module(entry, *rest)
    keep(result)
    for tensor in known:
        kept.pop(tensor.untyped_storage(), None)
    return result, sum(kept.values()), counter.get_total_flops()
