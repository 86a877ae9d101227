"""What tells two sets of images apart: how many, of which classes, and a checksum of a fixed sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 32
"""Number of images whose files go into the checksum, at even distances."""


@dataclass(frozen=True)
class Fingerprint:
    """Of one part of a set, before a limit."""

    split: str
    """The split that was read, by its own name; the same images may be called otherwise elsewhere."""
    images: int
    classes: int
    checksum: str
    """SHA-256 over all labels and the encoded files of the sample, in hexadecimal."""

    def difference(self, other: Fingerprint) -> str | None:
        """What this one has that the other has not, in words; None where both are of the same images."""
        if (self.images, self.classes) != (other.images, other.classes):
            return f"{self.images:,} in {self.classes} classes, not {other.images:,} in {other.classes}"
        if self.checksum != other.checksum:
            return f"{self.images:,}, but others or in another order (a checksum of labels and {SAMPLE} images differs)"
        return None


def fingerprint(split: str, labels: Tensor, encoded: Callable[[Sequence[int]], list[bytes]]) -> Fingerprint:
    """The fingerprint of a part.

    Args:
        split: its name.
        labels: (N,) int64.
        encoded: gives the files of images by their positions.
    """
    digest = hashlib.sha256(labels.contiguous().numpy().tobytes())
    for data in encoded(sample_positions(len(labels))):
        digest.update(len(data).to_bytes(8, "little") + data)
    return Fingerprint(split, len(labels), len(labels.unique()), digest.hexdigest())


def sample_positions(count: int) -> list[int]:
    """Up to `SAMPLE` positions from 0 to count - 1, at even distances."""
    return torch.linspace(0, count - 1, min(SAMPLE, count), dtype=torch.float64).round().long().tolist()
