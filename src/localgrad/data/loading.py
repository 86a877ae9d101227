"""Load the training and the test set of a config, and report in words what was left out, chosen or guessed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from localgrad.data.columns import check_class_names, class_numbers, find_columns
from localgrad.data.config import DataConfig, flag
from localgrad.data.decoding import BrokenImageError, broken, decode, encoded, name_of, remarked
from localgrad.data.fingerprint import fingerprint, sample_positions
from localgrad.data.sets import Images, ImageSet, ImageStream, decode_all
from localgrad.data.sources import Source, located, open_source
from localgrad.data.splits import check_sorted, held_back, named, rows_of
from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
MOST_NAMED = 9


def untold(sentence: str) -> None:
    """A `say` function that prints nothing."""


@dataclass(frozen=True)
class _Part:
    """The training or the test rows of a data set; nothing is decoded yet."""

    split: str
    rows: datasets.Dataset
    """All rows of the split (or splits), with the image column alone, in arrow format."""
    column: str
    """Name of the image column."""
    positions: Tensor
    """Positions of the used rows in `rows`, (N,) int64."""
    labels: Tensor
    """Class indices of the used rows, (N,) int64."""

    def items(self, positions: Sequence[int]) -> list[Any]:
        return [self.rows[int(self.positions[at])][self.column].to_pylist()[0] for at in positions]

    def files(self, positions: Sequence[int]) -> list[bytes]:
        """Bytes of the image files; b"" for a file that cannot be read, about which decoding raises an error later."""
        return [_bytes(item) for item in self.items(positions)]


def _bytes(item: Any) -> bytes:
    try:
        return encoded(item)
    except (OSError, BrokenImageError):
        return b""


def load_images(config: DataConfig, say: Say = logger.warning) -> tuple[ImageSet, ImageSet]:
    """Load the training and the test set of a config.

    Args:
        config: the images and their preparation.
        say: function that is called with one sentence for each thing that was left out, chosen or guessed.

    Returns:
        Training and test set, on the CPU, with the same number of classes.

    Raises:
        LocalGradError: a folder, hub name, split or column does not exist, a label is outside the classes, images have
            another size than `image_size` (without `resize`), files are no images, or a limit exceeds the set's size.
    """
    if not config.on_disk:
        return _load_digits(config)
    config = located(config)
    source = open_source(config)
    train, test, names = _parts(config, source, say)
    for sentence in source.notes():
        say(sentence)
    num_classes = config.num_classes or (len(names) if names else int(torch.cat([train.labels, test.labels]).max()) + 1)
    for part in (train, test):
        _check_labels(part.labels, num_classes, part.split)
    _check_classes(train, test, num_classes, names, say)

    def build(part: _Part, limit_name: str) -> ImageSet:
        chosen = balanced(part.labels, getattr(config, limit_name), flag(limit_name))
        kept, indices = part.labels[chosen], part.positions[chosen]
        known: dict[str, Any] = {"class_names": names, "fingerprint": fingerprint(part.split, part.labels, part.files)}
        if config.streaming:
            _look_at_some(part, config, say)
            return ImageStream(kept, config, num_classes, part.rows, part.column, indices, **known)
        images = decode_all(part.rows, part.column, indices, config, split=part.split, say=say)
        return Images(kept, config, num_classes, images, **known)

    return build(train, "train_limit"), build(test, "test_limit")


def load_validation(config: DataConfig, say: Say = logger.warning) -> ImageSet:
    """Load the images of the config's `validation_split`, on which the best epoch is chosen; see `load_images`."""
    changed = replace(config, test_split=config.validation_split or "", train_limit=1, test_fraction=None)
    return load_images(changed, say)[1]


