"""Peak memory of one local step, measured where the model is."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.core.split import split
from localgrad.core.step import local_step
from localgrad.planning.measure import measure_peak
from localgrad.planning.simulation import Precision


# --- peak of a step --------------------------------------------------------------------------------------------------
def step_peak(
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
    reach: int = 1,
) -> int:
    """Peak bytes of a `local_step` of a copy of the model, with SGD and all that lives in it included.

    What `plan` predicts, measured where the model is; on `meta` nothing is computed. The first step makes the state of
    the optimizers, the second is measured.

    Args:
        model: on the device of `example`.
        example: a batch of the size to train with; not read.
        cuts: as for `split`, like `objective`, `momentum`, `names` and `recompute`.
        precision: `"bf16-mixed"` runs each block's forward pass under autocast; `meta` has none.
        step_each_block: as in `local_step`.
        reach: as in `local_step`.
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
    )
    if precision == "bf16-mixed":
        for block in blocks:
            block.forward = torch.autocast(device.type, torch.bfloat16)(block.forward)
    optimizers = [
        torch.optim.SGD(block.trainable_parameters(), lr=0.01, momentum=0.9, fused=not example.is_meta)
        for block in blocks
    ]
    inputs, targets = torch.zeros_like(example), torch.zeros(len(example), dtype=torch.long, device=device)

    def step() -> None:
        local_step(blocks, optimizers, inputs, targets, step_each_block=step_each_block, reach=reach)

    step()
    _, peak = measure_peak(step, device)
    lasting = [inputs, targets, *(tensor for block in blocks for tensor in (*block.parameters(), *block.buffers()))]
    for optimizer in optimizers:
        lasting += [value for state in optimizer.state.values() for value in state.values() if value is not None]
    return peak + sum({tensor.untyped_storage(): tensor.nbytes for tensor in lasting}.values())
