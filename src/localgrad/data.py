"""Image sets: one configuration, one loader, two kinds of set with the same methods.

`load(config)` returns a training and a test set. A set is either decoded once into one uint8 tensor that may live on
the training device (`Images`) or decoded by worker processes while training (`ImageStream`). Both give out batches
whose order and augmentation depend on (seed, epoch, position in the epoch) and on nothing else: not on the global
random state, the number of workers, the number of ranks, or on where in the epoch one starts.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

Crop = Literal["none", "pad", "resized"]
Mode = Literal["reflect", "zeros"]

LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels")
"""Preferred names where several columns could hold the label (CIFAR-100 has a fine and a coarse one)."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Image formats to recognise; trying all that Pillow knows takes longer than to decode a small image."""
FOLDER_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}
"""Folder names that mean the split "validation"; every other folder is named like its split."""


@dataclass(frozen=True)
class DataConfig:
    """Which images to train and test on, and how they are prepared; the default is scikit-learn's digits."""

    source: str = "digits"
    """"digits" (ships with scikit-learn), a Hugging Face hub name, or a local folder in any layout of `datasets`."""
    subset: str | None = None
    """Name of the hub configuration; not used for a local folder that declares no configurations."""
    train_split: str = "train"
    """Split to train on; slices such as "train[:5000]" are allowed. Not used by "digits"."""
    test_split: str = "test"
    """Split to test on. Not used by "digits"."""
    image_column: str | None = None
    """Column with the images; None takes the only one of type Image."""
    label_column: str | None = None
    """Column with the integer labels; None takes the only ClassLabel, or an integer column named like a label."""
    num_classes: int | None = None
    """Number of classes; None takes it from the schema, or as the largest label plus one."""
    image_size: int = 32
    """Height and width of the network's input, in pixels."""
    mean: tuple[float, float, float] = (0.305, 0.305, 0.305)
    """Mean of each channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.324, 0.324, 0.324)
    """Standard deviation of each channel, of pixels in [0, 1], that the difference is divided by."""
    crop: Crop = "pad"
    """Random crop in training: none, a window of the padded image, or a random area resized (streaming only)."""
    padding: int = 2
    """Pixels added on each side before the window is cropped (crop="pad")."""
    padding_mode: Mode = "zeros"
    """What the padding holds: the mirrored image (without repeating the border) or black."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    resize: int | None = None
    """Length in pixels to which the shorter side is resized before a center crop; None takes images as they are."""
    train_limit: int | None = None
    """Train on this many images only, equally many of each class, the first of the split; None takes all."""
    test_limit: int | None = None
    """Test on this many images only, chosen in the same way; None takes all."""
    streaming: bool = False
    """Decode while training, in worker processes, instead of once into memory."""
    workers: int = 0
    """Worker processes that decode when streaming; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        least = {"image_size": 1, "padding": 0, "workers": 0, "num_classes": 1, "train_limit": 1, "test_limit": 1}
        values = {name: getattr(self, name) for name in least}
        reflects = self.crop == "pad" and self.padding_mode == "reflect"
        rules = [
            ("source='': give digits, a hub name or a folder", self.source != ""),
            *((f"{key}={n}: give at least {least[key]}", n is None or n >= least[key]) for key, n in values.items()),
            (f"crop={self.crop!r}: choose from {get_args(Crop)}", self.crop in get_args(Crop)),
            (f"padding_mode={self.padding_mode!r}: choose from {get_args(Mode)}", self.padding_mode in get_args(Mode)),
            (f"mean={self.mean}: give 3 numbers", len(self.mean) == 3),
            (f"std={self.std}: give 3 numbers above 0", len(self.std) == 3 and min(self.std) > 0),
            (
                f"padding={self.padding}: reflection allows less than image_size={self.image_size}",
                not reflects or self.padding < self.image_size,
            ),
            (
                f"resize={self.resize}: give at least image_size={self.image_size}, or None",
                self.resize is None or self.resize >= self.image_size,
            ),
            (
                'crop="resized": needs streaming=True, and resize=... for the test images',
                self.crop != "resized" or (self.streaming and self.resize is not None),
            ),
            ('streaming=True: the source "digits" is in memory; give False', not self.streaming or self.on_disk),
        ]
        _raise_all("this data configuration", rules)

    @property
    def on_disk(self) -> bool:
        """Whether the images come from files (and not from scikit-learn)."""
        return self.source != "digits"


def digits() -> DataConfig:
    """scikit-learn's handwritten digits, 32x32, zero pad 2, no flip; needs no download."""
    return DataConfig()