def _parts(config: DataConfig, source: Source, say: Say) -> tuple[_Part, _Part, tuple[str, ...] | None]:
    """The training and the test rows, and the names of the classes (None if they have none)."""
    train_spec, test_spec = _specifications(config, source.splits, say)
    rows, positions = rows_of(train_spec, source.read, "train_split")
    specs = [train_spec]
    found = [(rows, positions)]
    if test_spec is not None:
        found.append((rows, positions) if test_spec == train_spec else rows_of(test_spec, source.read, "test_split"))
        specs.append(test_spec)
    image, label = find_columns(rows.features, config)
    if not config.subset:
        check_class_names(Path(config.source), rows.features[label], label)
    for (each, _), spec in zip(found, specs, strict=True):
        if not {image, label} <= {*each.column_names}:
            raise LocalGradError(
                f"{spec} has no column {image!r} or {label!r}: its columns are {each.column_names[:9]}"
            )
    labels, names = class_numbers([each for each, _ in found], specs, label)
    if names and source.folders is None and not hasattr(rows.features[label], "names"):
        numbered = [f"{number} = {name}" for number, name in enumerate(names)]
        say(f"classes by the names in column {label!r}: {_listed(numbered)}")
    parts = []
    for (each, at), own, spec, field in zip(found, labels, specs, ("train_split", "test_split"), strict=False):
        check_sorted(spec, own[at], own, field)
        parts.append(_Part(spec, _images_alone(each, image, source.root), image, at, own[at]))
    if test_spec is None:
        whole = parts[0]
        trained, tested = held_back(whole.labels, config.test_fraction or 0.0, config.split_seed)
        share = f"{len(tested):,} of {len(whole.labels):,} images of {train_spec} are held back for testing"
        say(f"{share}, the same share of each class ({flag('test_fraction')} {config.test_fraction})")
        parts = [
            replace(whole, positions=whole.positions[own], labels=whole.labels[own], split=name)
            for own, name in ((trained, train_spec), (tested, f"{train_spec} (held back)"))
        ]
    return parts[0], parts[1], names


def _specifications(config: DataConfig, there: Sequence[str], say: Say) -> tuple[str, str | None]:
    """The training and the test split (or slices) by existing names; test is None if `test_fraction` is held out."""
    train, test = named(config.train_split, there), named(config.test_split, there)
    alone = config.train_split == config.test_split and _is_usual(config.test_split) and len(there) == 1
    if alone and test is None:
        train = test = there[0]
        say(f"the images have no split {config.test_split!r}; all of {test!r} are taken")
    if train is None:
        given = flag("test_split" if config.train_split == config.test_split else "train_split")  # evaluate sets both
        raise LocalGradError(f"{given} {config.train_split}: there is no such split; the set has {', '.join(there)}")
    if test is None and _is_usual(config.test_split):
        test = next((spec for spec in ("test", "validation") if named(spec, there)), None)
        test = None if test is None else named(test, there)
    if test is None:
        if config.test_fraction is not None:
            return train, None
        raise LocalGradError(
            f"{flag('test_split')} {config.test_split}: there is no such split; the set has {', '.join(there)}\n"
            f"  Give another, or hold back a fifth of each class for testing: {flag('test_fraction')} 0.2"
        )
    others = [name for name in there if named("validation", [name]) and name not in test]
    if test != config.test_split or config.test_fraction is not None or others:
        unused = f"; {', '.join(map(repr, others))} is not used" if others else ""
        unused += "" if config.test_fraction is None else f"; {flag('test_fraction')} is for sets without a test split"
        say(f"tests on the split {test!r}{unused}")
    return train, test


def _is_usual(spec: str) -> bool:
    return spec in ("test", "validation")


def _images_alone(rows: datasets.Dataset, column: str, root: str) -> datasets.Dataset:
    """The image column alone, in arrow format; relative paths become absolute ones below `root`, the table's folder."""
    import datasets

    rows = rows.select_columns(column)
    if str(getattr(rows.features[column], "dtype", "")) in ("string", "large_string"):
        paths = rows.with_format(None)[:][column]
        if any(path is not None and not Path(path).is_absolute() for path in paths):
            joined = [None if path is None else str(Path(root, path)) for path in paths]
            kinds = datasets.Features({column: datasets.Value("string")})
            rows = datasets.Dataset.from_dict({column: joined}, features=kinds)
    return rows.with_format("arrow")


