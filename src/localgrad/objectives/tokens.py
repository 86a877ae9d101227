"""Shift token labels by one position for next-token losses, and check whether a batch needs it."""

import torch.nn.functional as F
from torch import Tensor

from localgrad.errors import LocalGradError


def shifted(targets: Tensor, ignore_index: int) -> Tensor:
    """Shift labels `(N, L)` that repeat the inputs: each position gets the next token, the last gets `ignore_index`."""
    return F.pad(targets[:, 1:], (0, 1), value=ignore_index)


def check_shift(targets: Tensor, inputs: object, shift: bool, ignore_index: int, objective: str) -> None:
    """Refuse a `shift` that contradicts the batch. Inputs that are no token ids are not checked.

    Labels that repeat the inputs must be shifted, or a block would learn to copy its input. Other labels must not be
    shifted, or it would learn the token after the intended one. It reads values from the device, so call it once.
    """
    if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.shape != targets.shape or inputs.is_meta:
        return
    counted = targets != ignore_index
    if not counted.any() or inputs.min() == inputs.max():
        return
    repeats = bool((targets == inputs)[counted].all())
    if shift and not repeats:
        raise LocalGradError(
            f"{objective} has shift=True and the labels differ from the input tokens at the same positions, so they "
            f"are shifted already or are no next tokens: give {objective}(..., shift=False)"
        )
    if repeats and not shift:
        raise LocalGradError(
            f"{objective} has shift=False and the labels repeat the input tokens, which a block would learn to copy: "
            f"give {objective}(..., shift=True) to predict the token after each"
        )
