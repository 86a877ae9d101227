"""Checks of a config; one error lists all problems."""

import math
import typing

from localgrad.config.methods import option_problems
from localgrad.config.schema import Balance, OnNonfinite, Optimizer, Parallel, Precision, TrainConfig
from localgrad.errors import LocalGradError


def validate(config: TrainConfig) -> TrainConfig:
    """Check a config as far as possible without data or model.

    Returns:
        The config itself.

    Raises:
        LocalGradError: the config has problems; the message lists all of them.
    """
    if not isinstance(config, TrainConfig):
        raise LocalGradError(f"config is a {type(config).__name__}: give a TrainConfig, as recipe(NAME).config")
    problems = [*_number_problems(config), *_split_problems(config), *_option_problems(config)]
    if problems:
        raise LocalGradError("this configuration cannot be used: " + "; ".join(problems))
    return config


def _number_problems(config: TrainConfig) -> list[str]:
    optim = config.optim
    ranges: list[tuple[str, float | None, bool, str]] = [
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "a finite number more than 0"),
        ("optim.momentum", optim.momentum, 0 <= optim.momentum < 1, "from 0 to less than 1"),
        ("optim.weight_decay", optim.weight_decay, 0 <= optim.weight_decay < math.inf, "0 or more"),
        ("optim.batch_size", optim.batch_size, 1 <= optim.batch_size < 2**31, "from 1 to 2**31 - 1"),
        ("optim.epochs", optim.epochs, 1 <= optim.epochs < 2**31, "from 1 to 2**31 - 1"),
        ("optim.warmup_epochs", optim.warmup_epochs, 0 <= optim.warmup_epochs < 2**31, "from 0 to 2**31 - 1"),
        ("optim.first_epoch", optim.first_epoch, optim.first_epoch in (0, 1), "0 or 1"),
        (
            *("optim.clip_norm", optim.clip_norm, optim.clip_norm is None or 0 < optim.clip_norm < math.inf),
            "a finite number more than 0, or None",
        ),
        ("optim.accumulate", optim.accumulate, 1 <= optim.accumulate <= optim.batch_size, "from 1 to the batch size"),
        ("optim.label_smoothing", optim.label_smoothing, 0 <= optim.label_smoothing < 1, "from 0 to less than 1"),
        ("reach", config.reach, config.reach >= 1, "1 or more"),
        ("devices", config.devices, config.devices >= 1, "1 or more"),
        ("replicas", config.replicas, config.replicas >= 1, "1 or more"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "from 0 to 2**32 - 1"),
        ("evaluate_every", config.evaluate_every, config.evaluate_every >= 1, "1 or more"),
        ("checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 0, "0 or more"),
        ("keep_checkpoints", config.keep_checkpoints, config.keep_checkpoints >= 1, "1 or more"),
        ("max_skips", config.max_skips, config.max_skips >= 1, "1 or more"),
        ("patience", config.patience, config.patience is None or config.patience >= 1, "1 or more, or None"),
    ]
    problems = [f"{name} is {value}, it must be {allowed}" for name, value, fits, allowed in ranges if not fits]
    return [*problems, *_pair_problems(config), *_device_problems(config)]


def _pair_problems(config: TrainConfig) -> list[str]:
    """Problems of settings that exclude each other, one sentence each."""
    optim, problems = config.optim, list[str]()
    if optim.nesterov and optim.momentum == 0:
        problems.append("optim.nesterov is on with optim.momentum 0, give a momentum, or --optim.no-nesterov")
    if optim.nesterov and optim.name == "adamw":
        problems.append("optim.nesterov is on, but optim.name adamw has no such form, give --optim.no-nesterov")
    if config.step_each_block and optim.accumulate > 1:
        problems.append(
            f"step_each_block is on with optim.accumulate {optim.accumulate}: gradients of all micro-batches must be "
            "there before a block steps, use one of the two"
        )
    if config.step_each_block and (config.parallel == "blocks" or config.on_nonfinite == "skip"):
        problems.append("step_each_block goes neither with --parallel blocks nor with --on-nonfinite skip")
    if config.reach > 1 and (config.parallel == "blocks" or (config.parallel == "shards" and config.devices > 1)):
        problems.append(
            f"reach is {config.reach}, which needs a gradient from the next block while its own waits: it goes neither "
            "with --parallel blocks nor with --parallel shards"
        )
    if config.reach > 1 and not (config.cuts or (config.num_blocks or 1) > 1):
        problems.append(f"reach is {config.reach}, but without a cut there is no block before; leave it out")
    if config.cuda_graph and (config.devices > 1 or config.accelerator not in ("auto", "cuda")):
        problems.append(
            f"cuda_graph is on with accelerator {config.accelerator} and devices {config.devices}: it takes one CUDA "
            "device"
        )
    if config.cuda_graph and (config.recompute or config.momentum.recompute):
        problems.append("cuda_graph goes not with recompute, whose random state a graph cannot keep")
    return problems


def _device_problems(config: TrainConfig) -> list[str]:
    devices, replicas, batch_size = config.devices, config.replicas, config.optim.batch_size
    if devices < 1 or replicas < 1:
        return []
    if config.parallel != "blocks":
        shares, what = devices, "devices"
        problems = [] if replicas == 1 else [f"replicas is {replicas}, which needs --parallel blocks"]
    else:
        shares, what = replicas, "replicas"
        problems = []
        if devices % replicas:
            problems.append(f"devices {devices} cannot be shared by {replicas} replicas")
        if config.on_nonfinite == "skip":
            problems.append("on_nonfinite is skip, which --parallel blocks cannot, for a rank does not wait for others")
        if config.optim.accumulate > 1:
            problems.append("optim.accumulate cuts a batch into micro-batches, which --parallel blocks cannot; give 1")
    if batch_size % shares:
        problems.append(f"optim.batch_size {batch_size} cannot be shared by {shares} {what}")
    return problems


def _split_problems(config: TrainConfig) -> list[str]:
    problems = []
    if (config.cuts is None) == (config.num_blocks is None):
        given = f"cuts is {config.cuts} and num_blocks is {config.num_blocks}"
        problems.append(f"{given}, give exactly one of the two (no cuts at all, `--cuts` alone, for end-to-end)")
    if config.num_blocks is not None and config.num_blocks < 1:
        problems.append(f"num_blocks is {config.num_blocks}; it must be 1 or more")
    isolated = bool(config.cuts) or (config.num_blocks or 1) > 1
    if isolated and config.objective.name == "none":
        problems.append("objective.name is none, but blocks that are cut off need a local loss, as `dgl`")
    if not isolated and config.objective.name != "none":
        problems.append(f"objective.name is {config.objective.name}, but without a cut no block has a local loss")
    if config.momentum.name != "none" and config.objective.name == "none":
        problems.append(f"momentum.name is {config.momentum.name}, but without a local loss it has no place")
    return problems


def _option_problems(config: TrainConfig) -> list[str]:
    problems = [*option_problems("objective", config.objective), *option_problems("momentum", config.momentum)]
    for name, value, allowed in (
        ("optim.name", config.optim.name, typing.get_args(Optimizer)),
        ("precision", config.precision, typing.get_args(Precision)),
        ("balance", config.balance, typing.get_args(Balance)),
        ("parallel", config.parallel, typing.get_args(Parallel)),
        ("on_nonfinite", config.on_nonfinite, typing.get_args(OnNonfinite)),
        ("accelerator", config.accelerator, ("auto", "cpu", "cuda", "mps")),
    ):
        if value not in allowed:
            problems.append(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return problems
