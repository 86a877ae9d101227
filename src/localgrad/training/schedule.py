"""The learning rate as a pure function of the epoch."""

import math
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from localgrad.config.schema import OptimConfig


def learning_rate(epoch: int, *, epochs: int, peak: float, warmup_epochs: int = 10, first_epoch: int = 1) -> float:
    r"""Warm-up, then a cosine, as the CIFAR, SVHN and STL-10 recipes print it.

    $$\text{base}(e) = \tfrac12 \, \text{peak} \, (1 + \cos(\pi e / E)), \qquad
      \text{lr}(e) = \text{base}(e) \frac{e - 1}{W} + 0.01 \frac{W + 1 - e}{W} \quad (e \le W)$$

    and base(e) after the W warm-up epochs. Three things the formula has, as printed: the warm-up is ten epochs however
    long the run is (a run of fewer epochs never leaves it unless it asks for a shorter one), the rate is constant
    within an epoch, and the rate of the last epoch is exactly 0 (where it comes after the warm-up and `first_epoch` is
    1), so that epoch only refreshes the averages of BatchNorm and of the EMA branches. A peak below 0.01 starts at the
    peak instead of above it.

    Args:
        epoch: epoch, counted from 1.
        epochs: number E of epochs of the run.
        peak: learning rate at the top of the cosine.
        warmup_epochs: number W of warm-up epochs; 0 for none.
        first_epoch: what the cosine calls the first epoch: 1 in the CIFAR recipes, 0 in the ImageNet ones.

    Returns:
        The learning rate of that epoch.

    Example:
        >>> [round(learning_rate(epoch, epochs=400, peak=0.8), 6) for epoch in (1, 10, 11, 200, 400)]
        [0.01, 0.71989, 0.798508, 0.4, 0.0]
    """
    counted = epoch - 1 + first_epoch
    base = 0.5 * peak * (1 + math.cos(math.pi * counted / epochs))
    if epoch > warmup_epochs:
        return base
    start = min(0.01, peak)
    return base * (epoch - 1) / warmup_epochs + start * (warmup_epochs + 1 - epoch) / warmup_epochs


def rate_of(optim: OptimConfig, epoch: int) -> float:
    """Learning rate of an epoch of a config."""
    return learning_rate(
        epoch,
        epochs=optim.epochs,
        peak=optim.lr,
        warmup_epochs=optim.warmup_epochs,
        first_epoch=optim.first_epoch,
    )


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float, on_device: Tensor | None = None) -> None:
    """Gives every parameter group of every optimizer a learning rate.

    Args:
        optimizers: all of them.
        rate: the learning rate.
        on_device: a tensor that is to hold it, `()`, and that they read, as CUDA graphs need it.
    """
    if on_device is not None:
        on_device.fill_(rate)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate if on_device is None else on_device
