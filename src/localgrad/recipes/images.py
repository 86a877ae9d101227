"""Training on a user's own images: a network and settings for photographs in folders, of any size and number."""

from dataclasses import replace

from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.data import config as data

OWN = "images"
"""Name of this config in `localgrad train --data FOLDER`."""


def own_images(source: str = "FOLDER") -> TrainConfig:
    """A config for a folder of images: ResNet-18 in four blocks, DGL+MAN, images resized to 128 pixels.

    The images are prepared as in Imagenette. Splits and classes are found when the images are read. Without a test
    split, 20 % of each class are held out for testing.

    Args:
        source: the folder, which `localgrad train --data` passes.
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
