"""Image sets in memory and streamed, with the same methods and reproducible batches.

A set is either decoded once into one uint8 tensor that may live on the training device (`Images`), or decoded by worker
processes during training (`ImageStream`). Order and augmentation of the batches depend on (seed, epoch, position in the
epoch) alone. They do not depend on the global random state, the number of workers or ranks, or the first batch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from localgrad.data.config import DataConfig, Mode, flag
from localgrad.data.decoding import BrokenImageError, broken, decode, name_of, remarked
from localgrad.data.fingerprint import Fingerprint
from localgrad.data.transform import normalise, sized
from localgrad.errors import LocalGradError, check_rules

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

CHUNK = 256
"""Number of images that are read and decoded at a time."""
NEWS_SECONDS = 10.0
"""Seconds between two reports on the progress of decoding."""


@dataclass(frozen=True, eq=False)
class ImageSet(ABC):
    """Base class of both kinds of sets: `labels` (N,) int64 on the CPU or the set's device, the config, the classes."""

    labels: Tensor
    config: DataConfig
    num_classes: int
    class_names: tuple[str, ...] | None = field(default=None, kw_only=True)
    fingerprint: Fingerprint | None = field(default=None, kw_only=True)
    """Fingerprint of the images before a limit; None if the set was made from tensors."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with batches on `device`."""

    @abstractmethod
    def subset(self, indices: Tensor) -> ImageSet:
        """The set of the images at these positions, `(M,)` int64, in this order."""

    @abstractmethod
    def _read(self, epoch: _Epoch) -> Iterator[tuple[Tensor, Tensor]]: ...

    def num_batches(self, batch_size: int, world_size: int = 1, train: bool = True) -> int:
        """Number of batches of an epoch, with batch_size images on each of world_size ranks (see `batches`)."""
        full, left = divmod(len(self), batch_size * world_size)
        return full + (left >= 2 * world_size if train else left > 0)

    def batch_sizes(
        self, batch_size: int, *, train: bool, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> list[int]:
        """Number of images in each batch that `batches` yields with the same arguments."""
        plan = self._plan(batch_size, train, start, rank, world_size)
        return [len(range(part.start, part.stop, part.step)) for part in plan]

    def _plan(self, batch_size: int, train: bool, start: int, rank: int, world_size: int) -> list[slice]:
        """Positions in the epoch of the images of each batch."""
        step, count = batch_size * world_size, self.num_batches(batch_size, world_size, train)
        slices = (slice(n * step + rank, min((n + 1) * step, len(self)), world_size) for n in range(start, count))
        return [part for part in slices if part.start < part.stop]

    def batches(
        self,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of one epoch, from batch number `start` on.

        In training the images are shuffled and augmented; in testing they come in the order of the data set. A global
        batch has batch_size * world_size images. Rank r gets its images r, r + world_size, r + 2 * world_size, ..., so
        the ranks' batches together are the batch of a single process. The last, shorter batch is kept, except in
        training if a rank would get fewer than two images (BatchNorm cannot train on one): then it is dropped. In
        testing no image is repeated, so later ranks may have no last batch.

        Args:
            batch_size: number of images per batch on each rank.
            train: whether to shuffle and augment.
            seed, epoch: seed of order and augmentation, together; at least 0 each.
            start: number of batches to skip; the others are the same as without skipping.
            rank, world_size: this rank, and the number of ranks that share a global batch.
            device: device of the batches; None for the set's device.
            channels_last: whether inputs have the channels-last memory format.

        Returns:
            Iterator of inputs (B, 3, H, W) float32, normalised, and targets (B,) int64.

        Raises:
            LocalGradError: an argument is out of range, or the training set is too small for a batch. A stream also
                raises it during iteration, for a file that is no image or has the wrong size.
        """
        given = {"batch_size": (batch_size, 1), "world_size": (world_size, 1), "seed": (seed, 0), "epoch": (epoch, 0)}
        rules = [(f"{name}={n}: give at least {least}", n >= least) for name, (n, least) in given.items()]
        check_rules("these batches", rules)
        count = self.num_batches(batch_size, world_size, train)
        rules = [
            (f"rank={rank}: give 0 to world_size - 1 = {world_size - 1}", 0 <= rank < world_size),
            (f"start={start}: give 0 to {count}, the number of batches", 0 <= start <= count),
            (f"training on {len(self)} images: give 2 or more for each of {world_size} ranks", count > 0 or not train),
        ]
        check_rules("these batches", rules)
        plan = self._plan(batch_size, train, start, rank, world_size)
        return self._read(_Epoch(plan, train, seed, epoch, device, channels_last))


@dataclass(frozen=True)
class _Epoch:
    """Checked arguments of `batches`; `plan` has the positions of each batch's images in the epoch."""

    plan: list[slice]
    train: bool
    seed: int
    number: int
    device: torch.device | str | None
    channels_last: bool

    def shuffle(self, length: int) -> tuple[Tensor, torch.Generator]:
        """Indices of the images in the epoch's order (random in training), and the generator for further draws."""
        generator = torch.Generator().manual_seed(_mix(self.seed, self.number))
        return torch.randperm(length, generator=generator) if self.train else torch.arange(length), generator

    def normalise(self, images: Tensor, config: DataConfig) -> Tensor:
        return normalise(images, config, channels_last=self.channels_last)


@dataclass(frozen=True, eq=False)
class Images(ImageSet):
    """A set in memory: `images` (N, 3, H, W) uint8. Crops and flips are vectorised on the images' device."""

    images: Tensor

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> Images:
        indices = indices.to(self.labels.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def _read(self, epoch: _Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        config, home = self.config, self.images.device
        order, generator = epoch.shuffle(len(self))
        padding = config.padding if config.crop == "pad" else 0
        offsets = torch.randint(0, 2 * padding + 1, (len(self), 2), generator=generator).to(home)
        flips = (torch.rand(len(self), generator=generator) < config.flip / 2).to(home)
        order = order.to(home)
        for part in epoch.plan:
            images, labels = self.images[order[part]], self.labels[order[part]]
            if epoch.train:
                images = crop_and_flip(images, offsets[part], flips[part], padding, config.padding_mode)
            device = epoch.device or home
            yield epoch.normalise(images.to(device), config), labels.to(device)


@dataclass(frozen=True, eq=False)
class ImageStream(ImageSet):
    """A set that `config.workers` processes decode during training."""

    rows: datasets.Dataset
    """All rows of the split, in arrow format."""
    column: str
    """Name of the image column."""
    indices: Tensor
    """Positions of the used rows in `rows`, (N,) int64."""
    device: torch.device | str = "cpu"
    """Device of the batches."""

    def to(self, device: torch.device | str) -> ImageStream:
        return replace(self, device=device)

    def subset(self, indices: Tensor) -> ImageStream:
        return replace(self, indices=self.indices[indices], labels=self.labels[indices])

    def _read(self, epoch: _Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = epoch.shuffle(len(self))
        keys = (list(zip(order[part].tolist(), range(len(self))[part], strict=True)) for part in epoch.plan)
        device = torch.device(epoch.device or self.device)
        loader = DataLoader(
            _Samples(self, epoch, sized(self.config, epoch.train)),
            batch_sampler=keys,
            collate_fn=_collate,
            num_workers=self.config.workers,
            pin_memory=device.type == "cuda",
            generator=generator,  # without it the loader would draw the workers' seeds from the global generator
        )
        for batch in loader:
            if isinstance(batch, LocalGradError):  # raised here, since an error in a worker would keep workers alive
                raise batch
            images, labels = batch
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            yield epoch.normalise(images, self.config), labels


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[tuple[Tensor, int] | LocalGradError]):
    """The workers' dataset: from (index, position) to an augmented uint8 image (3, H, W) and its label, or an error."""

    stream: ImageStream
    epoch: _Epoch
    transform: torch.nn.Module

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | LocalGradError:
        (index, position), stream = key, self.stream
        row = int(stream.indices[index])
        item = stream.rows[row : row + 1][stream.column][0].as_py()
        try:
            image, _ = _sized(item, stream.config)
        except BrokenImageError as error:
            split = stream.fingerprint.split if stream.fingerprint else "streamed"
            problem = name_of(item, row, stream.config.source), str(error)
            return broken(split, [problem], len(stream), _advice([problem], stream.config))
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(_mix(self.epoch.seed, self.epoch.number, position))
            pixels = np.array(self.transform(image))
        return torch.from_numpy(pixels.transpose(2, 0, 1)), int(stream.labels[index])


def _collate(samples: list[tuple[Tensor, int] | LocalGradError]) -> list[Tensor] | LocalGradError:
    return next((sample for sample in samples if isinstance(sample, LocalGradError)), None) or default_collate(samples)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int, mode: Mode) -> Tensor:
    """Crop each padded image to its original size at an offset, and flip it horizontally if `flips` is true.

    Pixels are gathered from the unpadded images by (mirrored) coordinates, so no padded copy is made.

    Args:
        images: (B, 3, H, W).
        offsets: (B, 2) int64, top and left edge of the window in the padded image, from 0 to 2 * padding.
        flips: (B,) bool.
        padding: pixels of padding on each side.
        mode: "reflect" (the border is not repeated) or "zeros".

    Returns:
        Images (B, 3, H, W) of the same dtype.
    """
    batch, channels, height, width = images.shape
    across = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device) + offsets[:, :1] - padding
    columns = torch.where(flips[:, None], width - 1 - across, across) + offsets[:, 1:] - padding
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows = (height - 1 - (height - 1 - rows.abs()).abs()).clamp(0, height - 1)
    columns = (width - 1 - (width - 1 - columns.abs()).abs()).clamp(0, width - 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    windows = images.reshape(batch, channels, -1).gather(2, pixels).view(images.shape)
    return windows if mode == "reflect" else windows * inside[:, None]


def _mix(*numbers: int) -> int:
    """A 32-bit seed computed from all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def decode_all(
    rows: datasets.Dataset, column: str, indices: Tensor, config: DataConfig, *, split: str, say: Callable[[str], None]
) -> Tensor:
    """Decode the rows `indices` into images (N, 3, H, W) uint8, without augmentation.

    Decoding uses one thread: more threads would wait for Python's global lock.

    Args:
        rows: all rows of the split, in arrow format.
        column: name of the image column.
        indices: positions of the rows to decode, (N,) int64.
        config: `image_size` and `resize` decide the size.
        split: name of the split in messages.
        say: function that is called with sentences about the progress, and with the `REMARKS` that apply to images.

    Raises:
        LocalGradError: images cannot be used; the message names the first ten and counts the rest.
    """
    chosen, numbers, transform = rows.select(indices.numpy()), indices.tolist(), sized(config, train=False)
    images = _room(len(indices), config.image_size)
    pixels, remarks, problems = images.numpy(), Counter[str](), list[tuple[str, str]]()
    told = begin = time.monotonic()
    for first in range(0, len(indices), CHUNK):
        for place, item in enumerate(chosen[first : first + CHUNK][column].to_pylist(), first):
            try:
                image, own = _sized(item, config)
            except BrokenImageError as error:
                problems.append((name_of(item, numbers[place], config.source), str(error)))
                continue
            remarks.update(own)
            pixels[place] = np.asarray(transform(image)).transpose(2, 0, 1)
        now, done = time.monotonic(), min(first + CHUNK, len(indices))
        if now - told > (NEWS_SECONDS if told > begin else 2.0) and done < len(indices):
            left = (now - begin) * (len(indices) - done) / done
            say(f"decoding {split}: {done:,} of {len(indices):,} images, about {left:.0f} s left")
            told = now
    if problems:
        raise broken(split, problems, len(indices), _advice(problems, config))
    for sentence in remarked(len(indices), remarks, split):
        say(sentence)
    return images


def _advice(problems: list[tuple[str, str]], config: DataConfig) -> str:
    if any("pixels, not" in reason for _, reason in problems):
        size = config.image_size
        return f"Give {flag('resize')} {size}, which resizes and center-crops, or another {flag('image_size')}."
    return "Repair or remove them."


def _room(count: int, size: int) -> Tensor:
    """Allocate an uninitialised tensor (count, 3, size, size) uint8, or raise a LocalGradError with its size."""
    try:
        return torch.empty(count, 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:
        raise LocalGradError(
            f"{count} images of {size} x {size} pixels take {count * 3 * size**2 / 2**30:.0f} GiB, more than there is: "
            f"give fewer ({flag('train_limit')}, {flag('test_limit')}), a smaller {flag('image_size')}, or "
            f"{flag('streaming')}"
        ) from error


def _sized(item: Any, config: DataConfig) -> tuple[Image, set[str]]:
    """Decode an image as `decode` does; without `resize`, refuse another size than `image_size`."""
    image, remarks = decode(item)
    if config.resize is None and image.size != (config.image_size, config.image_size):
        raise BrokenImageError(
            f"{image.height} x {image.width} pixels, not {flag('image_size')} {config.image_size} squared"
        )
    return image, remarks
