"""The decoders of InfoPro: from features to logits of the image."""

import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.objectives import fast
from localgrad.objectives.layout import conv_norm_relu

MAX_DIRECT_CHANNELS = 64


WIDTH = 12


def decoder(channels: int, size: tuple[int, int], image: tuple[int, int], image_channels: int) -> nn.Module:
    """A module from features `(N, channels, *size)` to logits `(N, image_channels, *image)`.

    Up to 64 channels it upsamples to the image's size, and has two 3x3 convolutions, to 12 channels and to those of the
    image (the released CIFAR decoder).

    For more channels it has one convolution for each doubling from the features' size to the image's, four at most, and
    upsampling after each; with more doublings the first upsampling is larger. The widths are a quarter of the channels
    (192 at most), then 64, 32 and 12; fewer doublings keep only the last of these three. The first convolution and the
    one to 64 channels are 1x1, the others 3x3. A 3x3 convolution to the image's channels follows. At 512 x 28 x 28 and
    1024 x 14 x 14 this is the released ImageNet decoder.
    """
    if channels <= MAX_DIRECT_CHANNELS:
        return DirectDecoder(channels, size, image, image_channels)
    doublings = max(1, (max(image[0] // size[0], 1)).bit_length() - 1)
    widths = [min(channels // 4, 192), *{1: [], 2: [12], 3: [32, 12]}.get(doublings, [64, 32, 12])]
    doublings = len(widths)
    layers: list[nn.Module] = []
    for step, width in enumerate(widths, 1):
        kernel = 1 if step == 1 or width == 64 else 3
        bigger = (image[0] >> (doublings - step), image[1] >> (doublings - step))
        layers += [*conv_norm_relu(channels, width, kernel, bias=True), nn.UpsamplingBilinear2d(bigger)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, image_channels, 3, padding=1))


class DirectDecoder(nn.Module):
    """Upsampling to the image's size (bilinear, corners aligned) and two 3x3 convolutions with batch norm and ReLU."""

    def __init__(self, channels: int, size: tuple[int, int], image: tuple[int, int], image_channels: int) -> None:
        super().__init__()
        self.upsample = nn.Identity() if size == image else nn.UpsamplingBilinear2d(image)
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.last = nn.Conv2d(WIDTH, image_channels, 3, padding=1)
        self.upsampled_first = fast.UpsampledConv(self.first, size, image)

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, h, w)` to logits `(N, image_channels, H, W)`."""
        if fast.is_on_cpu(features):
            convolves_first = self.upsampled_first.is_worthwhile
            hidden = self.upsampled_first(features) if convolves_first else self.first(self.upsample(features))
            hidden = fast.norm_of_few_channels(self.norm, hidden, like=features)
        else:
            hidden = self.norm(self.first(self.upsample(features)))
        return self.last(F.relu(hidden, inplace=True))
