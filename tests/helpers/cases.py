"""The rows that the matrix tests run over: objectives, momenta and small models."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import localgrad
from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.models import cifar_resnet

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
NUM_CLASSES = 5

OBJECTIVES: dict[str, Objective] = {
    "classifier": localgrad.classifier(NUM_CLASSES),
    "predsim": localgrad.predsim(NUM_CLASSES),
    "dgl original": localgrad.dgl(NUM_CLASSES, head="original"),
    "dgl compact": localgrad.dgl(NUM_CLASSES, head="compact"),
    "dgl wide": localgrad.dgl(NUM_CLASSES, head="wide"),
    "auglocal": localgrad.auglocal(NUM_CLASSES, depth=1),
    "infopro": localgrad.infopro(NUM_CLASSES, MEAN, STD, task=(0.5, 0.5)),
    "infopro contrast": localgrad.infopro(NUM_CLASSES, MEAN, STD, task=(0.5, 1.0), loss="contrast", head="2c2f"),
}
MOMENTA: dict[str, Momentum | None] = {
    "none": None,
    "man": localgrad.man(),
    "man random": localgrad.man(initial="random"),
    "man recomputed": localgrad.man(recompute=True),
    "man of depth 2": localgrad.man(depth=2),
    "man fused": localgrad.man(form="fused"),
    "EMA only": localgrad.man(bias=False),
    "bias only": localgrad.man(ema=False),
    "direct use": localgrad.man(decay=0.0),
    "manpp": localgrad.manpp(),
}


class TinyTransformer(nn.Module):
    """Patches of 4 px, a class token, three encoder layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        layers = [nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True) for _ in range(3)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = self.patches(inputs).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(inputs.shape[0], -1, -1), patches], 1)
        return self.head(self.layers(tokens)[:, 0])


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (lambda: cifar_resnet(8, NUM_CLASSES), ["conv1", "layer1.0", "layer2.0"]),
    "transformer": (TinyTransformer, ["patches", "layers.0", "layers.1"]),
}
IMAGE = 16


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    """Random images `(size, 3, 16, 16)` and classes, every class at most twice."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, IMAGE, IMAGE, generator=generator)
    return inputs, torch.arange(size) % NUM_CLASSES
