"""What training costs in memory: of each unit, of a step, predicted and measured."""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from localgrad.blocks import Objective, build_auxiliary, split
from localgrad.errors import LocalGradError
from localgrad.momentum import Momentum
from localgrad.simulation import Precision
from localgrad.step import local_step
from localgrad.units import Unit

Result = TypeVar("Result")
CPU = torch.device("cpu")
NOWHERE = (float("inf"), float("inf"), float("inf"))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive, from those made inside.

    Works on every device, `meta` included, where it predicts what a real device would hold.

    Attributes:
        current: bytes alive now.
        peak: the most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._sizes = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._sizes.setdefault(value.untyped_storage(), 0)  # was there before
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.current -= size


def measure_peak(function: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, int]:
    """Run a function and measure the most memory it held at once beyond what was there before.

    Args:
        function: what to run.
        device: where its tensors are.

    Returns:
        The function's result, and bytes: of the allocator on CUDA, of live tensor storages elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    counter = PeakMemory()
    with counter:
        result = function()
    return result, counter.peak


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
            end = _end_cost(unit, following, result, targets, inputs, objective, momentum, num_blocks)
        parameters = sum(parameter.numel() for parameter in unit.module.parameters())
        costs.append(UnitCost(unit.name, parameters, kept, flops, *end))
        features = result.detach()
    return costs


def _end_cost(
    unit: Unit,
    following: Sequence[Unit],
    features: Tensor,
    targets: Tensor,
    inputs: Tensor,
    objective: Objective,
    momentum: Momentum | None,
    num_blocks: int,
) -> tuple[float, float, float]:
    try:
        branches, head = build_auxiliary(unit, following, inputs, 0, num_blocks, objective, momentum)
    except LocalGradError:
        return NOWHERE
    mixed, kept, flops = (features, 0, 0) if branches is None else _forward_cost(branches, features)
    _, head_kept, head_flops = _forward_cost(head, mixed, targets, inputs)
    parameters = sum(p.numel() for module in (branches, head) if module is not None for p in module.parameters())
    return kept + head_kept, flops + head_flops, parameters


def to_meta(module: nn.Module) -> nn.Module:
    """A copy on `meta`, in training mode."""
    return copy.deepcopy(module).to("meta").train()


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
        local_step(blocks, optimizers, inputs, targets, step_each_block=step_each_block)

    step()
    _, peak = measure_peak(step, device)
    lasting = [inputs, targets, *(tensor for block in blocks for tensor in (*block.parameters(), *block.buffers()))]
    for optimizer in optimizers:
        lasting += [value for state in optimizer.state.values() for value in state.values() if value is not None]
    return peak + sum({tensor.untyped_storage(): tensor.nbytes for tensor in lasting}.values())
