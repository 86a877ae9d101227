"""Initialisation of convolutions, as all released code has it."""

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (k * k * C_out)) (He et al. 2015, fan-out), as all released code does.

    Linear layers and biases keep PyTorch's defaults, norms keep weight 1 and bias 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
