"""What a run is: frozen dataclasses, their checks, and their JSON form.

A recipe returns a `TrainConfig`, a flag replaces one field of it, and the resolved config is saved with the run.
The sentence under each field is its help on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from localgrad.data.config import DataConfig

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
    """Number of layers of a `cifar_resnet`, 6n + 2; other networks have it in their name."""
    small_stem: bool = False
    """Begin a torchvision ResNet with a 3x3 convolution of stride 2 alone, for images of 64 pixels or so."""
    weights: str | None = None
    """Weights to begin with: `default` or `imagenet`, or a name that torchvision or timm has for them, a file, or a run
    folder; None draws them at random. A head of other classes begins anew."""
    freeze: tuple[str, ...] = ()
    """Modules that are not trained, by name, with all within them; their batch norms keep following the images."""


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
    """Most features the pooled class head may see."""
    reconstruction: tuple[float, ...] | None = None
    """Weight of the reconstruction at the first and at the last local block, interpolated between, or at each."""
    task: tuple[float, ...] | None = None
    """Weight of the task loss at the first and at the last local block, interpolated between, or at each."""
    loss: str | None = None
    """Form of the task loss: `cross_entropy` or `contrast`."""
    feature_dim: int | None = None
    """Width of the task head's hidden layer, and of the embedding that `contrast` compares."""
    depth: int | None = None
    """Units of an `auglocal` head, at the first block."""
    pyramid: float | None = None
    """How far the depth of `auglocal` heads falls over the blocks: 0 not, 1 to a single unit."""
    pool: int | None = None
    """Side of the squares that features are averaged over before an `auglocal` head; 1 for none."""


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
    bias_form: str | None = None
    """The trained part: `unit`, a whole copy (as released), or `conv1x1`."""
    pool: int | None = None
    """Side of the squares that features are averaged over before the copies; 1 for none."""


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

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # noqa: RUF012
    # of this and of all dataclasses in it, when one is read from a file

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
    reach: int = 1
    """Blocks that a local loss trains: 1, its own; 2, that and the one before, through its own; and so on."""
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
    keep_best: bool = False
    """Keep the weights of the best epoch too, in `best.safetensors`: of the smallest error on the validation images
    (--data.validation-split), or on the test images, which makes that error too good."""
    patience: int | None = None
    """Stop once the same error has not become smaller for so many epochs; None trains all epochs."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run folder (needs the extra `tensorboard`)."""