def _look_at_some(part: _Part, config: DataConfig, say: Say) -> None:
    """Decode a sample of a streamed set, to report remarks and broken images before training begins."""
    remarks: Counter[str] = Counter()
    problems = []
    sample = sample_positions(len(part.labels))
    for at, item in zip(sample, part.items(sample), strict=True):
        try:
            remarks.update(decode(item)[1])
        except BrokenImageError as error:
            problems.append((name_of(item, int(part.positions[at]), config.source), str(error)))
    if problems:
        raise broken(f"sampled {part.split}", problems, len(sample), "Repair or remove them.")
    for sentence in remarked(len(sample), remarks, f"sampled {part.split}"):
        say(sentence)


def balanced(labels: Tensor, limit: int | None, name: str = "limit") -> Tensor:
    """Ascending indices of `limit` samples: the first of each class, with counts per class as equal as possible.

    Args:
        labels: class indices, (N,) int64.
        limit: number of samples to take; None takes all.
        name: name of the limit in an error.

    Raises:
        LocalGradError: the limit is larger than the set.
    """
    if limit is None:
        return torch.arange(len(labels))
    if limit > len(labels):
        raise LocalGradError(f"{name} {limit}: the set has {len(labels)} images; give at most that, or None")
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(labels)  # number of samples of the same class before each sample
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return turn.argsort(stable=True)[:limit].sort().values


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

    def build(part: Tensor, split: str, limit_name: str) -> Images:
        chosen = part[balanced(targets[part], getattr(config, limit_name), flag(limit_name))]
        own = fingerprint(split, targets[part], lambda positions: [small[part[at]].tobytes() for at in positions])
        return Images(targets[chosen], config, num_classes, images[chosen].contiguous(), fingerprint=own)

    splits: dict[str, Tensor] = dict(zip(("train", "test"), map(torch.from_numpy, parts), strict=True))
    for name in ("train_split", "test_split"):
        if getattr(config, name) not in splits:
            raise LocalGradError(f"{flag(name)} {getattr(config, name)}: the digits have the splits train and test")
    return (
        build(splits[config.train_split], config.train_split, "train_limit"),
        build(splits[config.test_split], config.test_split, "test_limit"),
    )


def _check_labels(labels: Tensor, num_classes: int, split: str) -> None:
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise LocalGradError(
            f"{split} image {first} has label {int(labels[first])}: labels go from 0 to num_classes - 1 = "
            f"{num_classes - 1} ({len(wrong)} of {len(labels)} do not); set {flag('num_classes')}, or leave such rows "
            "out"
        )


def _check_classes(train: _Part, test: _Part, num_classes: int, names: tuple[str, ...] | None, say: Say) -> None:
    """Refuse test images of classes without a training image; report classes without training or test images."""
    trained, tested = ({*part.labels.unique().tolist()} for part in (train, test))
    untrained = tested - trained
    if untrained:
        raise LocalGradError(
            f"{test.split} has {len(untrained)} class(es) without an image in {train.split}: "
            f"{_named(untrained, names)}\n"
            "  Put images of the same classes into train/CLASS and test/CLASS, or hold some back: "
            f"{flag('test_fraction')} 0.2"
        )
    if num_classes < 2:
        raise LocalGradError(f"{train.split} has images of one class ({_named(trained, names)}): nothing to tell apart")
    classes = {*range(num_classes)}
    if classes - trained:
        start = f"labels begin at {min(trained)}; " if names is None and min(trained) > 0 else ""
        say(
            f"{start}{train.split} has no image of {len(classes - trained)} of {num_classes} classes: "
            f"{_named(classes - trained, names)}"
        )
    if trained - tested:
        say(
            f"{test.split} has no image of {len(trained - tested)} of {num_classes} classes: "
            f"{_named(trained - tested, names)}"
        )


def _named(classes: set[int], names: tuple[str, ...] | None) -> str:
    said = [str(label if names is None or label >= len(names) else names[label]) for label in sorted(classes)]
    return _listed(said)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:MOST_NAMED]) + (f" and {len(words) - MOST_NAMED} more" if words[MOST_NAMED:] else "")
