"""The list of trainings for a GPU, by priority."""

from dataclasses import dataclass, field, replace
from typing import Any

from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import TrainConfig
from localgrad.recipes import recipe

TEN = {"epochs": 10, "warmup_epochs": 0, "batch_size": 128, "lr": 0.1}
"""The budget of `results/cifar10-ten-epochs`."""
THIRTY = {"epochs": 30, "warmup_epochs": 2, "batch_size": 128, "lr": 0.1}


@dataclass(frozen=True)
class Training:
    """A recipe with changed optimizer settings and a seed."""

    recipe: str
    folder: str
    """Folder of its result, named after the budget."""
    optim: dict[str, Any] = field(default_factory=dict)
    """Optimizer settings that differ from the recipe."""
    seed: int = 0
    data: str = "cifar10"
    """Folder of its images."""

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.recipe}-seed{self.seed}"

    def config(self, **changes: Any) -> TrainConfig:
        """The complete config."""
        config = recipe(self.recipe).config
        config = replace(config, seed=self.seed, optim=replace(config.optim, **self.optim), **changes)
        return with_defaults(validate(config))


def _ten(*rows: str, seed: int = 0) -> list[Training]:
    return [Training(f"cifar10-resnet32-{row}", "cifar10-ten-epochs", TEN, seed) for row in rows]


def _thirty(*rows: str, seed: int = 0) -> list[Training]:
    return [Training(f"cifar10-resnet32-{row}", "cifar10-thirty-epochs", THIRTY, seed) for row in rows]


def _imagenette(seed: int) -> list[Training]:
    rows = ("e2e", "k4-dgl", "k4-dgl-man", "k4-infopro", "k4-infopro-man", "k4-auglocal")
    return [
        Training(f"imagenette64-resnet18-{row}", "imagenette64-sixty-epochs", {}, seed, "imagenette64") for row in rows
    ]


MAIN = ("e2e", "k16-dgl", "k16-dgl-man", "k16-auglocal-d2", "k16-dgl-reach2", "k16-auglocal-d2-reach2")
CHEAP = ("k16-dgl-man-pool2", "k16-dgl-man-pool2-ema-only", "k16-auglocal-d2-pool2", "k16-auglocal-d2-pool2-reach2")
STRONG = (
    *("k16-auglocal-d5", "k16-auglocal-d5-reach2", "k16-auglocal-d5-pool2", "k16-auglocal-d5-pool2-reach2"),
    *("k16-auglocal-d2-pool2-reach3", "k16-auglocal-d5-pool2-reach3", "k16-dgl-man-reach2", "k16-dgl-reach3"),
)
FEWER = ("k2-dgl", "k4-dgl", "k8-dgl", "k8-dgl-reach2", "k8-dgl-man", "k8-auglocal-d2", "k4-auglocal-d2")
FORMS = ("ema-only", "bias-only", "conv1x1", "pool2-bias-only", "pool2-conv1x1", "pool2-fused", "pool2-reach2")
CHEAPER = tuple(f"k16-dgl-man-{form}" for form in FORMS)
MORE = (
    *("k16-auglocal-d1", "k16-auglocal-d3", "k16-auglocal-d2-man", "k16-auglocal-d2-ema", "k16-auglocal-d2-reach3"),
    *("k8-auglocal-d2-reach2", "k8-dgl-man-reach2", "k4-dgl-reach2", "k4-auglocal-d2-reach2", "k2-dgl-man"),
    *("k2-auglocal-d2", "k16-auglocal-d1-reach2", "k16-auglocal-d2-ema-reach2", "e2e-accumulate4"),
    *("k16-dgl-man-fused", "k16-auglocal-d5-man", "k4-dgl-man"),
)

TRAININGS: list[Training] = [
    *_ten(*MAIN, *CHEAP),
    *_thirty("e2e", "k16-dgl", "k16-dgl-man", "k16-auglocal-d2-reach2", "k16-auglocal-d5-pool2-reach2"),
    *_ten(*STRONG, *FEWER, *CHEAPER),
    *_imagenette(0),
    *_ten(*MAIN, *CHEAP, *STRONG, seed=1),
    *_ten(*MORE),
    *_ten(*MAIN, *CHEAP, *STRONG, seed=2),
    *_thirty("k16-dgl-man-ema-only", "k16-dgl-man-bias-only", "k16-dgl-reach2", "k16-dgl-man-pool2"),
    *_imagenette(1),
    *_ten(*CHEAPER, *FEWER, seed=1),
    *_imagenette(2),
    *_ten(*CHEAPER, *FEWER, seed=2),
    *_thirty("e2e", "k16-dgl", "k16-dgl-man", "k16-auglocal-d2-reach2", "k16-auglocal-d5-pool2-reach2", seed=1),
    *_ten(*MORE, seed=1),
    Training("cifar10-resnet32-k16-dgl-man", "cifar10-400-epochs"),
]

TIMED = (*MAIN, *CHEAP, "k16-auglocal-d5-pool2-reach2", "k16-dgl-man-ema-only", "k16-dgl-man-reach2", "k8-dgl")
"""Rows of `TRAININGS` at ten epochs whose seconds per step are measured, each alone on the GPU."""
EAGER = ("e2e", "k16-dgl", "k16-dgl-man", "k16-auglocal-d2", "k16-dgl-reach2")
"""Rows that are also measured without CUDA graphs."""

TINY = [
    Training("cifar10-resnet32-e2e", "tiny", {"epochs": 2, "warmup_epochs": 0, "batch_size": 16}),
    Training("cifar10-resnet32-k16-auglocal-d2-reach2", "tiny", {"epochs": 2, "warmup_epochs": 0, "batch_size": 16}),
]
"""Trainings of two epochs for `--tiny`, which tests that everything runs."""
