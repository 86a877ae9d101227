"""Barlow Twins on CIFAR-10 without labels: end-to-end, or every stage of a ResNet-18 for itself; then linear probes.

    python examples/selfsupervised.py --data path/to/cifar10 --out runs/e2e.json
    python examples/selfsupervised.py --data path/to/cifar10 --method local --momentum man --out runs/man.json

The data are a folder of parquet files (an image column and label), or an .npz with train_images (N, 32, 32, 3),
train_labels, test_images and test_labels. `--noise` is that of Blockwise SSL's code: Gaussian, of this share of the
features' deviation, added to what each stage gives its head and the next stage. The JSON holds the test accuracy of a
linear layer on the pooled features of each stage, seconds of the training steps and the peak of the device's memory.
"""

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import localgrad

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
STAGES = ["layer1", "layer2", "layer3", "layer4"]
MOMENTA: dict[str, dict[str, Any]] = {
    "none": {},
    "man": {},
    "ema": {"bias": False},
    "bias": {"ema": False},
}
"""Settings of `localgrad.man`."""


class Noise(nn.Module):
    """While training, adds Gaussian noise of a share of the features' deviation."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, features: Tensor) -> Tensor:
        if not (self.training and self.share):
            return features
        return features + self.share * features.detach().std() * torch.randn_like(features)


class Encoder(nn.Module):
    """A ResNet-18 with a stem for images of 32 pixels and noise behind each stage, to maps of 512 channels."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
        for stage in STAGES:
            self.add_module(stage, nn.Sequential(*getattr(resnet, stage), Noise(noise)))

    def features(self, images: Tensor) -> list[Tensor]:
        """The map after each stage."""
        maps = [self.stem(images)]
        for stage in STAGES:
            maps.append(getattr(self, stage)(maps[-1]))
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[-1]


def read(path: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images, or all, `(N, 3, H, W)` from 0 to 255, and labels `(N,)`."""
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


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def view(images: Tensor) -> Tensor:
    """One view of each image: a crop of 20 to 100 % resized, mirrored, its colours changed or gone."""
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
    jittered = jittered + 0.1 * torch.randn(count, 3, 1, 1, device=device)  # in the place of a change of hue
    x = torch.where((uniform(0, 1) < 0.8)[:, None, None, None], jittered, x)
    x = torch.where((uniform(0, 1) < 0.2)[:, None, None, None], x.mean(1, keepdim=True).expand_as(x), x)
    return normalised(x.clamp(0, 1))


@torch.no_grad()
def pooled(model: Encoder, images: Tensor) -> list[Tensor]:
    """The mean over space of each stage's map, normalised by its statistics."""
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of parquet files, or an .npz")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--method", choices=["e2e", "local"], default="e2e", help="local: one block a stage")
    parser.add_argument("--momentum", choices=list(MOMENTA), default="none", help="between a stage and its head")
    parser.add_argument("--noise", type=float, default=0.0, help="0.25 in the released code")
    parser.add_argument("--projector", type=int, nargs="+", default=[1024, 1024, 1024], help="widths of the head")
    parser.add_argument("--batch-size", type=int, default=256, help="images; each has two views")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--probe-epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=None, help="train on the first so many alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    images, labels = (part.to(options.device) for part in read(options.data, "train", options.images))
    held = torch.cuda.memory_allocated() if "cuda" in options.device else 0  # the images
    model = Encoder(options.noise).to(options.device, memory_format=torch.channels_last)
    draws = torch.Generator().manual_seed(options.seed)
    batch_size = min(options.batch_size, len(images))
    example = view(images[:2])
    twins = localgrad.barlow(options.projector[0], options.projector[1:])
    # the last stage's loss is made like the others', by hand: there is no cut after it
    last = twins(localgrad.Site(model.eval()(example).shape, 1, example.shape, index=3, num_blocks=4))
    last.to(options.device)
    model.train()
    isolation, parameters = None, list(model.parameters())
    if options.method == "local":
        momentum = None if options.momentum == "none" else localgrad.man(**MOMENTA[options.momentum])
        isolation = localgrad.isolate(model, STAGES[:-1], objective=twins, momentum=momentum, example=example)
        parameters = isolation.trainable_parameters()
    parameters = [*parameters, *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=1e-4, fused="cuda" in options.device)
    steps = options.epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.1)
    mixed = torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled="cuda" in options.device)
    began = time.perf_counter()
    progress = tqdm(range(steps), desc=options.out.stem, disable=None)
    order = torch.empty(0, dtype=torch.long)
    for step in progress:
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=draws)
        rows, order = order[:batch_size].to(options.device), order[batch_size:]
        views = torch.cat([view(images[rows]), view(images[rows])]).to(memory_format=torch.channels_last)
        with mixed:
            if isolation is not None:
                isolation.targets = labels[rows].repeat(2)  # not read
            loss = last(model(views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
    last_loss = float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - held if "cuda" in options.device else None
    model.eval()
    test_images, truth = (part.to(options.device) for part in read(options.data, "test"))
    with mixed:
        train_features, test_features = pooled(model, images), pooled(model, test_images)
    sets = zip(train_features, test_features, strict=True)
    accuracies = [probe(train, labels, test, truth, options.probe_epochs) for train, test in sets]
    result = {
        "task": "selfsupervised",
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "probe_accuracy": accuracies[-1],
        "probe_accuracies": accuracies,
        "train_images": len(images),
        "loss": last_loss,
        "seconds": seconds,
        "peak_mib": None if peak is None else peak / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in parameters),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if "cuda" in options.device else "processor",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.out.stem}: probe {accuracies[-1]:.2f} %, {seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