def cifar10(source: str = "uoft-cs/cifar10") -> DataConfig:
    """CIFAR-10, 32x32: reflect pad 4, flip, the means and deviations of the papers' code."""
    return DataConfig(
        source,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        padding=4,
        padding_mode="reflect",
        flip=True,
    )


def svhn(source: str = "ufldl-stanford/svhn") -> DataConfig:
    """SVHN's cropped digits, 32x32, 'train' without 'extra': zero pad 2, no flip, pixels to [-1, 1]."""
    return DataConfig(source, subset="cropped_digits", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def stl10(source: str = "tanganke/stl10") -> DataConfig:
    """STL-10's 10 labelled classes, 96x96: zero pad 4, flip, pixels to [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return DataConfig(source, num_classes=10, image_size=96, mean=half, std=half, padding=4, flip=True)


def imagenet(source: str = "ILSVRC/imagenet-1k") -> DataConfig:
    """ImageNet-1k, streamed: RandomResizedCrop 224 and flip; tests on 'validation', resize 256, center crop 224."""
    return DataConfig(
        source,
        test_split="validation",
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop="resized",
        flip=True,
        resize=256,
        streaming=True,
        workers=8,
    )


def imagenette(source: str = "frgfm/imagenette") -> DataConfig:
    """Imagenette (10 classes of ImageNet) in memory at 128x128: reflect pad 16, flip, ImageNet's normalisation."""
    return replace(
        imagenet(source),
        subset="160px",
        image_size=128,
        crop="pad",
        padding=16,
        padding_mode="reflect",
        resize=128,
        streaming=False,
        workers=0,
    )


@dataclass(frozen=True, eq=False)
class ImageSet(ABC):
    """What both kinds of set have: `labels` (N,) int64 on the CPU or the set's device, `config` and `num_classes`."""

    labels: Tensor
    config: DataConfig
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same set, giving out its batches on `device`."""

    @abstractmethod
    def _read(self, epoch: _Epoch) -> Iterator[tuple[Tensor, Tensor]]: ...

    def num_batches(self, batch_size: int, world_size: int = 1, train: bool = True) -> int:
        """Batches of an epoch, with batch_size images on each of world_size ranks (see `batches`)."""
        full, left = divmod(len(self), batch_size * world_size)
        return full + (left >= 2 * world_size if train else left > 0)

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
        """Batches number `start` and later of one epoch.

        In training the set is shuffled and augmented; otherwise it comes in the order of the file. A global batch has
        batch_size * world_size images, and rank r takes its r-th, (r + world_size)-th, ... image, so that the ranks'
        batches together are the batch that one process would have. The last, shorter batch is kept, except in training
        where it would leave a rank a single image or none (BatchNorm cannot train on one): then it is dropped.
        In testing no image is given out twice, so the last batch may be missing on the later ranks.

        Args:
            batch_size: images of a batch on each rank.
            train: whether to shuffle and augment.
            seed, epoch: what the order and the augmentation are computed from; at least 0.
            start: number of batches to leave out; the others stay exactly as they were.
            rank, world_size: the slice of each global batch to give out.
            device: where the batches go; None takes the set's device.
            channels_last: memory format of the inputs.

        Returns:
            Iterator of inputs (B, 3, H, W) float32, normalised, and targets (B,) int64.

        Raises:
            LocalGradError: an argument out of range, or a training set that leaves no batch; from a stream also, when
                its turn comes, a file that is no image or has the wrong size.
        """
        given = {"batch_size": (batch_size, 1), "world_size": (world_size, 1), "seed": (seed, 0), "epoch": (epoch, 0)}
        rules = [(f"{name}={n}: give at least {least}", n >= least) for name, (n, least) in given.items()]
        _raise_all("these batches", rules)
        count = self.num_batches(batch_size, world_size, train)
        rules = [
            (f"rank={rank}: give 0 to world_size - 1 = {world_size - 1}", 0 <= rank < world_size),
            (f"start={start}: give 0 to {count}, the number of batches", 0 <= start <= count),
            (f"training on {len(self)} images: give 2 or more for each of {world_size} ranks", count > 0 or not train),
        ]
        _raise_all("these batches", rules)
        step = batch_size * world_size
        slices = (slice(n * step + rank, min((n + 1) * step, len(self)), world_size) for n in range(start, count))
        plan = [part for part in slices if part.start < part.stop]
        return self._read(_Epoch(plan, train, seed, epoch, device, channels_last))


@dataclass(frozen=True)
class _Epoch:
    """Checked arguments of `batches`, with the positions in the epoch of each batch."""

    plan: list[slice]
    train: bool
    seed: int
    number: int
    device: torch.device | str | None
    channels_last: bool

    def shuffle(self, length: int) -> tuple[Tensor, torch.Generator]:
        """Index of the image at each position, and the generator for what else is drawn for the epoch."""
        generator = torch.Generator().manual_seed(_mix(self.seed, self.number))
        return torch.randperm(length, generator=generator) if self.train else torch.arange(length), generator

    def normalise(self, images: Tensor, config: DataConfig) -> Tensor:
        """(B, 3, H, W), from uint8 to float32: (pixel / 255 - mean) / std."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        inputs = images.to(torch.float32, memory_format=memory_format)
        for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
            inputs[:, channel].sub_(255 * mean).div_(255 * std)  # numbers, not tensors: no copy to the device
        return inputs


@dataclass(frozen=True, eq=False)
class Images(ImageSet):
    """A set in memory: `images` (N, 3, H, W) uint8. Crops and flips are vectorised on their device."""

    images: Tensor

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

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
    """A set decoded while training, by `config.workers` processes: `rows` of `datasets`, as arrow, of the split.

    `column` is that of the images, `indices` (N,) are the rows in use, `device` is where batches go.
    """

    rows: datasets.Dataset
    column: str
    indices: Tensor
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> ImageStream:
        return replace(self, device=device)

    def _read(self, epoch: _Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = epoch.shuffle(len(self))
        keys = (list(zip(order[part].tolist(), range(len(self))[part], strict=True)) for part in epoch.plan)
        device = torch.device(epoch.device or self.device)
        loader = DataLoader(
            _Samples(self, epoch, _transform(self.config, epoch.train)),
            batch_sampler=keys,
            collate_fn=_collate,
            num_workers=self.config.workers,
            pin_memory=device.type == "cuda",
            generator=generator,  # else the loader would draw its workers' seeds from the global one
        )
        for batch in loader:
            if isinstance(batch, LocalGradError):  # raised here, where it does not keep the loader's workers alive
                raise batch
            images, labels = batch
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            yield epoch.normalise(images, self.config), labels


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[tuple[Tensor, int] | LocalGradError]):
    """What the workers read: (index, position) -> augmented uint8 image (3, H, W) and its label, or what is wrong."""

    stream: ImageStream
    epoch: _Epoch
    transform: torch.nn.Module

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | LocalGradError:
        (index, position), stream = key, self.stream
        row = int(stream.indices[index])
        try:
            image = _decode(stream.rows[row : row + 1][stream.column][0].as_py(), row, stream.rows, stream.config)
        except LocalGradError as error:
            return error
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(_mix(self.epoch.seed, self.epoch.number, position))
            pixels = np.array(self.transform(image))
        return torch.from_numpy(pixels.transpose(2, 0, 1)), int(stream.labels[index])


def _collate(samples: list[tuple[Tensor, int] | LocalGradError]) -> list[Tensor] | LocalGradError:
    return next((sample for sample in samples if isinstance(sample, LocalGradError)), None) or default_collate(samples)


def load(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """The training and the test set of a configuration.

    Args:
        config: what to load.

    Returns:
        Training and test set, on the CPU, with the same number of classes.

    Raises:
        LocalGradError: a folder, hub name, split or column that is not there, a label outside the classes, images of
            unequal or wrong size (without `resize`), a file that is no image, a limit above the size of the set.
    """
    if not config.on_disk:
        return _load_digits(config)
    both = _load_rows(config)
    image_column, label_column = _find_columns(both[0].features, config)
    labels = [_read_labels(rows, label_column) for rows in both]
    schema = getattr(both[0].features[label_column], "num_classes", None)
    num_classes = config.num_classes or schema or int(torch.cat(labels).max()) + 1

    def build(rows: datasets.Dataset, labels: Tensor, limit_name: str) -> ImageSet:
        _check_labels(labels, num_classes, str(rows.split))
        indices = balanced(labels, getattr(config, limit_name), limit_name)
        kept, rows = labels[indices], rows.select_columns(image_column).with_format("arrow")
        if config.streaming:
            return ImageStream(kept, config, num_classes, rows, image_column, indices)
        return Images(kept, config, num_classes, _decode_all(rows, image_column, indices, config))

    return build(both[0], labels[0], "train_limit"), build(both[1], labels[1], "test_limit")


def balanced(labels: Tensor, limit: int | None, name: str = "limit") -> Tensor:
    """Indices, ascending, of `limit` samples with counts per class as equal as possible, the first of the file.

    Args:
        labels: (N,) int64.
        limit: number of samples to take; None takes all.
        name: what to call the limit in an error.

    Raises:
        LocalGradError: the limit is larger than the set.
    """
    if limit is None:
        return torch.arange(len(labels))
    if limit > len(labels):
        raise LocalGradError(f"{name}={limit}: the set has {len(labels)} images; give at most that, or None")
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(labels)  # how many of its class come before each sample
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return turn.argsort(stable=True)[:limit].sort().values


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int, mode: Mode) -> Tensor:
    """A window of each padded image, of the size of the image, mirrored where `flips` says so.

    The window is gathered from the image itself by (mirrored) coordinates, so nothing is padded.

    Args:
        images: (B, 3, H, W).
        offsets: (B, 2) int64, top and left corner of the window in the padded image, from 0 to 2 * padding.
        flips: (B,) bool.
        padding: pixels on each side.
        mode: "reflect" (without the border) or "zeros".

    Returns:
        (B, 3, H, W) of the same type.
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


def _raise_all(what: str, rules: list[tuple[str, bool]]) -> None:
    problems = [problem for problem, holds in rules if not holds]
    if problems:
        raise LocalGradError(f"{what} cannot be used: " + "; ".join(problems))


def _mix(*numbers: int) -> int:
    """One seed of 32 bits that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _load_digits(config: DataConfig) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(small).float().view(-1, 1, 8, 8) * (255 / 16)
    size = (config.image_size, config.image_size)
    images = torch.nn.functional.interpolate(pixels, size, mode="bilinear").round().to(torch.uint8)
    images, targets = images.expand(-1, 3, -1, -1), torch.from_numpy(labels).long()
    num_classes = config.num_classes or 10
    _check_labels(targets, num_classes, "digits")
    parts = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)

    def build(part: Tensor, limit_name: str) -> Images:
        chosen = part[balanced(targets[part], getattr(config, limit_name), limit_name)]
        return Images(targets[chosen], config, num_classes, images[chosen].contiguous())

    train, test = (torch.from_numpy(part) for part in parts)
    return build(train, "train_limit"), build(test, "test_limit")


