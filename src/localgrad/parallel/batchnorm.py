"""BatchNorm over a batch that several processes share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from localgrad.errors import LocalGradError


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for tensors on a processor, for which PyTorch has none.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` with mean and (biased) variance over the images of all processes
    of `process_group`, in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda:
            return super().forward(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        images = input if input.dtype == torch.float64 else input.float()
        dims = [0, *range(2, images.dim())]
        shape = [1, -1] + [1] * (images.dim() - 2)
        numbers = images.new_tensor([images.numel() / images.shape[1]])
        totals = all_reduce(torch.cat([images.sum(dims), numbers]), group=self._group)
        count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = images - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims), group=self._group) / count
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        return output.to(input.dtype)

    @property
    def _group(self) -> Any:
        return self.process_group or torch.distributed.group.WORLD

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if factor is None else factor
        self.running_mean.lerp_(mean, factor or 0.0)
        self.running_var.lerp_(variance, factor or 0.0)


def synchronise(module: nn.Module, process_group: Any = None) -> None:
    """Have every BatchNorm of a module normalise over the batches of all processes of a group.

    The norms stay the same objects with the same `state_dict` keys; only their class changes.

    Args:
        module: a block, its auxiliary networks included.
        process_group: the processes that share a batch; all if None.

    Raises:
        LocalGradError: a norm is of a class of its own, whose forward pass is not known.
    """
    for name, norm in module.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm):
            raise LocalGradError(
                f"{name} is a {type(norm).__name__}, and only PyTorch's own BatchNorm can be synchronised: leave out "
                "--sync-batchnorm, or train on one device"
            )
        on_processor = all(tensor.device.type == "cpu" for tensor in [*norm.parameters(), *norm.buffers()])
        norm.__class__ = SyncBatchNorm if on_processor else nn.SyncBatchNorm
        norm.process_group = process_group
