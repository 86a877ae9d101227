"""The vision transformers of MAN++ on ImageNet: ViT-T, S and B, patches of 16, AdamW and a cosine for 90 epochs.

The network is cut after transformer blocks 3, 6 and 9 of 12. The local head is a LayerNorm and a linear layer on the
class token (`classifier`). Batch 1024, learning rate 0.001 and no warm-up are as in the MAN++ command for eight GPUs.
The networks are timm's. In the MAN++ code the patch embedding has one more LayerNorm, and the trained branch has a
second transformer block after the first. We found no published results for these rows.
"""

from collections.abc import Callable
from functools import partial

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data
from localgrad.recipes.recipe import Recipe

SIZES = ("tiny", "small", "base")


CUTS = ("blocks.2", "blocks.5", "blocks.8")


ROWS = {
    "e2e": ("none", "none"),
    "k4-classifier": ("classifier", "none"),
    "k4-classifier-man": ("classifier", "man"),
    "k4-classifier-manpp": ("classifier", "manpp"),
}
"""Local loss and momentum network of each row."""


def vit_recipes() -> dict[str, Callable[[], Recipe]]:
    """The rows, by name, as `imagenet-vit-tiny-k4-classifier-manpp`."""
    return {f"imagenet-vit-{size}-{row}": partial(_vit, size, row) for size in SIZES for row in ROWS}


def _vit(size: str, row: str) -> Recipe:
    objective, momentum = ROWS[row]
    config = TrainConfig(
        name=f"imagenet-vit-{size}-{row}",
        model=ModelConfig(f"timm:vit_{size}_patch16_224"),
        data=data.imagenet(),
        cuts=() if objective == "none" else CUTS,
        objective=ObjectiveConfig(objective),
        momentum=MomentumConfig(momentum, decay=None if momentum == "none" else 0.995),
        optim=OptimConfig(
            name="adamw",
            lr=1e-3,
            nesterov=False,
            weight_decay=0.05,
            batch_size=1024,
            epochs=90,
            warmup_epochs=0,
            first_epoch=0,
        ),
    )
    return Recipe(config, label="E2E" if objective == "none" else "K=4")
