"""What a run is: frozen dataclasses, their checks, and their JSON form.

A recipe returns a `TrainConfig`, a flag replaces one field of it, and the resolved config is saved with the run.
The sentence under each field is its help on the command line.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from localgrad.data import DataConfig
from localgrad.errors import LocalGradError

Precision = Literal["auto", "32-true", "bf16-mixed"]
Parallel = Literal["data", "blocks", "shards"]
OnNonfinite = Literal["stop", "skip"]
Balance = Literal["memory", "compute", "count"]
Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained."""

    name: str = "cifar_resnet"
    """Which network: `cifar_resnet`, `torchvision:NAME` (as `torchvision:resnet50`) or `timm:NAME`."""
    depth: int = 32
    """Number of layers of a `cifar_resnet`, 6n + 2; other networks have it in their name."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The local loss of every block but the last. An option left out keeps the method's own default."""

    name: str = "none"
    """Which local loss: `none` (one block, end-to-end), `classifier`, `predsim`, `dgl` or `infopro`."""
    head: str | None = None
    """Form of the task head, by the method's own names (as `compact`, `original`, `wide`, `light` for dgl)."""
    beta: float | None = None
    """Weight of the similarity loss; the class loss gets 1 - beta."""
    max_features: int | None = None
    """Most features the pooled class head may see."""
    reconstruction: tuple[float, ...] | None = None
    """Weight of the reconstruction at the first and at the last local block, interpolated between, or at each."""
    task: tuple[float, ...] | None = None
    """Weight of the task loss at the first and at the last local block, interpolated between, or at each."""
    loss: str | None = None
    """Form of the task loss: `cross_entropy` or `contrast`."""
    feature_dim: int | None = None
    """Width of the task head's hidden layer, and of the embedding that `contrast` compares."""


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum auxiliary network in front of each local loss. An option left out keeps the method's default."""

    name: str = "none"
    """Which one: `none`, `man` or `manpp`."""
    decay: float | None = None
    """Share of the moving average kept at each step; 0 uses the next unit's weights directly."""
    form: str | None = None
    """`sum` (two branches, the released code) or `fused` (one branch and an additive bias, the text)."""
    bias: bool | None = None
    """Whether the trained copy is there; of the form `fused`, the additive bias."""
    ema: bool | None = None
    """Whether the moving average is there."""
    depth: int | None = None
    """Number of units of the next block that are copied."""
    initial: str | None = None
    """Where the auxiliary weights begin: `copy` of the next unit, or `random`."""
    recompute: bool | None = None
    """Recompute the auxiliary network in the backward pass, which saves memory and costs time."""


@dataclass(frozen=True)
class OptimConfig:
    """One optimizer a block, and its schedule."""

    name: Optimizer = "sgd"
    """Which optimizer: `sgd`, or `adamw` (as for vision transformers)."""
    lr: float = 0.8
    """Learning rate at the top of the cosine."""
    momentum: float = 0.9
    """Momentum of SGD, and the first beta of AdamW (whose second is 0.999)."""
    nesterov: bool = True
    """Nesterov's form of the momentum; SGD's only."""
    weight_decay: float = 1e-4
    """Weight decay, on all parameters: norms, biases and auxiliary networks too."""
    batch_size: int = 1024
    """Images an optimizer step, over all devices and accumulated parts together."""
    epochs: int = 400
    """Passes over the training images."""
    warmup_epochs: int = 10
    """Epochs of warm-up, ten in the papers however long the run is; set fewer for a short run."""
    first_epoch: int = 1
    """What the cosine calls the first epoch: 1 in the CIFAR recipes, 0 in the ImageNet ones."""
    clip_norm: float | None = None
    """Largest gradient norm of a block, each block clipped alone; None for no clipping."""
    accumulate: int = 1
    """Equal parts a batch is cut into, one after the other, to save memory; BatchNorm, and losses that compare samples
    (`predsim`, and `infopro` with `contrast`), see the parts."""
    label_smoothing: float = 0.0
    """Label smoothing of the last block's cross-entropy; the local losses have none, as in the papers."""


@dataclass(frozen=True)
class TrainConfig:
    """One complete run."""

    name: str = ""
    """Name of the recipe that this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    cuts: tuple[str, ...] | None = None
    """Units after which gradients are isolated, by name; no cut at all trains end-to-end."""
    num_blocks: int | None = None
    """Number of blocks, when `cuts` is not given and they are to be chosen by `balance`."""
    balance: Balance = "memory"
    """What the chosen blocks share evenly."""
    recompute: bool = False
    """Activation checkpointing: keep what is between units, and compute each unit again in the backward pass."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The local loss."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """The momentum auxiliary network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizers."""
    precision: Precision = "auto"
    """`auto` is bf16-mixed where the device computes it natively, else 32-true."""
    channels_last: bool = True
    """Keep images and weights in the channels-last memory format."""
    accelerator: str = "auto"
    """Device to train on: `auto`, `cpu`, `cuda` or `mps`."""
    devices: int = 1
    """Number of devices, with a process each."""
    parallel: Parallel = "data"
    """What several devices share: a batch's images (`data`), the blocks (`blocks`), images and weights (`shards`).
    Losses that compare samples (`predsim`, and `infopro` with `contrast`) see a device's images."""
    replicas: int = 1
    """Copies of the network with `--parallel blocks`; each is spread over devices / replicas of them."""
    sync_batchnorm: bool = False
    """Normalise by the statistics of the whole batch where its images are shared between devices."""
    step_each_block: bool = False
    """Step each block right after its own backward pass, so that gradients of one block live at a time."""
    cuda_graph: bool = False
    """Replay the step as a CUDA graph, for networks whose kernels end faster than a host starts them."""
    seed: int = 0
    """Decides initial weights, order of the images and augmentation."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the test images; the last epoch is always evaluated."""
    local_heads: bool = False
    """Evaluate each block's own head too."""
    checkpoint_every: int = 0
    """Optimizer steps between two checkpoints; there is one at the end of each epoch anyway, and with 0 no other."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the last ones; where one is damaged a run goes on from the one before."""
    on_nonfinite: OnNonfinite = "stop"
    """What follows a loss or gradient that is not finite, before weights change: `stop`, or `skip` the batch."""
    max_skips: int = 10
    """Batches that may be skipped one after the other; one more stops the run."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run folder (needs the extra `tensorboard`)."""


