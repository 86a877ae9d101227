"""The config of a run, as frozen dataclasses.

A recipe returns a `TrainConfig`, a flag replaces one field of it, and the resolved config is saved with the run.
The sentence under each field is its help on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from localgrad.data.config import DataConfig

# `planning.simulation` and `core.split` have these choices too, but import torch, which `--help` does without
Precision = Literal["auto", "32-true", "bf16-mixed"]


Parallel = Literal["data", "blocks", "shards"]


OnNonfinite = Literal["stop", "skip"]


Balance = Literal["memory", "compute", "count"]


Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained."""

    name: str = "cifar_resnet"
    """Which network: `cifar_resnet`, `torchvision:NAME` (as `torchvision:resnet50`), `timm:NAME`, or your own function,
    `package.module:factory` or `path/to/file.py:factory`, which is called with `num_classes`."""
    depth: int = 32
    """Number of layers of a `cifar_resnet`, 6n + 2; ignored for other networks."""
    small_stem: bool = False
    """Replace a torchvision ResNet's stem by one 3x3 convolution of stride 2, for images of about 64 pixels."""
    weights: str | None = None
    """Initial weights: `default` or `imagenet`, torchvision's or timm's name for them, a file, or a run folder; None
    for random weights. A head for other classes keeps random weights."""
    freeze: tuple[str, ...] = ()
    """Modules (or parameters) to freeze, by name; batch norms in them still update their running statistics."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The local loss of every block but the last. An option left out keeps the method's own default."""

    name: str = "none"
    """Which local loss: `none` (one block, end-to-end), `classifier`, `predsim`, `dgl`, `infopro` or `auglocal`."""
    head: str | None = None
    """Form of the task head, by the method's own names (as `compact`, `original`, `wide`, `light` for dgl)."""
    beta: float | None = None
    """Weight of the similarity loss; the class loss gets 1 - beta."""
    max_features: int | None = None
    """Largest number of features that the class head gets after pooling."""
    reconstruction: tuple[float, ...] | None = None
    """Weight of the reconstruction loss: of the first and the last local block, interpolated between, or of each."""
    task: tuple[float, ...] | None = None
    """Weight of the task loss: of the first and the last local block, interpolated between, or of each."""
    loss: str | None = None
    """Form of the task loss: `cross_entropy` or `contrast`."""
    feature_dim: int | None = None
    """Width of the task head's hidden layer, and of the embedding that `contrast` compares."""
    depth: int | None = None
    """Number of units in the `auglocal` head of the first block."""
    pyramid: float | None = None
    """How far the depth of `auglocal` heads falls over the blocks: 0 keeps it, 1 falls to a single unit."""
    pool: int | None = None
    """Kernel size and stride of the average pooling before an `auglocal` head; 1 for none."""


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum auxiliary network in front of each local loss. An option left out keeps the method's default."""

    name: str = "none"
    """Which momentum network: `none`, `man` or `manpp`."""
    decay: float | None = None
    """Share of the moving average kept at each step; 0 uses the next unit's weights directly."""
    form: str | None = None
    """`sum` (two branches, the papers' code), `residual` (their sum minus the input, so that a residual path counts
    once) or `fused` (one branch and an additive bias, the MAN paper's text)."""
    bias: bool | None = None
    """Whether to have the trained branch; with the form `fused`, the additive bias."""
    ema: bool | None = None
    """Whether to have the moving average."""
    depth: int | None = None
    """Number of units of the next block that are copied."""
    initial: str | None = None
    """Initial weights of the momentum network: a `copy` of the next unit's, or `random`."""
    recompute: bool | None = None
    """Activation checkpointing of the momentum network, which saves memory and costs time."""
    bias_form: str | None = None
    """The trained branch: `unit`, a copy of the next unit (as in the papers' code), or `conv1x1`."""
    pool: int | None = None
    """Kernel size and stride of the average pooling before the copies; 1 for none."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, one per block, and its schedule."""

    name: Optimizer = "sgd"
    """Which optimizer: `sgd`, or `adamw` (as for vision transformers)."""
    lr: float = 0.8
    """Peak learning rate of the cosine schedule."""
    momentum: float = 0.9
    """Momentum of SGD, and the first beta of AdamW (whose second is 0.999)."""
    nesterov: bool = True
    """Nesterov momentum; for SGD only."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters, those of norms, biases and auxiliary networks included."""
    batch_size: int = 1024
    """Images per optimizer step, over all devices and micro-batches together."""
    epochs: int = 400
    """Passes over the training images."""
    warmup_epochs: int = 10
    """Epochs of warm-up: ten in the papers, for any length of the run; set fewer for a short run."""
    first_epoch: int = 1
    """Number of the first epoch in the cosine: 1 in the CIFAR recipes, 0 in the ImageNet ones."""
    clip_norm: float | None = None
    """Largest gradient norm of a block; each block is clipped separately. None for no clipping."""
    accumulate: int = 1
    """Micro-batches per optimizer step (gradient accumulation), which save memory; BatchNorm, and losses that compare
    samples (`predsim`, and `infopro` with `contrast`), see one micro-batch."""
    label_smoothing: float = 0.0
    """Label smoothing of the last block's cross-entropy; the local losses have none, as in the papers."""


