"""Transform decoded images into inputs of a network: resize, crop, augment, normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from localgrad.data.config import DataConfig
from localgrad.data.decoding import decode

if TYPE_CHECKING:
    from PIL.Image import Image


def sized(config: DataConfig, train: bool) -> torch.nn.Module:
    """Transform from a Pillow image to one of `image_size`: resize and crop, in training with random crop and flip."""
    from torchvision.transforms import v2

    size, steps = config.image_size, []
    if train and config.crop == "resized":
        steps += [v2.RandomResizedCrop(size)]
    elif config.resize is not None:
        steps += [v2.Resize(config.resize), v2.CenterCrop(size)]
    if train and config.crop == "pad":
        mode = "constant" if config.padding_mode == "zeros" else "reflect"
        steps += [v2.RandomCrop(size, padding=config.padding, padding_mode=mode)]
    if train and config.flip:
        steps += [v2.RandomHorizontalFlip()]
    return torch.nn.Sequential(*steps)


def normalise(images: Tensor, config: DataConfig, *, channels_last: bool = False) -> Tensor:
    """Normalise images (B, 3, H, W) from uint8 to float32: (pixel / 255 - mean) / std."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    inputs = images.to(torch.float32, memory_format=memory_format)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        inputs[:, channel].sub_(255 * mean).div_(255 * std)  # Python numbers need no copy to the device
    return inputs


@dataclass(frozen=True)
class Transform:
    """The preparation of a test image in a run, as a callable that can be pickled."""

    config: DataConfig

    def __call__(self, image: Any) -> Tensor:
        """Make the network's input (3, H, W) float32 from one image.

        The image is decoded, rotated by its EXIF data, resized and center-cropped as in the run, and normalised. If the
        run has no `resize`, an image of another size is resized by its shorter side and center-cropped.

        Args:
            image: a path, the bytes of a file, or a Pillow image.

        Raises:
            BrokenImageError: the argument is no image.
        """
        return normalise(torch.from_numpy(self.pixels(decode(image)[0]))[None], self.config)[0]

    def pixels(self, image: Image) -> np.ndarray[Any, Any]:
        """The resized and center-cropped pixels of a Pillow image, (3, H, W) uint8."""
        from torchvision.transforms import v2

        size = self.config.image_size
        if self.config.resize is None and image.size != (size, size):
            image = v2.CenterCrop(size)(v2.Resize(size)(image))
        return np.array(sized(self.config, train=False)(image)).transpose(2, 0, 1).copy()
