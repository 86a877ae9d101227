"""Measure the peak memory and the operations of one local step on the model's device."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.costs import without_data
from localgrad.core.momentum import Momentum
from localgrad.core.site import Criterion, Objective
from localgrad.core.split import split
from localgrad.core.step import local_step
from localgrad.core.trees import leaves
from localgrad.planning.measure import Operations, measure_peak
from localgrad.planning.simulation import Precision


def step_peak(*args: Any, **options: Any) -> int:
    """Peak bytes of a `local_step`; the arguments are those of `step_cost`."""
    return step_cost(*args, **options)[0]


def step_cost(
    model: nn.Module,
    example: Tensor,
    cuts: Sequence[str],
    objective: Objective | None,
    momentum: Momentum | None,
    names: Sequence[str] | None = None,
    *,
    recompute: bool = False,
    precision: Precision = "32-true",
    step_each_block: bool = False,
    parts: int = 1,
    reach: int = 1,
    targets: Any = None,
    criterion: Criterion = F.cross_entropy,
    channel_dim: int | Mapping[str, int] | None = None,
) -> tuple[int, int]:
    """Peak bytes and operations of a `local_step` of a copy of the model, which SGD with momentum trains.

    This measures on the model's device what `plan` predicts: the peak includes weights, optimizer state and the batch.
    On the meta device nothing is computed. The first step creates the state of the optimizers; the second is measured.

    Args:
        model: the model, on the device of `example`.
        example: a batch of the size to train with; the step uses zeros of its shape.
        cuts: as for `split`, like `objective`, `momentum`, `names` and `recompute`.
        precision: `"bf16-mixed"` runs each block's forward pass under autocast, which the meta device does not have.
        step_each_block: as in `local_step`.
        parts: as in `local_step`, like `reach`.
        targets: an example of the targets, as many as `example` has samples; classes `(N,)` if None.
        criterion: loss of the model's output.
        channel_dim: as for `split`.
    """
    device = example.device
    blocks = split(
        copy.deepcopy(model),
        example,
        cuts=cuts,
        objective=objective,
        momentum=momentum,
        names=names,
        recompute=recompute,
        criterion=criterion,
        targets=targets,
        channel_dim=channel_dim,
    )
    if precision == "bf16-mixed":
        for block in blocks:
            block.forward = torch.autocast(device.type, torch.bfloat16)(block.forward)
    trained = [block.trainable_parameters() for block in blocks]
    optimizers = [
        torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=not example.is_meta) if parameters else None
        for parameters in trained
    ]
    inputs, wanted = torch.zeros_like(example), without_data(targets, len(example), len(example), device)

    def step() -> None:
        local_step(blocks, optimizers, inputs, wanted, step_each_block=step_each_block, parts=parts, reach=reach)

    step()
    with Operations() as operations:
        _, peak = measure_peak(step, device)
    given = [leaf for leaf in leaves(wanted) if isinstance(leaf, Tensor)]
    lasting = [inputs, *given, *(tensor for block in blocks for tensor in (*block.parameters(), *block.buffers()))]
    for optimizer in filter(None, optimizers):
        lasting += [value for state in optimizer.state.values() for value in state.values() if value is not None]
    return peak + sum({tensor.untyped_storage(): tensor.nbytes for tensor in lasting}.values()), operations.total
