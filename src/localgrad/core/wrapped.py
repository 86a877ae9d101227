"""Models in a wrapper: compiled models are unwrapped with a warning, other wrappers are refused."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from localgrad.errors import LocalGradError, warn


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The original module inside a compiled module; None for any other module."""
    found = getattr(module, "_orig_mod", None)
    return found if isinstance(found, nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The original model inside a compiled model, with a warning; any other model itself.

    Raises:
        LocalGradError: the model is a data-parallel wrapper, an AveragedModel, a wrapper around adapters or a
            ScriptModule, or has lazy layers without weights.
    """
    compiled = compiled_from(model)
    if compiled is not None:
        warn(
            f"the model is compiled as a whole: {type(compiled).__name__} inside is used, not compiled; compile the "
            "blocks instead, block.compile()"
        )
        return unwrapped(compiled)
    kind = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise LocalGradError(
            f"model is a {kind}, which would average gradients that blocks do not have: give the "
            "model inside, model.module, before it is wrapped, and wrap each block: DistributedDataParallel(block)"
        )
    if isinstance(model, AveragedModel):
        raise LocalGradError(
            "model is an AveragedModel, whose weights are averages that nobody trains: give the model itself, and "
            "call update_parameters(model) after each step as before"
        )
    if callable(getattr(model, "get_base_model", None)):
        raise LocalGradError(
            f"model is a {type(model).__name__} around a network with adapters: give model.get_base_model(), which has "
            "them; `localgrad.isolate` takes it as it is"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise LocalGradError(
            f"model is a {type(model).__name__}, which shows no forward pass to cut: give the module that it was "
            "scripted from"
        )
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise LocalGradError(
            f"{lazy[0]!r} and {len(lazy) - 1} more are of lazy layers and have no values yet: run the model on a batch "
            "once, model(batch), then give it"
        )
    return model
