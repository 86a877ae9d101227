"""From a decoded image to what a network takes."""

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
    """Pillow's image to one of the configured size, augmented in training."""
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
    """(B, 3, H, W), from uint8 to float32: (pixel / 255 - mean) / std."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    inputs = images.to(torch.float32, memory_format=memory_format)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        inputs[:, channel].sub_(255 * mean).div_(255 * std)  # numbers, not tensors: no copy to the device
    return inputs


@dataclass(frozen=True)
class Transform:
    """What a run does to an image before its network sees it, when it is tested: callable, and can be pickled."""

    config: DataConfig

    def __call__(self, image: Any) -> Tensor:
        """The input (3, H, W) float32 of one image.

        It is decoded and turned upright, resized and center-cropped as in the run, and normalised. Where the run takes
        images as they are, one of another size is resized by its shorter side and center-cropped.

        Args:
            image: a path, the bytes of a file, or an image of Pillow's.

        Raises:
            BrokenImageError: it is no image.
        """
        return normalise(torch.from_numpy(self.pixels(decode(image)[0]))[None], self.config)[0]

    def pixels(self, image: Image) -> np.ndarray[Any, Any]:
        """(3, H, W) uint8."""
        from torchvision.transforms import v2

        size = self.config.image_size
        if self.config.resize is None and image.size != (size, size):
            image = v2.CenterCrop(size)(v2.Resize(size)(image))
        return np.array(sized(self.config, train=False)(image)).transpose(2, 0, 1).copy()
