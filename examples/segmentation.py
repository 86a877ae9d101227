"""Segmentation from random weights: torchvision's FCN or DeepLab, end-to-end, checkpointed, or in isolated blocks.

    python examples/segmentation.py --data path/to/camvid --out runs/e2e.json
    python examples/segmentation.py --data path/to/camvid --method local --blocks 4 --momentum man --out runs/man.json

The data are a folder of parquet files (columns image and mask, one class a pixel), or of train/images, train/masks,
test/images and test/masks with files of the same names. The backbone's last two stages are dilated instead of
strided. The JSON holds the mean IoU on the test set, seconds of the training steps and the peak of the device's
memory; a picture beside it shows images, truth and predictions.
"""

import argparse
import io
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from tqdm import tqdm

import localgrad

MEAN, STD = (0.45, 0.45, 0.45), (0.28, 0.28, 0.28)
CUTS = {2: ["backbone.layer2"], 3: ["backbone.layer1", "backbone.layer2"]}
CUTS[4] = [*CUTS[3], "backbone.layer3"]
MOMENTA: dict[str, dict[str, Any]] = {
    "none": {},
    "man": {},
    "ema": {"bias": False},
    "bias": {"ema": False},
}
"""Settings of `localgrad.man`."""


def network(head: str, backbone: str, num_classes: int) -> nn.Module:
    """FCN or DeepLab on a ResNet whose map is an eighth of the image."""
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


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images `(N, 3, H, W)` and masks `(N, H, W)`, both of whole numbers from 0 to 255."""
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
    """Crops of 0.75 to 1.5 times the size, at random places, half of them mirrored; what lies outside is ignored."""
    size = torch.tensor(images.shape[2:], device=images.device)
    zoom = torch.empty(len(images), 1, device=images.device).uniform_(0.75, 1.5)
    share = torch.tensor(crop, device=images.device) / size / zoom  # of the image's height and width
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
    """IoU of each class, nan where neither truth nor prediction has it, and the predictions."""
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
    """Rows of an image, its truth and the prediction."""
    colours = torch.randint(40, 256, (256, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    colours[ignored] = 0
    rows = []
    for image, mask, prediction in zip(images.cpu(), masks.cpu(), predictions.cpu(), strict=True):
        rows.append(torch.cat([image.permute(1, 2, 0), colours[mask.long()], colours[prediction]], 1))
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of parquet files, or of images and masks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a PNG is written beside it")
    parser.add_argument("--classes", type=int, default=11, help="how many; masks hold 0 to classes - 1, or --ignored")
    parser.add_argument("--ignored", type=int, default=11, help="class of the pixels that do not count")
    parser.add_argument("--model", choices=["fcn", "deeplab"], default="fcn")
    parser.add_argument("--backbone", choices=["resnet18", "resnet34", "resnet50"], default="resnet18")
    parser.add_argument("--method", choices=["e2e", "checkpointed", "local"], default="e2e")
    parser.add_argument("--blocks", type=int, choices=list(CUTS), default=4, help="K, for local")
    parser.add_argument("--momentum", choices=list(MOMENTA), default="none", help="between a block and its head")
    parser.add_argument("--recompute", action="store_true", help="checkpoint inside the blocks and of MAN's copies too")
    parser.add_argument("--reconstruction", type=float, default=0.0, help="weight of InfoPro's reconstruction")
    parser.add_argument("--crop", type=int, nargs=2, default=[144, 192], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    images, masks = (part.to(options.device) for part in read(options.data, "train"))
    held = torch.cuda.memory_allocated() if "cuda" in options.device else 0  # the images
    model = network(options.model, options.backbone, options.classes)
    model.to(options.device, memory_format=torch.channels_last)
    if options.method == "checkpointed":
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for unit in model.backbone[stage]:
                unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    draws = torch.Generator().manual_seed(options.seed)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(images), generator=draws)[: options.batch_size].to(options.device)
        x, y = augmented(images[rows], masks[rows], tuple(options.crop), options.ignored)
        return x.to(memory_format=torch.channels_last), y

    isolation, parameters = None, list(model.parameters())
    if options.method == "local":
        objective = localgrad.dense(
            options.classes, ignore_index=options.ignored, reconstruction=options.reconstruction, mean=MEAN, std=STD
        )
        momentum = None
        if options.momentum != "none":
            momentum = localgrad.man(recompute=options.recompute, **MOMENTA[options.momentum])
        isolation = localgrad.isolate(
            model,
            CUTS[options.blocks],
            objective=objective,
            momentum=momentum,
            recompute=options.recompute,
            example=batch()[0],
        )
        parameters = isolation.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.01, fused="cuda" in options.device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    mixed = torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled="cuda" in options.device)
    progress = tqdm(range(options.steps), desc=options.out.stem, disable=None)
    began = time.perf_counter()
    for step in progress:
        x, y = batch()
        with mixed:
            if isolation is not None:
                isolation.targets = y
            loss = F.cross_entropy(model(x)["out"].float(), y, ignore_index=options.ignored)
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
    images, masks = (part.to(options.device) for part in read(options.data, "test"))
    with mixed:
        ious, predictions = evaluate(model, images, masks, options.classes)
    seen = [iou for iou in ious if iou == iou]
    result = {
        "task": "segmentation",
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"},
        "mean_iou": 100 * sum(seen) / len(seen),
        "ious": [None if iou != iou else 100 * iou for iou in ious],
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
    chosen = torch.linspace(0, len(images) - 1, min(4, len(images))).long()
    drawing = (part[chosen.to(options.device)] for part in (images, masks, predictions))
    draw(options.out.with_suffix(".png"), *drawing, options.ignored)
    print(f"{options.out.stem}: mean IoU {result['mean_iou']:.2f} %, {seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
