"""Segmentation: data with a class for each pixel, a fully convolutional network, mean IoU, and pictures."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

MEAN, STD = (0.45, 0.45, 0.45), (0.28, 0.28, 0.28)


def network(head: str, backbone: str, num_classes: int) -> nn.Module:
    """FCN or DeepLab on a ResNet with output stride 8."""
    resnet = torchvision.models.get_model(backbone, weights=None)
    for layer, dilation in ((resnet.layer3, 2), (resnet.layer4, 4)):
        for conv in layer.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
    width = resnet.fc.in_features
    body = torchvision.models._utils.IntermediateLayerGetter(resnet, {"layer4": "out"})
    return FCN(body, FCNHead(width, num_classes)) if head == "fcn" else DeepLabV3(body, DeepLabHead(width, num_classes))


def checkpoint_units(model: nn.Module) -> None:
    """Use activation checkpointing for every residual unit of the backbone."""
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for unit in model.backbone[stage]:
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read images `(N, 3, H, W)` and masks `(N, H, W)`, both with integer values from 0 to 255."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if files:
        import pyarrow.parquet as parquet

        rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
        pairs = [(io.BytesIO(row["image"]["bytes"]), io.BytesIO(row["mask"]["bytes"])) for row in rows]
    elif not (folder / split / "images").is_dir():
        raise SystemExit(
            f"--data is {folder}, which has neither {split}-*.parquet nor {split}/images and {split}/masks"
        )
    else:
        pairs = [(path, folder / split / "masks" / path.name) for path in sorted((folder / split / "images").iterdir())]
    images = [np.asarray(Image.open(image).convert("RGB")) for image, _ in pairs]
    masks = [np.asarray(Image.open(mask)) for _, mask in pairs]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, masks: Tensor, crop: tuple[int, int], ignored: int) -> tuple[Tensor, Tensor]:
    """Random crops, scaled by 0.75 to 1.5, half of them mirrored; pixels outside the image get the ignored class."""
    size = torch.tensor(images.shape[2:], device=images.device)
    zoom = torch.empty(len(images), 1, device=images.device).uniform_(0.75, 1.5)
    share = torch.tensor(crop, device=images.device) / size / zoom  # height and width of the crop over the image's
    shift = (1 - share).clamp(min=0) * torch.empty_like(share).uniform_(-1, 1)
    mirrored = torch.randint(2, (len(images),), device=images.device) * 2 - 1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = share[:, 1] * mirrored, share[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 1], shift[:, 0]
    grid = F.affine_grid(theta, [len(images), 3, *crop], align_corners=False)
    bright = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(0.8, 1.2)
    inputs = F.grid_sample(normalised(images) * bright, grid, align_corners=False)
    classes = F.grid_sample(masks[:, None].float() + 1, grid, mode="nearest", align_corners=False)[:, 0].long() - 1
    return inputs, classes.masked_fill(classes < 0, ignored)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, masks: Tensor, num_classes: int) -> tuple[list[float], Tensor]:
    """IoU of each class (nan for a class that neither masks nor predictions contain), and the predictions."""
    confusion = torch.zeros(num_classes, num_classes, device=images.device)
    predictions = []
    for x, y in zip(images.split(16), masks.split(16), strict=True):
        predicted = model(normalised(x))["out"].argmax(1)
        predictions.append(predicted)
        counted = y < num_classes
        pairs = y[counted].long() * num_classes + predicted[counted]
        confusion += pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).tolist(), torch.cat(predictions)


def draw(path: Path, images: Tensor, masks: Tensor, predictions: Tensor, ignored: int) -> None:
    """Save a picture with one row per image: the image, its mask and the prediction."""
    colours = torch.randint(40, 256, (256, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    colours[ignored] = 0
    rows = []
    for image, mask, prediction in zip(images.cpu(), masks.cpu(), predictions.cpu(), strict=True):
        rows.append(torch.cat([image.permute(1, 2, 0), colours[mask.long()], colours[prediction]], 1))
    Image.fromarray(torch.cat(rows).numpy()).save(path)