def _load_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    import datasets

    folder = Path(config.source).expanduser()
    local = folder.is_dir()
    if not local and (config.source[:1] in "./~" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source)):
        parent = next(path for path in folder.absolute().parents if path.is_dir())
        exists = sorted(path.name for path in parent.iterdir() if path.is_dir())
        raise LocalGradError(f"source={config.source!r} is not a folder; {parent} has the folders {exists}")
    offline = not local and not _hub_answers()
    try:
        with _quiet(offline):
            where = _local_arguments(folder, config) if local else {"path": config.source, "name": config.subset}
            train, test = datasets.load_dataset(**where, split=[config.train_split, config.test_split])
    except Exception as error:  # whatever it is, the set cannot be had
        why = " ".join(f"{error} {error.__cause__ or ''}".split())
        if offline:
            why = f"no such folder, not in the cache, and the Hugging Face hub cannot be reached ({why})"
        raise LocalGradError(
            f"source={config.source!r} (subset={config.subset!r}, train_split={config.train_split!r}, "
            f"test_split={config.test_split!r}) cannot be loaded: {why}; give a local folder, or a hub name and a "
            "connection, and splits that it has"
        ) from error
    return train, test


def _local_arguments(folder: Path, config: DataConfig) -> dict[str, Any]:
    """What `load_dataset` is given for a folder.

    Left to itself it finds splits by words anywhere in a path, so that class "test_bench" in train/ would be tested on.
    A folder with a subfolder for each split is therefore spelled out.
    """
    import datasets

    splits = {FOLDER_SPLITS.get(path.name, path.name): path.name for path in sorted(folder.iterdir()) if path.is_dir()}
    wanted = dict.fromkeys(re.findall(r"(?:^|\+)(\w+)", f"{config.train_split}+{config.test_split}"))
    if wanted.keys() <= splits.keys():
        return {"path": str(folder), "data_files": {split: f"{splits[split]}/**" for split in wanted}}
    declared = config.subset and datasets.get_dataset_config_names(str(folder)) != ["default"]
    return {"path": str(folder), "name": config.subset if declared else None}


