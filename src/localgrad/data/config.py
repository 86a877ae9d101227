"""The config of the images, and one function for each known data set that returns its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Literal, get_args

from localgrad.errors import check_rules

Crop = Literal["none", "pad", "resized"]
Mode = Literal["reflect", "zeros"]
MAX_IMAGE_SIZE = 4096
"""Largest height and width in pixels; more is taken for a mistake, since it needs more memory than a machine has."""


@dataclass(frozen=True)
class DataConfig:
    """The images to train and test on, and their preparation; the default is scikit-learn's digits."""

    source: str = "digits"
    """Folder with images in SPLIT/CLASS/ or with tables, a table file, a hub name OWNER/NAME, or "digits"."""
    subset: str | None = None
    """Configuration of a hub data set; ignored for a local folder that declares no configurations."""
    train_split: str = "train"
    """Split to train on; slices such as "train[:5000]" are allowed, but not of "digits"."""
    test_split: str = "test"
    """Split to test on, or a slice of it; "test" also finds testing, validation, val, valid and dev, in this order."""
    validation_split: str | None = None
    """Split on which --keep-best and --patience compare epochs; None takes the test images."""
    image_column: str | None = None
    """Column with the images, their bytes or their paths; None takes the only such column."""
    label_column: str | None = None
    """Column with the labels: ClassLabel, whole numbers or names; None takes the only ClassLabel, or a usual name."""
    num_classes: int | None = None
    """Number of classes; None takes the number of class names, or the largest label plus one."""
    image_size: int = 32
    """Height and width of the network's input, in pixels."""
    mean: tuple[float, float, float] = (0.305, 0.305, 0.305)
    """Mean of each channel for normalisation, of pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.324, 0.324, 0.324)
    """Standard deviation of each channel for normalisation, of pixels in [0, 1]."""
    crop: Crop = "pad"
    """Random crop in training: none, pad (of the padded image), or resized (RandomResizedCrop, for streaming only)."""
    padding: int = 2
    """Pixels of padding on each side before a random crop (crop="pad")."""
    padding_mode: Mode = "zeros"
    """Values of the padding: black, or the mirrored image without its border."""
    flip: bool = False
    """Flip training images horizontally with probability 0.5."""
    resize: int | None = None
    """Resize the shorter side to this many pixels, then crop the center; None requires images of the input's size."""
    train_limit: int | None = None
    """Train on this many images only: the first of each class, as evenly as possible; None takes all."""
    test_limit: int | None = None
    """Test on this many images only, chosen in the same way; None takes all."""
    test_fraction: float | None = None
    """Fraction of each class to hold out for testing if the data set has no test split, such as 0.2."""
    split_seed: int = 0
    """Seed of the choice of held-out images."""
    name: str | None = None
    """Name of the images in tables and reports; None takes the last part of the source."""
    streaming: bool = False
    """Decode images during training, in worker processes, instead of once into memory."""
    workers: int = 0
    """Number of worker processes for --data.streaming; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        least = {"image_size": 1, "padding": 0, "workers": 0, "num_classes": 1, "train_limit": 1, "test_limit": 1}
        least["split_seed"] = 0
        values = {name: getattr(self, name) for name in least}
        reflects = self.crop == "pad" and self.padding_mode == "reflect"
        size, most = self.image_size, MAX_IMAGE_SIZE
        rules = [
            ("--data '': give digits, a folder or a hub name", self.source != ""),
            *(
                (f"{flag(key)} {n}: give at least {least[key]}", n is None or n >= least[key])
                for key, n in values.items()
            ),
            (f"{flag('image_size')} {size}: give at most {most}", size <= most),
            (f"{flag('padding')} {self.padding}: give at most {most}", self.padding <= most),
            (f"{flag('crop')} {self.crop}: choose from {', '.join(get_args(Crop))}", self.crop in get_args(Crop)),
            (
                f"{flag('padding_mode')} {self.padding_mode}: choose from {', '.join(get_args(Mode))}",
                self.padding_mode in get_args(Mode),
            ),
            (f"{flag('mean')} {self.mean}: give 3 numbers", len(self.mean) == 3 and all(map(isfinite, self.mean))),
            (
                f"{flag('std')} {self.std}: give 3 numbers above 0",
                len(self.std) == 3 and all(0 < value < inf for value in self.std),
            ),
            (
                f"{flag('padding')} {self.padding}: reflection allows less than {flag('image_size')} {size}",
                not reflects or self.padding < size,
            ),
            (
                f"{flag('resize')} {self.resize}: give at least {flag('image_size')} {size}, or None",
                self.resize is None or self.resize >= size,
            ),
            (
                f"{flag('crop')} resized: needs {flag('streaming')}, and {flag('resize')} for the test images",
                self.crop != "resized" or (self.streaming and self.resize is not None),
            ),
            (f"{flag('streaming')}: the digits are in memory; leave it out", not self.streaming or self.on_disk),
            (
                f"{flag('test_fraction')} {self.test_fraction}: give more than 0 and less than 1",
                self.test_fraction is None or 0 < self.test_fraction < 1,
            ),
        ]
        check_rules("this data configuration", rules)

    @property
    def on_disk(self) -> bool:
        """Whether the images come from files or from the hub, and not from scikit-learn."""
        return self.source != "digits"


def digits() -> DataConfig:
    """scikit-learn's handwritten digits, 32x32: zero padding of 2 pixels, no flip; needs no download."""
    return DataConfig()


def cifar10(source: str = "uoft-cs/cifar10") -> DataConfig:
    """CIFAR-10, 32x32: reflection padding of 4 pixels, flip, mean and standard deviation of the papers' code."""
    return DataConfig(
        source,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        padding=4,
        padding_mode="reflect",
        flip=True,
    )


def svhn(source: str = "ufldl-stanford/svhn") -> DataConfig:
    """SVHN's cropped digits, 32x32, without 'extra': zero padding of 2 pixels, no flip, pixels scaled to [-1, 1]."""
    return DataConfig(source, subset="cropped_digits", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def stl10(source: str = "tanganke/stl10") -> DataConfig:
    """STL-10's labelled images, 96x96, 10 classes: zero padding of 4 pixels, flip, pixels scaled to [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return DataConfig(source, num_classes=10, image_size=96, mean=half, std=half, padding=4, flip=True)


def imagenet(source: str = "ILSVRC/imagenet-1k") -> DataConfig:
    """ImageNet-1k, streamed: RandomResizedCrop(224), flip; tests on 'validation' with Resize(256), CenterCrop(224)."""
    return DataConfig(
        source,
        test_split="validation",
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop="resized",
        flip=True,
        resize=256,
        streaming=True,
        workers=8,
    )


def imagenette(source: str = "frgfm/imagenette") -> DataConfig:
    """Imagenette (10 ImageNet classes), in memory, 128x128: reflection padding of 16, flip, normalised as ImageNet."""
    return replace(
        imagenet(source),
        subset="160px",
        image_size=128,
        crop="pad",
        padding=16,
        padding_mode="reflect",
        resize=128,
        streaming=False,
        workers=0,
    )


def flag(name: str) -> str:
    """The flag of a field of `DataConfig`, such as `--data.image-size`."""
    return "--data" if name == "source" else f"--data.{name.replace('_', '-')}"
