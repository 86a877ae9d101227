"""Compare seconds per step: local learning, end-to-end, activation checkpointing and gradient accumulation.

The rows run one step each in turn, so that other load on the machine affects all of them equally. A ratio is a row's
time divided by the reference's time in the same round, median over the rounds.

    python benchmarks/speed.py --data path/to/cifar10 --rounds 15 -o results/speed.json
    python benchmarks/speed.py --data path/to/cifar10 --rows localgrad --rounds 40 -o results/speed-loop.json
    python benchmarks/speed.py --data path/to/cifar10 --rows localgrad rival "15 blocks" AugLocal --rounds 12 \\
        -o results/speed-rivals.json
    python benchmarks/speed.py --network resnet50 --data path/to/imagenette --batch-size 32 \\
        -o results/speed-resnet50.json

- resnet32, CIFAR-10: the papers' methods at MAN's K=16 cuts, and their rivals: accumulation over four micro-batches,
  checkpointing, both, and fewer blocks. The reference is a plain end-to-end loop of the same network in float32, NCHW,
  below in this file.
- resnet50, Imagenette at 128 px: DGL and DGL+MAN at the cuts from `plan` for this batch, with the peak memory of each
  row. The reference is end-to-end training by the trainer.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from localgrad import plan
from localgrad.config.build import build_factories, build_model
from localgrad.config.schema import TrainConfig
from localgrad.models import CifarResNet, cifar_resnet
from localgrad.planning.measure import measure_peak
from localgrad.recipes import recipe
from localgrad.results.step_times import Step, endless_batches, ratio, take_turns, timed_step
from localgrad.training.devices import has_native_bf16, resolve_precision
from localgrad.training.run import Run
from report import environment, print_table, write

ROWS = {
    "end-to-end, localgrad": "cifar10-resnet32-e2e",
    "DGL, 15 blocks": "cifar10-resnet32-k16-dgl",
    "DGL+MAN, 15 blocks": "cifar10-resnet32-k16-dgl-man",
    "DGL+MAN, 15 blocks, EMA branch alone": "cifar10-resnet32-k16-dgl-man-ema-only",
    "InfoPro, 15 blocks": "cifar10-resnet32-k16-infopro",
    "InfoPro+MAN, 15 blocks": "cifar10-resnet32-k16-infopro-man",
    "DGL, 15 blocks, reach 2": "cifar10-resnet32-k16-dgl-reach2",
    "AugLocal, depth 2, 14 blocks": "cifar10-resnet32-k16-auglocal-d2",
    "rival: end-to-end in 4 micro-batches": "cifar10-resnet32-e2e-accumulate4",
    "rival: end-to-end, checkpointed": "cifar10-resnet32-e2e-checkpointed",
    "rival: end-to-end in 4 micro-batches, checkpointed": "cifar10-resnet32-e2e-accumulate4-checkpointed",
    "rival: DGL, 4 blocks": "cifar10-resnet32-k4-dgl",
    "rival: DGL, 8 blocks": "cifar10-resnet32-k8-dgl",
    "rival: DGL+MAN, 8 blocks": "cifar10-resnet32-k8-dgl-man",
}
"""Recipe of each row. Rivals save memory without local losses, or have fewer blocks."""
BARE = (
    "DGL, 15 blocks",
    "DGL+MAN, 15 blocks",
    "InfoPro, 15 blocks",
    "InfoPro+MAN, 15 blocks",
    "AugLocal, depth 2, 14 blocks",
)
"""Rows whose blocks and heads also run in a bare loop, which shows the time of the kernels alone."""
IN_BARE_LOOP = ", bare loop"
LEAN = ("e2e", "k4-dgl", "k4-dgl-man")
Measured = tuple[str, list[dict[str, Any]], dict[str, list[float]]]


def plain_step(batches: Iterator[tuple[Tensor, ...]], *, dtype: torch.dtype, channels_last: bool) -> Step:
    """A hand-written end-to-end step."""
    torch.manual_seed(0)
    model = cifar_resnet(32)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)

    def step() -> None:
        inputs, targets = next(batches)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bare_step(run: Run, batches: Iterator[tuple[Tensor, ...]], *, dtype: torch.dtype) -> Step:
    """A step of the blocks and heads of a run in a hand-written loop: no checks, one optimizer for all blocks."""
    trained = [parameter for block in run.blocks for parameter in block.trainable_parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)

    def step() -> None:
        inputs, targets = next(batches)
        features = inputs
        for block in run.blocks:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = block.body(features)
                mixed = output if block.momentum is None else block.momentum(output)
                loss = (
                    F.cross_entropy(output, targets)
                    if block.objective is None
                    else block.objective(mixed, targets, inputs)
                )
            loss.backward()
            features = output.detach()
        optimizer.step()
        optimizer.zero_grad()
        for block in run.blocks:
            block.update_momentum()

    return step


def checkpointed_step(batches: Iterator[tuple[Tensor, ...]]) -> Step:
    """An end-to-end step with activation checkpointing of every residual unit, in channels last and float32."""
    torch.manual_seed(0)
    model = cifar_resnet(32).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)

    def step() -> None:
        inputs, targets = next(batches)
        loss = F.cross_entropy(checkpointed(model, inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def checkpointed(model: CifarResNet, inputs: Tensor) -> Tensor:
    """The forward pass of a CIFAR ResNet with every residual unit checkpointed."""
    features: Any = model.relu(model.bn1(model.conv1(inputs)))
    for unit in (unit for stage in (model.layer1, model.layer2, model.layer3) for unit in stage):
        features = checkpoint(unit, features, use_reentrant=False)
    return model.fc(model.avgpool(features).flatten(1))


def of_recipe(name: str, batch_size: int, data: str) -> TrainConfig:
    """The config of a recipe with another batch size and source of images."""
    config = recipe(name).config
    return replace(config, optim=replace(config.optim, batch_size=batch_size), data=replace(config.data, source=data))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet32", "resnet50"], default="resnet32")
    parser.add_argument("--data", default="uoft-cs/cifar10", help="the network's images, a hub name or a folder")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", nargs="+", help="only the rows of resnet32 whose names have one of these in them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("results/speed.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measure = resnet32 if options.network == "resnet32" else resnet50
    with ExitStack() as held:
        title, rows, seconds = measure(options, held)
    print_table(f"{title}, batch {options.batch_size}, {options.threads} thread(s)", rows)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data")}
    write(options.output, {"settings": settings, "rows": rows, "seconds": seconds, **environment()})


def resnet32(options: argparse.Namespace, held: ExitStack) -> Measured:
    """ResNet-32 on CIFAR-10: every method, plain loops, and checkpointing."""
    wanted = options.rows or [""]
    steps: dict[str, Step] = {}
    run: Any = None
    for label, name in ROWS.items():
        if run is None or any(part in label for part in wanted):  # all steps use the images of the first run
            step, made = timed_step(of_recipe(name, options.batch_size, options.data), held)
            run, steps[label] = run or made, step
    native = has_native_bf16()
    best = torch.bfloat16 if native else torch.float32
    loops = {
        "plain loop, float32 NCHW": (torch.float32, False),
        f"plain loop, {'bfloat16' if native else 'float32'} channels last": (best, True),
    }
    for label, (dtype, channels_last) in loops.items():
        batches = endless_batches(run, channels_last=channels_last)
        steps[label] = plain_step(batches, dtype=dtype, channels_last=channels_last)
    batches = endless_batches(run, channels_last=True)
    steps["end-to-end, every unit checkpointed"] = checkpointed_step(batches)
    reference, same = list(loops)
    steps = {
        label: step
        for label, step in steps.items()
        if label in (reference, same) or any(part in label for part in wanted)
    }
    for label in [label for label in BARE if label in steps]:
        _, made = timed_step(of_recipe(ROWS[label], options.batch_size, options.data), held)
        batches = endless_batches(made, channels_last=True)
        steps[f"{label}{IN_BARE_LOOP}"] = bare_step(made, batches, dtype=best)
    counted = {label: operations(step) for label, step in steps.items()}
    seconds = take_turns(steps, options.rounds)
    rows = [
        {
            "row": label,
            "seconds_per_step": statistics.median(times),
            "ratio_to_float32_nchw": ratio(times, seconds[reference]),
            "ratio_to_same_precision_and_layout": ratio(times, seconds[same]),
            "ratio_of_operations": counted[label] / counted[reference],
            "ratio_to_bare_loop": ratio(times, seconds[bare]) if (bare := label + IN_BARE_LOOP) in seconds else None,
        }
        for label, times in seconds.items()
    ]
    return "ResNet-32, 32 px", rows, seconds


def resnet50(options: argparse.Namespace, held: ExitStack) -> Measured:
    """ResNet-50 on Imagenette: end-to-end, checkpointed, accumulated, and DGL and DGL+MAN at the planned cuts."""
    whole, dgl, man = (of_recipe(f"imagenette-resnet50-{name}", options.batch_size, options.data) for name in LEAN)
    parts = replace(whole, optim=replace(whole.optim, accumulate=4))
    lean, single, fused = (
        replace(man, momentum=replace(man.momentum, **option))
        for option in ({"recompute": True}, {"bias": False}, {"form": "fused"})
    )
    configs = {
        "end-to-end": whole,
        "end-to-end, every unit checkpointed": replace(whole, recompute=True),
        "end-to-end in 4 micro-batches": parts,
        "end-to-end in 4 micro-batches, every unit checkpointed": replace(parts, recompute=True),
        "DGL, 4 blocks": planned(dgl, 4),
        "DGL, 8 blocks": planned(dgl, 8),
        "DGL+MAN, 4 blocks": planned(man, 4),
        "DGL+MAN, 4 blocks, branches recomputed": planned(lean, 4),
        "DGL+MAN, 4 blocks, EMA branch alone": planned(single, 4),
        "DGL+MAN, 4 blocks, one branch for both": planned(fused, 4),
    }
    runs = {label: timed_step(config, held) for label, config in configs.items()}
    peaks = {label: measure_peak(step)[1] for label, (step, _) in runs.items() for _ in range(2)}  # the second counts
    counted = {label: operations(step) for label, (step, _) in runs.items()}
    seconds = take_turns({label: step for label, (step, _) in runs.items()}, options.rounds)
    rows = [
        {
            "row": label,
            "cuts": " ".join(config.cuts or ()),
            "seconds_per_step": statistics.median(seconds[label]),
            "ratio_to_end_to_end": ratio(seconds[label], seconds["end-to-end"]),
            "ratio_of_operations": counted[label] / counted["end-to-end"],
            "peak_mib": peaks[label] / 2**20,
        }
        for label, config in configs.items()
    ]
    return "ResNet-50, 128 px", rows, seconds


def planned(config: TrainConfig, num_blocks: int) -> TrainConfig:
    """The config with the cuts of the smallest peak in the precision that the trainer uses."""
    model = build_model(config.model, 10)
    example = torch.zeros(config.optim.batch_size, 3, config.data.image_size, config.data.image_size)
    objective, momentum = build_factories(config, 10)
    precision = resolve_precision(config)
    assert objective is not None
    rows = plan(model, example, objective=objective, momentum=momentum, num_blocks=[num_blocks], precision=precision)
    return replace(config, cuts=next(row.cuts for row in rows if row.num_blocks == num_blocks and not row.recompute))


def operations(step: Step) -> int:
    """Floating-point operations of one step, including backward passes."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
