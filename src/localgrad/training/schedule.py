"""The learning rate schedule: a function of the epoch alone."""

import math
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from localgrad.config.schema import OptimConfig


def learning_rate(epoch: int, *, epochs: int, peak: float, warmup_epochs: int = 10, first_epoch: int = 1) -> float:
    r"""Learning rate of an epoch: warm-up, then a cosine, as in the CIFAR, SVHN and STL-10 recipes.

    $$\text{base}(e) = \tfrac12 \, \text{peak} \, (1 + \cos(\pi e / E)), \qquad
      \text{lr}(e) = \text{base}(e) \frac{e - 1}{W} + 0.01 \frac{W + 1 - e}{W} \quad (e \le W)$$

    and base(e) after the W warm-up epochs. In base, epochs are counted from `first_epoch`. The formula implies:

    * By default the warm-up has ten epochs for any length of the run. A run of fewer epochs ends within the warm-up.
    * The rate is constant within an epoch.
    * The rate of the last epoch is exactly 0, if it comes after the warm-up and `first_epoch` is 1. Then the last epoch
      only updates the running statistics of BatchNorm and the EMA branches.

    A peak below 0.01 replaces the start value 0.01, so that the warm-up does not start above the peak.

    Args:
        epoch: the epoch, counted from 1.
        epochs: number E of epochs of the run.
        peak: peak learning rate of the cosine.
        warmup_epochs: number W of warm-up epochs; 0 for none.
        first_epoch: number of the first epoch in the cosine: 1 in the CIFAR recipes, 0 in the ImageNet ones.

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
    """Learning rate of an epoch, counted from 1, with a config's schedule."""
    return learning_rate(
        epoch,
        epochs=optim.epochs,
        peak=optim.lr,
        warmup_epochs=optim.warmup_epochs,
        first_epoch=optim.first_epoch,
    )


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float, on_device: Tensor | None = None) -> None:
    """Set the learning rate of every parameter group of every optimizer.

    Args:
        optimizers: the optimizers.
        rate: the learning rate.
        on_device: a tensor `()` on the device for CUDA graphs; it is filled with the rate, and optimizers refer to it.
    """
    if on_device is not None:
        on_device.fill_(rate)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate if on_device is None else on_device
