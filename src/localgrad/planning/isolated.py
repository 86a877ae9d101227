"""The plan of a model that `isolate` cuts: the measured peak of a step on the meta device, for given or even cuts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.isolation import isolate
from localgrad.core.meta import to_meta
from localgrad.core.momentum import Momentum
from localgrad.core.observed import as_arguments
from localgrad.core.site import Objective
from localgrad.core.trees import leaves, mapped
from localgrad.errors import DoesNotFitError, LocalGradError
from localgrad.planning.measure import Operations, measure_peak
from localgrad.planning.plan import PlanRow, readable


def plan_isolated(
    model: nn.Module,
    example: Any,
    *,
    objective: Objective,
    momentum: Momentum | None = None,
    num_blocks: Sequence[int] = (1, 2, 4, 8),
    cuts: Sequence[str] | None = None,
    budget: int | None = None,
    targets: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    reach: int = 1,
) -> list[PlanRow]:
    """Predict the peak memory of a step of any network that `isolate` trains; nothing is computed.

    A copy of the model on the meta device is isolated and takes one step with SGD and momentum, with every live storage
    counted. The peak includes the same tensors as in `plan`. `plan` finds the best cuts of a chain; here cuts are
    given, or evenly spaced over the longest chain of modules of one class.

    Args:
        model: as for `isolate`; it is not changed.
        example: a batch of the size to train with: a tensor, a tuple of the arguments of forward or a dict of them.
        objective: the local objective.
        momentum: `man(...)`, `manpp(...)` or None.
        num_blocks: the K to try; 1 is end-to-end training.
        cuts: names of modules to cut after, instead of `num_blocks`.
        budget: bytes that a step may take.
        targets: name of the argument of forward that holds the targets, such as "labels", or an example of the targets
            that the objective takes: a tensor or tensors in any nesting.
        loss: a function of the model's output that returns a scalar. By default it takes the output's `loss`, else the
            sum of the output's scalars, else the sum of its first tensor.
        reach: as for `isolate`.

    Returns:
        For each K, or for the given cuts, one row without `recompute` and one with it.

    Raises:
        LocalGradError: as in `isolate`; the model cannot run on tensors without data; nothing fits the budget.
    """
    choices: list[tuple[int | None, Sequence[str] | None]] = [(None, cuts)]
    if cuts is None:
        choices = [(number, None) if number > 1 else (None, []) for number in num_blocks]
    rows: list[PlanRow] = []
    end_to_end = _step(model, example, [], None, objective, momentum, targets, loss, False, reach)[1]
    for number, names in choices:
        for recompute in (False, True):
            peak, operations, found = _step(
                model, example, names, number, objective, momentum, targets, loss, recompute, reach
            )
            fits = budget is None or peak <= budget
            relative = operations / end_to_end if end_to_end else 1.0
            rows.append(PlanRow(len(found) + 1, found, recompute, peak, fits, 1, relative))
    if not any(row.fits for row in rows):
        least = min(rows, key=lambda row: row.peak)
        raise DoesNotFitError(
            f"budget is {readable(budget or 0)}, and a step takes at least {readable(least.peak)} ({least.num_blocks} "
            f"blocks{', recomputed' if least.recompute else ''}); give that, or a smaller batch"
        )
    return rows


def _step(
    model: nn.Module,
    example: Any,
    cuts: Sequence[str] | None,
    num_blocks: int | None,
    objective: Objective,
    momentum: Momentum | None,
    targets: Any,
    loss: Callable[[Any], Tensor] | None,
    recompute: bool,
    reach: int,
) -> tuple[int, int, tuple[str, ...]]:
    """Peak bytes and operations of a step of a copy on the meta device, and the names of its cuts."""
    copied = to_meta(model).train()
    batch = mapped(_on_meta, dict(cast(Mapping[Any, Any], example)) if isinstance(example, Mapping) else example)
    args, kwargs = as_arguments(batch)
    argument = targets if isinstance(targets, str) else None
    given = None if argument else mapped(_on_meta, targets)
    isolation = isolate(
        copied,
        cuts,
        num_blocks=num_blocks,
        objective=objective if cuts != [] else None,
        momentum=momentum if cuts != [] else None,
        targets=argument,
        example=batch,
        recompute=recompute,
        reach=reach,
    )
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        if argument is None:
            isolation.targets = given
        output = copied(*args, **kwargs)
        (_loss_of(output) if loss is None else loss(output)).backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        optimizer.zero_grad()

    try:
        step()
        with Operations() as operations:
            _, peak = measure_peak(step)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, LocalGradError):
            raise
        raise LocalGradError(
            f"{type(model).__name__} or its objective does not run on tensors without data ({error}): measure a real "
            "step with localgrad.planning.measure.measure_peak"
        ) from error
    tensors = [*copied.parameters(), *copied.buffers(), *isolation.parameters(), *isolation.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors += [leaf for leaf in leaves((args, kwargs, given)) if isinstance(leaf, Tensor)]
    lasting = sum({each.untyped_storage(): each.nbytes for each in tensors}.values())
    return peak + lasting, operations.total, isolation.cuts


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _loss_of(output: Any) -> Tensor:
    """The output's `loss`, or the sum of its scalars, or the sum of its first tensor that requires a gradient."""
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    scalars = [tensor for tensor in tensors if tensor.ndim == 0]
    return sum(scalars[1:], scalars[0]) if scalars else tensors[0].sum()
