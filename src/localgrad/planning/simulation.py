"""Simulate forward and backward passes on fake tensors, also under bf16 autocast."""

import logging
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from localgrad.core.tables import own_buffers, own_parameters
from localgrad.core.trees import mapped
from localgrad.errors import LocalGradError
from localgrad.objectives.fast import simulated_device

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
    """Compute norms and softmax in float32, as CUDA's autocast does: the CPU's autocast does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _FLOAT32_ON_CUDA or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        args, kwargs = mapped(torch.Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


class Simulation:
    """Fake tensors, which have no data, for a simulated step. They behave like tensors on the CPU.

    Tensors on the meta device have no autocast, and run attention as several operations where real devices have one
    kernel. A fake tensor on CUDA would be closer, but its backward pass needs a GPU.

    Args:
        precision: precision of the forward passes.
        device_type: type of the device that is simulated. The objectives use their forms for it, and autocast follows
            the CPU's rules for `"cpu"`, CUDA's for any other.
    """

    def __init__(self, precision: Precision, device_type: str) -> None:
        self.precision: Precision = precision
        self.cuda_rules = precision == "bf16-mixed" and device_type != "cpu"
        self.device_type = device_type
        self.device = torch.device("cpu")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Context: tensors created inside are fake. PyTorch's log of failures is off, because callers report errors."""
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with self._mode, simulated_device(self.device_type), _CudaRules() if self.cuda_rules else nullcontext():
                yield
        finally:
            log.setLevel(level)

    def forward_pass(self) -> torch.autocast:
        """Autocast context for the forward pass of one block; it caches casts of the block's weights until its end."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def to_fake(self, module: nn.Module) -> nn.Module:
        """Replace a module's parameters and buffers by fake tensors, in place, and return it. Call it in `running`."""
        known: dict[torch.Tensor, torch.Tensor] = {}
        for layer in module.modules():
            for table in (own_parameters(layer), own_buffers(layer)):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if tensor not in known:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        known[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    table[name] = known[tensor]
        return module
