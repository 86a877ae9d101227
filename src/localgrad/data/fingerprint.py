"""Fingerprint of a set of images: number of images and classes, and a checksum of labels and a fixed sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 32
"""Number of evenly spaced images whose files are part of the checksum."""


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of the training or the test images of a data set, before `train_limit` or `test_limit`."""

    split: str
    """Name of the split. It is not compared: the same images may have another name elsewhere."""
    images: int
    classes: int
    checksum: str
    """SHA-256 over all labels and the encoded files of the sample, in hexadecimal."""

    def difference(self, other: Fingerprint) -> str | None:
        """How this set differs from the other one, in words; None if number, classes and checksum are equal."""
        if (self.images, self.classes) != (other.images, other.classes):
            return f"{self.images:,} in {self.classes} classes, not {other.images:,} in {other.classes}"
        if self.checksum != other.checksum:
            return f"{self.images:,}, but others or in another order (a checksum of labels and {SAMPLE} images differs)"
        return None


def fingerprint(split: str, labels: Tensor, encoded: Callable[[Sequence[int]], list[bytes]]) -> Fingerprint:
    """Compute the fingerprint of a set of images.

    Args:
        split: name of the split.
        labels: class indices, (N,) int64.
        encoded: function from positions of images to the bytes of their files.
    """
    digest = hashlib.sha256(labels.contiguous().numpy().tobytes())
    for data in encoded(sample_positions(len(labels))):
        digest.update(len(data).to_bytes(8, "little") + data)
    return Fingerprint(split, len(labels), len(labels.unique()), digest.hexdigest())


def sample_positions(count: int) -> list[int]:
    """Up to `SAMPLE` evenly spaced positions from 0 to count - 1."""
    return torch.linspace(0, count - 1, min(SAMPLE, count), dtype=torch.float64).round().long().tolist()
