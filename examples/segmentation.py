"""Train torchvision's FCN or DeepLab from random weights: end-to-end, checkpointed, or in gradient-isolated blocks.

    python examples/segmentation.py --data path/to/camvid --out runs/e2e.json
    python examples/segmentation.py --data path/to/camvid --method local --blocks 4 --momentum man --out runs/man.json

The data are a folder of parquet files (columns image and mask, with one class per pixel), or a folder with
train/images, train/masks, test/images and test/masks, whose files have the same names. The last two stages of the
backbone are dilated instead of strided. The JSON has the mean IoU on the test set, the seconds of the training steps
and the peak of the device's memory. A picture beside it shows images, masks and predictions.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from pixels import MEAN, STD, augmented, checkpoint_units, draw, evaluate, network, read
from task import allocated, fit, flags, mixed, momentum_of, write

CUTS = {2: ["backbone.layer2"], 3: ["backbone.layer1", "backbone.layer2"]}
CUTS[4] = [*CUTS[3], "backbone.layer3"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    methods, momenta = ["e2e", "checkpointed", "local"], ["none", "man", "ema", "bias"]
    parser = flags(__doc__, methods, momenta, "a folder of parquet files, or of images and masks")
    parser.add_argument("--classes", type=int, default=11, help="how many; masks hold 0 to classes - 1, or --ignored")
    parser.add_argument("--ignored", type=int, default=11, help="class of the pixels that do not count")
    parser.add_argument("--model", choices=["fcn", "deeplab"], default="fcn")
    parser.add_argument("--backbone", choices=["resnet18", "resnet34", "resnet50"], default="resnet18")
    parser.add_argument("--blocks", type=int, choices=list(CUTS), default=4, help="K, for local")
    parser.add_argument("--cuts", nargs="+", metavar="MODULE", help="after these instead, as backbone.layer1.0")
    parser.add_argument("--recompute", action="store_true", help="checkpoint inside the blocks and of MAN's copies too")
    parser.add_argument("--reconstruction", type=float, default=0.0, help="weight of InfoPro's reconstruction")
    parser.add_argument("--crop", type=int, nargs=2, default=[144, 192], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    return parser.parse_args(arguments)


def isolated(model: nn.Module, options: argparse.Namespace, example: Tensor) -> Any:
    """Isolate the model, cut between the stages of its backbone or at the requested modules."""
    objective = localgrad.dense(
        options.classes, ignore_index=options.ignored, reconstruction=options.reconstruction, mean=MEAN, std=STD
    )
    return localgrad.isolate(
        model,
        options.cuts or CUTS[options.blocks],
        objective=objective,
        momentum=momentum_of(options, recompute=options.recompute),
        recompute=options.recompute,
        example=example,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    images, masks = (part.to(options.device) for part in read(options.data, "train"))
    held = allocated(options)
    model = network(options.model, options.backbone, options.classes)
    model.to(options.device, memory_format=torch.channels_last)
    if options.method == "checkpointed":
        checkpoint_units(model)
    draws = torch.Generator().manual_seed(options.seed)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(images), generator=draws)[: options.batch_size].to(options.device)
        x, y = augmented(images[rows], masks[rows], tuple(options.crop), options.ignored)
        return x.to(memory_format=torch.channels_last), y

    isolation = isolated(model, options, batch()[0]) if options.method == "local" else None
    parameters = list(model.parameters()) if isolation is None else isolation.trainable_parameters()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if isolation is not None:
            isolation.targets = y
        return F.cross_entropy(model(x)["out"].float(), y, ignore_index=options.ignored)

    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.01, fused="cuda" in options.device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    fitted = fit(options, model, optimizer, schedule, options.steps, batch, loss_of)
    model.eval()
    images, masks = (part.to(options.device) for part in read(options.data, "test"))
    with mixed(options):
        ious, predictions = evaluate(model, images, masks, options.classes)
    seen = [iou for iou in ious if iou == iou]
    found = {"mean_iou": 100 * sum(seen) / len(seen), "ious": [None if iou != iou else 100 * iou for iou in ious]}
    result = write(options, "segmentation", model, parameters, fitted, held, **found, loss=fitted.loss)
    chosen = torch.linspace(0, len(images) - 1, min(4, len(images))).long()
    drawing = (part[chosen.to(options.device)] for part in (images, masks, predictions))
    draw(options.out.with_suffix(".png"), *drawing, options.ignored)
    print(f"{options.out.stem}: mean IoU {result['mean_iou']:.2f} %, {fitted.seconds:.1f} s")
    return result


if __name__ == "__main__":
    main()
