"""Linear separability: one linear probe per unit, all trained together on a frozen network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.analysis.features import ROUNDING, device_of, frozen, pooled, unit_features
from localgrad.core.units import Unit
from localgrad.data.sets import ImageSet
from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Separability:
    """Result of the linear probe on one unit."""

    unit: str
    """Name of the unit."""
    accuracy: float
    """Test accuracy in percent."""
    train_loss: float
    """Mean training cross-entropy over the last epoch."""


class Probes(nn.Module):
    """One linear classifier per unit on standardised features: `scores = W (x - mean) / deviation + b`.

    Standardising does not change which functions the probes can express. It makes training fast for features of any
    scale. W and b start at zero; the loss is convex, so no random start is needed.

    Attributes:
        classifiers: one `nn.Linear` per unit.
        means, deviations: mean and standard deviation of each channel, one `(C,)` per unit.
    """

    def __init__(self, means: Sequence[Tensor], deviations: Sequence[Tensor], num_classes: int) -> None:
        super().__init__()
        self.means, self.deviations = list(means), list(deviations)
        self.classifiers = nn.ModuleList(nn.Linear(len(mean), num_classes, device=mean.device) for mean in means)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Pooled features `(N, C)` of each unit to class scores `(N, num_classes)` for each unit."""
        parts = zip(self.classifiers, features, self.means, self.deviations, strict=True)
        return [classifier((x - mean) / deviation) for classifier, x, mean, deviation in parts]

    def losses(self, features: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Mean cross-entropy of each unit's probe over the batch, `(units,)`."""
        return torch.stack([F.cross_entropy(scores, targets) for scores in self(features)])


def probe(
    found: Sequence[Unit],
    train: ImageSet,
    test: ImageSet,
    *,
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 0.5,
    seed: int = 0,
) -> list[Separability]:
    """Train a linear probe on the globally pooled features of every unit, and test it.

    The network is frozen, in evaluation mode. A first pass over the training images computes the mean and standard
    deviation of each channel. Then each epoch passes once over the training images, shuffled and augmented as the set's
    config says, and trains all probes on each batch. The loss is the sum of the probes' cross-entropies, which gives
    each probe the gradient of its own. The optimizer is Adam, with a cosine schedule down to zero. Features are not
    stored, so memory does not grow with the number of images.

    Args:
        found: units of the trained network.
        train: training images.
        test: test images, of the same classes.
        epochs: passes over the training images, at least 1.
        batch_size: images of a batch, at least 2.
        lr: initial learning rate, divided by the square root of a unit's number of channels. So the first steps change
            the scores of all units by about as much.
        seed: seed of the order of the images and of their augmentation.

    Returns:
        One result per unit, in order.

    Raises:
        LocalGradError: `epochs`, `batch_size` or `lr` is out of range.

    Source: Alain and Bengio 2016, Understanding intermediate layers using linear classifier probes
    (https://arxiv.org/abs/1610.01644).
    """
    wrong = [
        f"{name} is {value}, it must be {least}"
        for name, value, fits, least in (
            ("epochs", epochs, epochs >= 1, "at least 1"),
            ("batch_size", batch_size, batch_size >= 2, "at least 2"),
            ("lr", lr, lr > 0, "more than 0"),
        )
        if not fits
    ]
    if wrong:
        raise LocalGradError("these probes cannot be trained: " + "; ".join(wrong))
    with frozen(found):
        probes = Probes(*_statistics(found, train, batch_size, seed), train.num_classes)
        losses = _train(probes, found, train, epochs, batch_size, lr, seed)
        accuracies = _test(probes, found, test, batch_size)
    names = [unit.name for unit in found]
    return [Separability(*parts) for parts in zip(names, accuracies, losses, strict=True)]


def _pooled_units(found: Sequence[Unit], inputs: Tensor) -> list[Tensor]:
    features = unit_features(found, inputs)
    return [pooled(values, unit.channel_dim) for unit, values in zip(found, features, strict=True)]


def _statistics(
    found: Sequence[Unit], train: ImageSet, batch_size: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation (1 for a constant channel) of each channel of each unit's pooled features."""
    device = device_of(found)
    sums = [torch.zeros(2, unit.features[unit.channel_dim], dtype=torch.float64) for unit in found]
    count = 0
    for inputs, _ in train.batches(batch_size, train=True, seed=seed, epoch=0, device=device):
        for total, values in zip(sums, _pooled_units(found, inputs), strict=True):
            values = values.cpu().double()
            total += torch.stack([values.sum(0), values.square().sum(0)])
        count += len(inputs)
    means, deviations = [], []
    for total in sums:
        mean, square = total / count
        variance = square - mean.square()
        means.append(mean.float().to(device))
        deviations.append(variance.clamp(min=0).sqrt().where(variance > ROUNDING * square, 1).float().to(device))
    return means, deviations


def _train(
    probes: Probes, found: Sequence[Unit], train: ImageSet, epochs: int, batch_size: int, lr: float, seed: int
) -> list[float]:
    """Train the probes; return the mean loss of each over the last epoch."""
    groups = [
        {"params": classifier.parameters(), "lr": lr / len(mean) ** 0.5}
        for classifier, mean in zip(probes.classifiers, probes.means, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * train.num_batches(batch_size))
    total, count = torch.zeros(len(found)), 0
    for epoch in range(1, epochs + 1):
        total, count = torch.zeros(len(found)), 0
        for inputs, targets in train.batches(batch_size, train=True, seed=seed, epoch=epoch, device=device_of(found)):
            features = _pooled_units(found, inputs)
            with torch.enable_grad():
                losses = probes.losses(features, targets)
                losses.sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += losses.detach().cpu() * len(inputs)
            count += len(inputs)
    return (total / count).tolist()


def _test(probes: Probes, found: Sequence[Unit], test: ImageSet, batch_size: int) -> list[float]:
    """Test accuracy of each probe in percent."""
    right = torch.zeros(len(found), dtype=torch.int64)
    for inputs, targets in test.batches(batch_size, train=False, device=device_of(found)):
        scores = probes(_pooled_units(found, inputs))
        right += torch.stack([(each.argmax(1) == targets).sum() for each in scores]).cpu()
    return [100 * count / len(test) for count in right.tolist()]
