"""An isolated model under DDP: DDP ignores parameters of local blocks, and these functions average their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localgrad.errors import LocalGradError

IGNORED = "_ddp_params_and_buffers_to_ignore"
DDP: Any = DistributedDataParallel  # the attributes used here are private, and typed in part


def leave_to_isolation(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Make DDP, which is to wrap the model later, ignore these parameters: their gradients come in the forward pass."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    ignored = {*getattr(model, IGNORED, ()), *(names[id(parameter)] for parameter in parameters)}
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)


def leave_no_more(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Undo `leave_to_isolation`."""
    own = {id(parameter) for parameter in parameters}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
    left: set[str] = getattr(model, IGNORED, set[str]()) - names
    for parameter in parameters:
        vars(parameter).pop("_ddp_ignored", None)
    model.__dict__.pop(IGNORED, None)
    if left:
        setattr(model, IGNORED, left)


def active_ddp() -> DistributedDataParallel | None:
    """The DDP wrapper whose forward pass is running, or None."""
    return DDP._get_active_ddp_module()


def begin_alike(
    ddp: DistributedDataParallel, parameters: Sequence[nn.Parameter], networks: nn.Module, reach: int
) -> None:
    """Broadcast local parameters and auxiliary networks from rank 0, as DDP does for the parameters that it handles.

    Raises:
        LocalGradError: DDP wrapped the model before `isolate`, so that it handles local parameters too; or `reach` is
            above 1, where gradients of local blocks come in the backward pass.
    """
    if reach > 1:
        raise LocalGradError(f"reach is {reach} under DDP: losses that span blocks run in one process, or reach=1")
    own = {id(parameter) for parameter in parameters}
    wrapper: Any = ddp
    if any(id(parameter) in own for parameter in wrapper._module_parameters):
        raise LocalGradError(
            "DDP reduces gradients of local blocks, which come before it expects them: call isolate(model, ...) first, "
            "then DistributedDataParallel(model), with the isolated model itself in it"
        )
    tensors = [*parameters, *networks.state_dict().values()]
    group = wrapper.process_group
    first = dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor.detach(), first, group=group)


def average_gradients(ddp: DistributedDataParallel, parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the ranks of a DDP wrapper, with one all-reduce per dtype.

    A missing gradient counts as zeros.
    """
    wrapper: Any = ddp
    by_kind: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_kind.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_kind.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=wrapper.process_group)
        flat /= dist.get_world_size(wrapper.process_group)
        means: tuple[Tensor, ...] = torch.split(flat, [g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
