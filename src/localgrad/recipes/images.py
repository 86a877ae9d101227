"""One's own images: a network and settings that do for photographs in folders, of any size and number."""

from dataclasses import replace

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data

OWN = "images"
"""What `localgrad train --data FOLDER` calls it."""


def own_images(source: str = "FOLDER") -> TrainConfig:
    """A ResNet-18 in four blocks, DGL with momentum networks, images of 128 pixels, a fifth of them held back.

    The settings are Imagenette's; what the images have of splits and classes is found when they are read.

    Args:
        source: the folder; `localgrad train --data` puts it there.
    """
    images = replace(data.imagenette(source), subset=None, test_split="test", test_fraction=0.2)
    return TrainConfig(
        name=OWN,
        model=ModelConfig("torchvision:resnet18"),
        data=images,
        cuts=("layer2.0", "layer3.0", "layer4.0"),
        objective=ObjectiveConfig("dgl", head="light"),
        momentum=MomentumConfig("man", decay=0.995),
        optim=OptimConfig(lr=0.05, batch_size=64, epochs=30, warmup_epochs=0, first_epoch=0),
    )
