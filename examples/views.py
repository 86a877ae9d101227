"""Self-supervised learning: views of images, a ResNet-18 for 32 pixels, and linear probes on each stage."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
STAGES = ["layer1", "layer2", "layer3", "layer4"]


class Noise(nn.Module):
    """In training mode, adds Gaussian noise with a fraction of the features' standard deviation."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, features: Tensor) -> Tensor:
        if not (self.training and self.share):
            return features
        return features + self.share * features.detach().std() * torch.randn_like(features)


class Encoder(nn.Module):
    """A ResNet-18 with a stem for images of 32 pixels, and noise after each stage. Its output has 512 channels."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
        for stage in STAGES:
            self.add_module(stage, nn.Sequential(*getattr(resnet, stage), Noise(noise)))

    def features(self, images: Tensor) -> list[Tensor]:
        """The feature map after each stage."""
        maps = [self.stem(images)]
        for stage in STAGES:
            maps.append(getattr(self, stage)(maps[-1]))
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[-1]


def read(path: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Read images `(N, 3, H, W)` from 0 to 255 and labels `(N,)`: the first `count`, or all."""
    files = sorted(path.glob(f"{split}-*.parquet"))
    if not files and not path.is_file():
        raise SystemExit(f"--data is {path}, which has no {split}-*.parquet and is no .npz")
    if not files:
        with np.load(path) as arrays:
            images, labels = arrays[f"{split}_images"][:count], arrays[f"{split}_labels"][:count]
    else:
        import pyarrow.parquet as parquet

        rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
        rows = rows[:count]
        encoded = [next(value for value in row.values() if isinstance(value, dict))["bytes"] for row in rows]
        images = np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded])
        labels = np.array([row["label"] for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


class Order:
    """Indices of batches: each epoch has all images in a new random order, without the last, smaller batch."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.draws, self.left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        if len(self.left) < self.batch_size:
            self.left = torch.randperm(self.count, generator=self.draws)
        rows, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        return rows


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def view(images: Tensor) -> Tensor:
    """A random view of each image: a resized crop of 20 to 100 % of the area, mirrored, with changed colors or grey."""
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, device=device).uniform_(low, high)

    area, ratio = uniform(0.2, 1).sqrt(), (uniform(-0.28, 0.28)).exp()
    share = torch.stack([(area * ratio).clamp(max=1), (area / ratio).clamp(max=1)], 1)
    shift = (1 - share) * torch.empty_like(share).uniform_(-1, 1)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = share[:, 0] * (torch.randint(2, (count,), device=device) * 2 - 1), share[:, 1]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(1, keepdim=True)
    jittered = (x - grey) * uniform(0.6, 1.4)[:, None, None, None] + grey * uniform(0.6, 1.4)[:, None, None, None]
    middle = jittered.mean((1, 2, 3), keepdim=True)
    jittered = (jittered - middle) * uniform(0.6, 1.4)[:, None, None, None] + middle
    jittered = jittered + 0.1 * torch.randn(count, 3, 1, 1, device=device)  # instead of a change of hue
    x = torch.where((uniform(0, 1) < 0.8)[:, None, None, None], jittered, x)
    x = torch.where((uniform(0, 1) < 0.2)[:, None, None, None], x.mean(1, keepdim=True).expand_as(x), x)
    return normalised(x.clamp(0, 1))


@torch.no_grad()
def pooled(model: Encoder, images: Tensor) -> list[Tensor]:
    """The features of each stage, averaged over space."""
    parts = [
        [maps.mean((2, 3)).float() for maps in model.features(normalised(x.float() / 255))] for x in images.split(500)
    ]
    return [torch.cat(stage) for stage in zip(*parts, strict=True)]


def probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, epochs: int) -> float:
    """Test accuracy in percent of a linear layer on standardised features."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    layer = nn.Linear(train.shape[1], int(labels.max()) + 1, device=train.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * max(1, len(train) // 1000)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(train), (min(1000, len(train)),), device=train.device)
        F.cross_entropy(layer(train[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float((layer(test).argmax(1) == truth).float().mean() * 100)
