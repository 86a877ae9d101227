"""Time what was tried to make a step faster on a CPU: pairs of ways to compute the same, forward and backward pass.

    python benchmarks/tried.py --data path/to/cifar10 -o results/tried.json

All use bfloat16 autocast, channels last, batch size 128, and the shapes of ResNet-32 on CIFAR-10. The two ways take
turns. A row has the median time of each and the median of their ratio. `kept` says which of the two localgrad uses: a
way that is only a little faster, or faster for some shapes only, is not worth its code.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from localgrad.models import BasicBlock, cifar_resnet
from localgrad.objectives.fast import UpsampledConv, binary_cross_entropy, in_layout
from localgrad.objectives.layout import MeanOverSpace
from localgrad.results.step_times import ratio, take_turns, timed_step
from localgrad.training import trainer
from localgrad.training.devices import keep_freed_memory
from report import environment, print_table, write
from speed import of_recipe

BATCH = 128
WHOLE = "cifar10-resnet32-e2e"
SHAPES = ((16, 32), (32, 16), (64, 8))
Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """Two ways to compute the same from feature maps of one shape."""

    name: str
    first: Way
    second: Way
    kept: str
    channels: int
    size: int
    dtype: torch.dtype = torch.bfloat16

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of both ways, round by round."""
        torch.manual_seed(0)
        maps = torch.randn(BATCH, self.channels, self.size, self.size, dtype=self.dtype)
        maps = maps.to(memory_format=torch.channels_last).requires_grad_()

        def step(way: Way) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                output = way(maps)
            output.sum().backward()

        return take_turns({"first": lambda: step(self.first), "second": lambda: step(self.second)}, rounds)


class Together(nn.Module):
    """Both branches of MAN in one module: the first convolution has twice the channels, the second has two groups."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False, groups=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * channels) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.conv1(maps)), inplace=True)
        both = F.relu(self.norms[1](self.conv2(hidden)) + torch.cat([maps, maps], 1))
        return both[:, : self.channels] + both[:, self.channels :]


def last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def pairs() -> Iterator[Pair]:
    """All pairs that were tried."""
    for channels, size in SHAPES[1:]:
        conv = nn.Conv2d(channels, 12, 3, padding=1)
        early = last(UpsampledConv(conv, (size, size), (32, 32)))
        kept = "second" if early.is_worthwhile else "first"
        late = nn.Sequential(nn.UpsamplingBilinear2d((32, 32)), last(conv))
        name = f"InfoPro's decoder, {channels} channels: convolve after upsampling, or before it"
        yield Pair(name, late, early, kept, channels, size)

    norm = last(nn.BatchNorm2d(12))
    yield Pair(
        "batch norm of 12 channels: channels last, or map by map between two copies",
        lambda maps: F.relu(norm(maps)),
        lambda maps: F.relu(in_layout(norm(in_layout(maps, torch.contiguous_format)), torch.channels_last)),
        "second",
        12,
        32,
    )
    pixels = torch.rand(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    yield Pair(
        "cross-entropy of an image: PyTorch's with logits, or localgrad's",
        lambda maps: F.binary_cross_entropy_with_logits(maps.float(), pixels),
        lambda maps: binary_cross_entropy(maps.float(), pixels),
        "second",
        3,
        32,
    )
    for channels, size in SHAPES:
        yield Pair(
            f"deviation over space, {channels} channels: std, or the norm of what is centred",
            lambda maps: maps.float().flatten(2).std(2),
            lambda maps: torch.linalg.vector_norm((wide := maps.float().flatten(2)) - wide.mean(2, True), dim=2),
            "second",
            channels,
            size,
        )
        yield Pair(
            f"mean over space after a ReLU, {channels} channels: adaptive or average pooling",
            lambda maps: F.adaptive_avg_pool2d(F.relu(maps), 1).flatten(1),
            lambda maps: MeanOverSpace()(F.relu(maps)),
            "second",
            channels,
            size,
        )
        bias, ema = last(BasicBlock(channels, channels, 1)), last(BasicBlock(channels, channels, 1))
        ema.requires_grad_(False)
        yield Pair(
            f"MAN's branches, {channels} channels: one after the other, or together",
            lambda maps, bias=bias, ema=ema: bias(maps) + ema(maps),
            last(Together(channels)),
            "first",
            channels,
            size,
        )
    yield compiled()


def blocks_of(objective: Any, cuts: list[str]) -> list[localgrad.Block]:
    """The blocks of a ResNet-32 with MAN."""
    torch.manual_seed(0)
    model, example = last(cifar_resnet(32)), torch.zeros(2, 3, 32, 32)
    blocks = localgrad.split(model, example, cuts=cuts, objective=objective, momentum=localgrad.man())
    for block in blocks:
        last(block)
    return blocks


def compiled() -> Pair:
    """One block without and with `torch.compile`."""
    block = blocks_of(localgrad.dgl(10), ["layer1.0", "layer1.1"])[1]
    fast = torch.compile(block)
    targets, inputs = torch.arange(BATCH) % 10, torch.zeros(BATCH, 3, 32, 32)
    return Pair(
        "a block with DGL+MAN, 16 channels: as it is, or by torch.compile",
        lambda maps: block(maps, targets, inputs)[1],
        lambda maps: fast(maps, targets, inputs)[1],
        "first",
        16,
        32,
    )


def heap(data: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of the trainer's step with the C library's defaults, then with freed memory kept from then on."""
    with ExitStack() as held, mock.patch.object(trainer, "keep_freed_memory"):
        step, _ = timed_step(of_recipe(WHOLE, BATCH, data), held)
        given_back = take_turns({"first": step}, rounds)
        keep_freed_memory()
        return given_back | take_turns({"second": step}, rounds)


def row(name: str, seconds: dict[str, list[float]], kept: str) -> dict[str, Any]:
    """One row of the table."""
    return {
        "row": name,
        "first_ms": 1000 * statistics.median(seconds["first"]),
        "second_ms": 1000 * statistics.median(seconds["second"]),
        "second_to_first": ratio(seconds["second"], seconds["first"]),
        "kept": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10, a hub name or a folder")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("results/tried.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "ResNet-32 end-to-end in the trainer: freed memory given back, or kept (one after the other)"
    rows = [row(name, heap(options.data, options.rounds), "second")]
    rows += [row(pair.name, pair.seconds(options.rounds), pair.kept) for pair in pairs()]
    print_table(f"two ways, batch {BATCH}, {options.threads} thread(s)", rows)
    settings = {"rounds": options.rounds, "threads": options.threads}
    write(options.output, {"settings": settings, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
