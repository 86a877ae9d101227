"""Initialisation of layers: convolutions as in all released code, other layers by their own reset method."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def initialise(module: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (k * k * C_out)) (He et al. 2015, fan-out), as all released code does.

    Linear layers and biases keep PyTorch's defaults, norms keep weight 1 and bias 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def draw_anew(layers: Sequence[nn.Module]) -> None:
    """Reset each layer that has a reset method, then draw the convolutions among them as `initialise` does."""
    for layer in layers:
        # nn.MultiheadAttention's method begins with an underscore
        reset: Any = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            initialise(layer)