def _hub_answers() -> bool:
    """One request: `load_dataset` by itself retries for half a minute and then looks into its cache."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of a class that depends on the version and on offline mode
        return False
    return True


@contextmanager
def _quiet(offline: bool) -> Iterator[None]:
    """Without the progress bars of `datasets`, and only with its cache if offline; the user's settings come back."""
    import datasets
    from datasets import config as settings

    bars = settings.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled()
    before = settings.HF_HUB_OFFLINE
    if bars:
        datasets.disable_progress_bars()
    settings.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before
        if bars:
            datasets.enable_progress_bars()


def _find_columns(features: datasets.Features, config: DataConfig) -> tuple[str, str]:
    """Names of the image and of the label column."""
    import datasets

    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name, feature in features.items() if "int" in str(getattr(feature, "dtype", None))]
    named = [name for name in classes or numbers if name in LABEL_NAMES]
    found = classes if len(classes) == 1 else named
    return (
        _choose("image_column", config.image_column, pictures, pictures, features),
        _choose("label_column", config.label_column, [*classes, *numbers], found, features),
    )


def _choose(field: str, given: str | None, allowed: list[str], found: list[str], features: datasets.Features) -> str:
    if given is None and len(found) == 1:
        return found[0]
    if given not in allowed:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        raise LocalGradError(f"{field}={given!r}: choose from {allowed}; the columns of the set are {kinds}")
    return given


