"""Test whether `isolate(num_blocks=4)` trains networks of all families: 60 of timm and 15 of torchvision.

    python benchmarks/isolate_sweep.py -o results/isolate_sweep.json

Each network has random weights and a small image size. It trains two steps with the objective `classifier`, and again
with `man()`. A network passes if all losses are finite, every auxiliary parameter gets a gradient, and every parameter
that gets a gradient end-to-end also gets one here. With `--units` the script also counts the units that `split` finds.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import localgrad
from report import environment, print_table, write

CLASSES = 10
# one or two small networks of each family of timm, with options that set the image size
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "vit_base_patch16_clip_224": {"img_size": 32, "depth": 6},
    "vit_small_patch16_dinov3": {"img_size": 64},
    "vit_small_patch16_rope_224": {"img_size": 64},
    "vit_pe_core_tiny_patch16_384": {"img_size": 64},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 64},
    "vit_relpos_small_patch16_224": {"img_size": 64},
    "vit_srelpos_small_patch16_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "beit_base_patch16_224": {"img_size": 64, "depth": 6},
    "cait_xxs24_224": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64},
    "crossvit_tiny_240": {},
    "coat_mini": {"img_size": 64},
    "convit_tiny": {"img_size": 64},
    "pit_ti_224": {"img_size": 64},
    "tnt_s_patch16_224": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "pvt_v2_b0": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2},
    "swinv2_cr_tiny_224": {"img_size": 64, "window_size": 2},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "maxxvit_rmlp_nano_rw_256": {"img_size": 64},
    "coatnet_pico_rw_224": {"img_size": 64},
    "davit_tiny": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64},
    "mvitv2_tiny": {"img_size": 64},
    "nest_tiny": {"img_size": 64},
    "levit_128s": {"img_size": 64},
    "efficientformer_l1": {},
    "efficientformerv2_s0": {"img_size": 64},
    "fastvit_t8": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "edgenext_xx_small": {},
    "poolformer_s12": {},
    "convformer_s18": {},
    "sequencer2d_s": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "convmixer_768_32": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "inception_next_atto": {},
    "resnet26d": {},
    "resnext26ts": {},
    "skresnet18": {},
    "seresnet18": {},
    "res2net50_14w_8s": {},
    "densenet121": {},
    "dla34": {},
    "hrnet_w18_small": {},
    "efficientnet_b0": {},
    "regnety_002": {},
}
TORCHVISION = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "shufflenet_v2_x0_5",
    "convnext_tiny",
    "swin_t",
    "maxvit_t",
)
SIZES = {"alexnet": 96, "efficientformer_l1": 224, "crossvit_tiny_240": 240, "maxvit_t": 224, "densenet121": 64}


def network(name: str, library: str) -> tuple[nn.Module, int]:
    """A network with random weights, and the height and width of its images."""
    if library == "torchvision":
        options = {"input_size": (224, 224)} if name == "maxvit_t" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options), SIZES.get(name, 64)
    options = TIMM[name]
    return timm.create_model(name, num_classes=CLASSES, **options), options.get("img_size", SIZES.get(name, 64))


def train(name: str, library: str, momentum: Any) -> dict[str, Any]:
    """Two steps of a network in four blocks."""
    torch.manual_seed(0)
    model, size = network(name, library)
    model.train()
    inputs, targets = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    isolation = localgrad.isolate(
        model, num_blocks=4, objective=localgrad.classifier(CLASSES), momentum=momentum, example=inputs
    )
    parameters = isolation.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0)
    losses: list[list[float]] = []
    reached: set[Tensor] = set()
    for _ in range(2):
        isolation.targets = targets
        loss = F.cross_entropy(output_of(model(inputs)), targets)
        loss.backward()
        reached |= {parameter for parameter in parameters if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(each) for each in (*isolation.losses, loss)])
    named = dict(model.named_parameters())
    return {
        "losses": losses,
        "cuts": list(isolation.cuts),
        "unreached": sorted(key for key, parameter in named.items() if parameter not in reached),
        "unreached_auxiliary": len([p for p in isolation.parameters() if p.requires_grad and p not in reached]),
    }


def output_of(output: Any) -> Tensor:
    """The class scores; averages the two heads that DeiT has in training mode."""
    return torch.stack(output).mean(0) if isinstance(output, tuple) else output


def unreached_end_to_end(name: str, library: str) -> list[str]:
    """Names of the parameters that get no gradient in end-to-end training either."""
    torch.manual_seed(0)
    model, size = network(name, library)
    output_of(model.train()(torch.randn(2, 3, size, size))).sum().backward()
    return sorted(key for key, parameter in model.named_parameters() if parameter.grad is None)


def row(name: str, library: str, count_units: bool) -> dict[str, Any]:
    """The results of one network."""
    begun = time.perf_counter()
    found: dict[str, Any] = {"library": library, "network": name}
    for kind, momentum in (("plain", None), ("man", localgrad.man())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trained = train(name, library, momentum)
            finite = all(value == value and abs(value) < 1e6 for losses in trained["losses"] for value in losses)
            same = trained["unreached"] == unreached_end_to_end(name, library)
            found[kind] = trained | {"trains": finite and same and not trained["unreached_auxiliary"]}
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            found[kind] = {"trains": False, "error": " ".join(str(error).split())[:300]}
    if count_units:
        found["units"] = number_of_units(lambda: network(name, library))
    found["seconds"] = round(time.perf_counter() - begun, 1)
    gc.collect()
    return found


def number_of_units(make: Callable[[], tuple[nn.Module, int]]) -> int:
    """Number of units that `units` finds; 0 if it fails."""
    model, size = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return len(localgrad.units(model, torch.empty(2, 3, size, size)))
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all networks, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; all of them unless given")
    parser.add_argument("--units", action="store_true", help="count the units that split finds too")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    every = [(name, "timm") for name in TIMM] + [(name, "torchvision") for name in TORCHVISION]
    rows = []
    for name, library in every:
        if options.names and name not in options.names:
            continue
        rows.append(row(name, library, options.units))
        kinds = {kind: rows[-1][kind].get("error", rows[-1][kind].get("cuts")) for kind in ("plain", "man")}
        print(library, name, rows[-1]["plain"]["trains"], rows[-1]["man"]["trains"], kinds, flush=True)
    for kind in ("plain", "man"):
        print(f"{kind}: {sum(each[kind]['trains'] for each in rows)} of {len(rows)} train in four blocks")
    kinds = ("plain", "man")
    print_table(
        "four blocks",
        [{"row": each["network"]} | {kind: each[kind]["trains"] for kind in kinds} for each in rows],
    )
    if options.output:
        write(options.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
