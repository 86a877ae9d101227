"""BatchNorm over a batch whose images are divided among several ranks."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # pyright: ignore[reportUnknownVariableType]

from localgrad.errors import LocalGradError

BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
"""The base class of all of PyTorch's batch norms, `nn.SyncBatchNorm` included, which has no public name."""


class SyncBatchNorm(BatchNorm):
    """`torch.nn.SyncBatchNorm` for tensors on a CPU, which PyTorch's own does not take.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` with mean and (biased) variance over the images of all ranks of
    `process_group`, in float32. The running variance is the unbiased one, as in PyTorch.

    Source: Ioffe and Szegedy 2015 (https://arxiv.org/abs/1502.03167), algorithm 1, over all ranks' images.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if input.is_cuda:
            raise LocalGradError("a norm was synchronised on a CPU and moved to CUDA: move the block first")
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
    """Make every BatchNorm of a module normalise over the batches of all ranks of a group.

    The norms stay the same objects with the same `state_dict` keys; only their class changes.

    Args:
        module: a block, its auxiliary networks included.
        process_group: the ranks that a batch is divided among; all ranks if None.

    Raises:
        LocalGradError: a norm's class is not one of PyTorch's, so that its forward pass is not known.
    """
    for name, norm in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        if not isinstance(norm, BatchNorm):
            continue
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm):
            raise LocalGradError(
                f"{name} is a {type(norm).__name__}, and only PyTorch's own BatchNorm can be synchronised: leave out "
                "--sync-batchnorm, or train on one device"
            )
        on_cpu = all(tensor.device.type == "cpu" for tensor in [*norm.parameters(), *norm.buffers()])
        norm.__class__ = SyncBatchNorm if on_cpu else nn.SyncBatchNorm
        norm.process_group = process_group