@dataclass(frozen=True)
class TrainConfig:
    """One complete run."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012
    # pydantic's settings for this dataclass and those in its fields, when a config is read from a file

    name: str = ""
    """Name of the recipe that the config came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    cuts: tuple[str, ...] | None = None
    """Names of the units after which gradients are isolated; an empty list trains end-to-end."""
    num_blocks: int | None = None
    """Number of blocks, instead of `cuts`: the cuts are then chosen by `balance`."""
    balance: Balance = "memory"
    """What is balanced between the blocks if `num_blocks` is given."""
    recompute: bool = False
    """Activation checkpointing: save only the outputs of units, and recompute the rest in the backward pass."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The local loss."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """The momentum auxiliary network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizers."""
    precision: Precision = "auto"
    """`auto` is bf16-mixed if the device computes bfloat16 natively, else 32-true."""
    channels_last: bool = True
    """Keep images and weights in the channels-last memory format."""
    accelerator: str = "auto"
    """Device to train on: `auto`, `cpu`, `cuda` or `mps`."""
    devices: int = 1
    """Number of devices; each has its own process."""
    parallel: Parallel = "data"
    """What is divided between devices: the images of a batch (`data`), the blocks (`blocks`), images and weights
    (`shards`). Losses that compare samples (`predsim`, and `infopro` with `contrast`) see one device's images."""
    replicas: int = 1
    """Copies of the network with `--parallel blocks`; the blocks of a copy are on devices / replicas devices."""
    sync_batchnorm: bool = False
    """Compute BatchNorm's batch statistics over all devices that share a batch's images."""
    reach: int = 1
    """Number of blocks that a local loss trains: 1 for its own, 2 for its own and the one before, and so on."""
    step_each_block: bool = False
    """Step each block right after its own backward pass, so that only one block's gradients are alive at a time."""
    cuda_graph: bool = False
    """Replay the step as a CUDA graph, for networks with kernels shorter than their launch."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the test images; the last epoch is always evaluated."""
    local_heads: bool = False
    """Evaluate the local head of each block too."""
    checkpoint_every: int = 0
    """Optimizer steps between two checkpoints, besides the one after each epoch; 0 for none within an epoch."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints to keep; if one is damaged, a run resumes from the one before."""
    on_nonfinite: OnNonfinite = "stop"
    """If a loss or gradient is not finite: `stop`, or `skip` the batch; in both cases before weights change."""
    max_skips: int = 10
    """Number of batches in a row that may be skipped; one more stops the run."""
    keep_best: bool = False
    """Also keep the weights of the epoch with the smallest error, in `best.safetensors`: the error on the validation
    images (--data.validation-split), or else on the test images, where the choice makes it too good."""
    patience: int | None = None
    """Stop if the error that --keep-best compares has not fallen for this many epochs; None trains all epochs."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run folder (needs the extra `tensorboard`)."""
