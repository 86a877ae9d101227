"""The vision transformers of MAN++ on ImageNet: ViT-T, S and B with patches of 16, AdamW and a cosine for 90 epochs.

Cut after blocks 3, 6 and 9 of 12; the local head is a LayerNorm and a linear layer on the class token (`classifier`).
Batch 1024 and rate 0.001, no warm-up, as the MAN++ command for eight GPUs. The networks are timm's; the MAN++ code has
one more LayerNorm, in the patch embedding, and its trained branch a second transformer block behind the first.
Nothing is published for these rows that could be found.
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
"""Local loss and momentum network."""


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