def _read_labels(rows: datasets.Dataset, column: str) -> Tensor:
    """All labels of a split, (N,) int64; no image is read."""
    labels = rows.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    if labels.null_count:
        first = labels.is_null().to_pylist().index(True)
        raise LocalGradError(f"{rows.split} image {first} has no label in column {column!r}; leave such rows out")
    return torch.from_numpy(labels.to_numpy(zero_copy_only=False).astype(np.int64))


def _check_labels(labels: Tensor, num_classes: int, split: str) -> None:
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise LocalGradError(
            f"{split} image {first} has label {int(labels[first])}: labels go from 0 to num_classes - 1 = "
            f"{num_classes - 1} ({len(wrong)} of {len(labels)} do not); set num_classes, or leave such rows out"
        )


def _decode_all(rows: datasets.Dataset, column: str, indices: Tensor, config: DataConfig) -> Tensor:
    """Images (N, 3, H, W) uint8 of the rows `indices`; one thread, for more only wait for Python's lock here."""
    chosen, numbers, transform = rows.select(indices.numpy()), indices.tolist(), _transform(config, train=False)
    images = torch.empty(len(indices), 3, config.image_size, config.image_size, dtype=torch.uint8)
    pixels, chunk = images.numpy(), 256
    for first in range(0, len(indices), chunk):
        for place, item in enumerate(chosen[first : first + chunk][column].to_pylist(), first):
            pixels[place] = np.asarray(transform(_decode(item, numbers[place], rows, config))).transpose(2, 0, 1)
    return images


def _decode(item: dict[str, Any] | None, row: int, rows: datasets.Dataset, config: DataConfig) -> Image:
    """The RGB image of encoded bytes, or of the path to a file; of the configured size unless it will be resized."""
    from PIL import Image

    item = item or {}
    try:
        file = io.BytesIO(item["bytes"]) if item.get("bytes") else item["path"]
        image = Image.open(file, formats=FORMATS).convert("RGB")
    except Exception as error:  # of many classes, by format
        name = f"{rows.split} image {row} (path {item.get('path')!r})"
        raise LocalGradError(f"{name} cannot be decoded: {error!r}; repair it or leave it out") from error
    if config.resize is None and image.size != (config.image_size, config.image_size):
        raise LocalGradError(
            f"{rows.split} image {row} has {image.height} x {image.width} pixels (height x width), and image_size="
            f"{config.image_size} takes only such squares; set image_size, or set resize to resize and center-crop"
        )
    return image


def _transform(config: DataConfig, train: bool) -> torch.nn.Module:
    """PIL image -> PIL image of the configured size, augmented in training."""
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