def validate(config: TrainConfig) -> TrainConfig:
    """Checks a config as far as possible without data or model.

    Returns:
        The config itself.

    Raises:
        LocalGradError: that lists all problems at once.
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
        ("devices", config.devices, config.devices >= 1, "1 or more"),
        ("replicas", config.replicas, config.replicas >= 1, "1 or more"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "from 0 to 2**32 - 1"),
        ("evaluate_every", config.evaluate_every, config.evaluate_every >= 1, "1 or more"),
        ("checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 0, "0 or more"),
        ("keep_checkpoints", config.keep_checkpoints, config.keep_checkpoints >= 1, "1 or more"),
        ("max_skips", config.max_skips, config.max_skips >= 1, "1 or more"),
    ]
    problems = [f"{name} is {value}, it must be {allowed}" for name, value, fits, allowed in ranges if not fits]
    if optim.nesterov and optim.momentum == 0:
        problems.append("optim.nesterov is on with optim.momentum 0, give a momentum, or --optim.no-nesterov")
    if optim.nesterov and optim.name == "adamw":
        problems.append("optim.nesterov is on, but optim.name adamw has no such form, give --optim.no-nesterov")
    if config.step_each_block and optim.accumulate > 1:
        problems.append(
            f"step_each_block is on with optim.accumulate {optim.accumulate}: gradients of all parts must be there "
            "before a block steps, use one of the two"
        )
    if config.step_each_block and (config.parallel == "blocks" or config.on_nonfinite == "skip"):
        problems.append("step_each_block goes neither with --parallel blocks nor with --on-nonfinite skip")
    if config.cuda_graph and (config.devices > 1 or config.accelerator not in ("auto", "cuda")):
        problems.append(
            f"cuda_graph is on with accelerator {config.accelerator} and devices {config.devices}: it takes one CUDA "
            "device"
        )
    if config.cuda_graph and (config.recompute or config.momentum.recompute):
        problems.append("cuda_graph goes not with recompute, whose random state a graph cannot keep")
    return [*problems, *_device_problems(config)]


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
            problems.append("optim.accumulate cuts a batch into parts, which --parallel blocks cannot; give 1")
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
    from localgrad.build import option_problems

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


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The fields in which two configs differ, each as one readable line `name: before -> after`."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name]]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings, numbers, booleans and None, for JSON."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(values: Any) -> TrainConfig:
    """A config from what `to_dict` gave. Fields left out keep their defaults; nothing is evaluated as code.

    Raises:
        LocalGradError: with every unknown name and every value of a wrong type at once.
    """
    problems: list[str] = []
    config = _dataclass_from(TrainConfig, values, "config", problems)
    if problems:
        raise LocalGradError("this saved configuration cannot be used: " + "; ".join(problems))
    return config


def _dataclass_from(kind: Any, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{path} is {values!r}; it must be a table of names and values")
        return None
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            problems.append(f"{path} has no field {name!r}{closest(name, names)}; its fields are {', '.join(names)}")
    given = [name for name in names if name in values]
    known = {name: _value_from(hints[name], values[name], f"{path}.{name}", problems) for name in given}
    return None if problems else kind(**known)


def _value_from(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass_from(hint, value, path, problems)
    if fits(hint, value):
        return tuple(value) if isinstance(value, list) else float(value) if hint is float else value
    problems.append(f"{path} is {value!r}; it must be {getattr(hint, '__name__', None) or hint}")
    return None


def fits(hint: Any, value: Any) -> bool:
    """Whether a value read from a file is of a field's type; an int is a float too, a bool is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        alike = origin is list or arguments[-1] is Ellipsis
        items = [arguments[0]] * len(value) if alike else list(arguments)
        return len(items) == len(value) and all(fits(item, part) for item, part in zip(items, value, strict=True))
    if hint is float:
        return isinstance(value, float) or (fits(int, value) and abs(value) < 2**1023)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint in (None, type(None)) else isinstance(value, hint)


def closest(name: str, choices: Sequence[str], count: int = 3) -> str:
    """The choices that look most like a mistyped name, as the end of a message: ` (did you mean ...?)`, or nothing."""
    matches = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
