"""Compare predicted and measured peak memory of a step: models, objectives, momentum, checkpointing, two precisions.

    python benchmarks/memory.py -o results/memory.json

The measured peak is that of the second `local_step`. On a CPU it counts the live storages while the step runs; on CUDA
it is the allocator's peak. Each model is trained in one block and in four, at the cuts from `plan`. A row has the error
of the prediction in percent. The last lines give the largest error, and the number of pairs of rows of one model that
the prediction puts in the wrong order.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import localgrad
from localgrad.core.units import units
from localgrad.models import cifar_resnet
from localgrad.planning.profile import profile
from localgrad.planning.simulation import Precision
from localgrad.planning.step_peak import step_peak
from report import environment, print_table, write

HALF = (0.5, 0.5, 0.5)
CLASSES = 10


def vit_tiny() -> nn.Module:
    """A ViT-Ti for images of 64 px."""
    return torchvision.models.VisionTransformer(64, 8, 12, 3, 192, 768, num_classes=CLASSES)


def vgg() -> nn.Module:
    """The convolutions of VGG-11 with batch norm, and one linear layer."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512 * 4, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cifar_resnet 32": (lambda: cifar_resnet(32), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), 64),
    "mobilenet_v3_large": (lambda: torchvision.models.mobilenet_v3_large(num_classes=CLASSES), 64),
    "vgg11_bn": (vgg, 64),
    "vit_tiny": (vit_tiny, 64),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(num_classes=CLASSES), 64),
}
OBJECTIVES: dict[str, Any] = {
    "predsim": localgrad.predsim(CLASSES),
    "dgl": localgrad.dgl(CLASSES, head="light"),
    "infopro": localgrad.infopro(CLASSES, HALF, HALF, task=(0.5, 0.5)),
}
MOMENTA: dict[str, Any] = {"none": None, "man": localgrad.man()}
SETTINGS: tuple[tuple[Precision, bool], ...] = (("32-true", False), ("32-true", True), ("bf16-mixed", False))
BLOCKS = (1, 4)


def rows_of(name: str, batch_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Predicted and measured peaks of one model, once for every combination."""
    make, size = MODELS[name]
    model = make().to(device)
    example = torch.zeros(batch_size, 3, size, size, device=device)
    found = units(model, example)
    rows: list[dict[str, Any]] = []
    done, known = set[object](), {}
    for (objective, make_head), (momentum, branches) in itertools.product(OBJECTIVES.items(), MOMENTA.items()):
        for precision, recompute in SETTINGS:
            options: dict[str, Any] = {"recompute": recompute, "precision": precision}
            profiled = profile(found, example, make_head, branches, **options, known=known)
            for count in BLOCKS:
                cuts = profiled.best_cuts(count)
                key = (precision, recompute) if count == 1 else (objective, momentum, precision, recompute, count)
                if key in done:
                    continue
                done.add(key)
                names = [found[cut].name for cut in cuts]
                measured = step_peak(model, example, names, make_head, branches, **options)
                rows.append(
                    {
                        "row": name,
                        "objective": objective if count > 1 else "end-to-end",
                        "momentum": momentum if count > 1 else "none",
                        "precision": precision,
                        "recompute": recompute,
                        "blocks": count,
                        "predicted_mib": round(profiled.peak(cuts) / 2**20, 3),
                        "measured_mib": round(measured / 2**20, 3),
                        "error_percent": round(100 * (profiled.peak(cuts) / measured - 1), 3),
                    }
                )
    return rows


def order(rows: Sequence[dict[str, Any]], tolerance: float = 0.01) -> dict[str, int]:
    """Counts pairs of rows with one model and precision and clearly different peaks, and those in the wrong order."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(rows, 2)
        if (a["row"], a["precision"]) == (b["row"], b["precision"])
        and abs(a["measured_mib"] - b["measured_mib"]) > tolerance * min(a["measured_mib"], b["measured_mib"])
    ]
    wrong = [
        (a, b) for a, b in pairs if (a["predicted_mib"] < b["predicted_mib"]) != (a["measured_mib"] < b["measured_mib"])
    ]
    return {"pairs": len(pairs), "wrong": len(wrong)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/memory.json"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += rows_of(name, options.batch_size, torch.device(options.device))
        write(options.output, result(rows, options))
    print_table(f"peak of a step in MiB, batch {options.batch_size}, {options.device}", rows)
    worst = max(rows, key=lambda row: abs(row["error_percent"]))
    print(f"largest error {worst['error_percent']:.2f} % ({worst['row']}, {worst['objective']}, {worst['momentum']})")
    print("order: {wrong} of {pairs} pairs wrong".format(**order(rows)))


def result(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The content of the file."""
    settings = {"batch_size": options.batch_size, "device": options.device, "models": options.models}
    largest = max(abs(row["error_percent"]) for row in rows)
    return {
        "settings": settings,
        "rows": rows,
        "largest_error_percent": largest,
        "order": order(rows),
        **environment(),
    }


if __name__ == "__main__":
    main()
