"""bf16 autocast on tensors without data: what a mixed-precision step keeps, without the device it is meant for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from localgrad.errors import LocalGradError

Precision = Literal["32-true", "bf16-mixed"]
_FLOAT32_ON_CUDA = (
    *(F.layer_norm, F.group_norm),
    *(F.softmax, torch.softmax, torch.Tensor.softmax),
    *(F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax),
)


def check_precision(precision: str) -> None:
    """Refuse a precision that the planner does not know."""
    if precision not in get_args(Precision):
        raise LocalGradError(f"precision is {precision!r}: it is one of {', '.join(map(repr, get_args(Precision)))}")


class _CudaRules(TorchFunctionMode):
    """Compute in float32 what CUDA's autocast would: the processor's list has no norms and no softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _FLOAT32_ON_CUDA or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


class Simulation:
    """Where a step is simulated: on `meta` in float32, else on fake tensors of the processor, which autocast knows.

    A fake tensor on CUDA would be closer, but its backward pass needs a GPU to be there.

    Args:
        precision: of the forward passes.
        device_type: whose rules autocast follows, `"cpu"`, or CUDA's for any other.
    """

    def __init__(self, precision: Precision, device_type: str) -> None:
        self.mixed = precision == "bf16-mixed"
        self.device = torch.device("cpu" if self.mixed else "meta")
        self._cuda_rules = device_type != "cpu"
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tensors made inside have no data."""
        if not self.mixed:
            yield
        elif self._cuda_rules:
            with self._fake, _CudaRules():
                yield
        else:
            with self._fake:
                yield

    def forward_pass(self) -> torch.autocast:
        """What the forward pass of one block runs under; the casts of its weights are cached until it ends."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module from `meta`, in place, and return it; to be called inside `running`."""
        if not self.mixed:
            return module
        known: dict[torch.Tensor, torch.Tensor] = {}
        for layer in module.modules():
            for table in (layer._parameters, layer._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor not in known:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        known[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    table[name] = None if tensor is None else known[tensor]  # pyright: ignore[reportArgumentType]
        return module
