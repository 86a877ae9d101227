"""The CIFAR ResNets of the papers, with torchvision's module names."""

from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.errors import LocalGradError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes (option B of He et al.)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`."""
        shortcut = features if self.downsample is None else self.downsample(features)
        residual = self.relu(self.bn1(self.conv1(features)))
        return self.relu(self.bn2(self.conv2(residual)) + shortcut)


class CifarResNet(nn.Module):
    """A stem of 16 channels, three stages of 16, 32 and 64 channels, and a linear classifier; see `cifar_resnet`."""

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(N, 3, H, W)` to `(N, num_classes)`."""
        features = self.relu(self.bn1(self.conv1(inputs)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.avgpool(features).flatten(1))


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


def cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """ResNet for 32x32 images (He et al. 2016, section 4.2): depth 6n + 2, stages of 16, 32 and 64 channels.

    With 10 classes ResNet-32 has 466,906 parameters and ResNet-110 1,730,714.

    Args:
        depth: 8, 14, 20, 26, 32, 44, 56, 110, ...
        num_classes: width of the output.

    Raises:
        LocalGradError: `depth` is not 6n + 2 with n >= 1, or `num_classes` is less than 1.
    """
    if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        raise LocalGradError(f"depth is {depth!r}: a CIFAR ResNet has depth 6n + 2, such as 8, 14, 20, 32, 56 or 110")
    if num_classes < 1:
        raise LocalGradError(f"num_classes is {num_classes}: it must be at least 1")
    return CifarResNet((depth - 2) // 6, num_classes)


def small_stem(model: nn.Module) -> nn.Module:
    """Replace a ResNet's stem (7x7 convolution, max pool) by a 3x3 convolution of stride 2, for small images.

    Images of 64 pixels enter the first stage with 32 pixels; with the original stem they would have 16.

    Args:
        model: a ResNet with `conv1` (3 to C channels) and `maxpool`, such as torchvision's; changed in place.

    Returns:
        The same model.

    Raises:
        LocalGradError: the model has no `conv1` and `maxpool`.
    """
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.MaxPool2d):
        raise LocalGradError(
            f"a {type(model).__name__} has no conv1 and maxpool: small_stem takes a torchvision ResNet"
        )
    small = nn.Conv2d(3, conv.out_channels, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = small, nn.Identity()
    return model
