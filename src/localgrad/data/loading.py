"""Where images come from: scikit-learn's digits, the Hugging Face hub, or a local folder, as a pair of image sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from localgrad.data.config import DataConfig
from localgrad.data.sets import Images, ImageSet, ImageStream, decode_all
from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets


LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels")
"""Preferred names where several columns could hold the label (CIFAR-100 has a fine and a coarse one)."""


_TABLES = (".parquet", ".csv", ".json", ".jsonl", ".arrow", ".md", ".yaml")
"""Suffixes of files that say themselves what a set is made of."""


FOLDER_SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}
"""Folder names that mean the split "validation"; every other folder is named like its split."""


def load_images(config: DataConfig) -> tuple[ImageSet, ImageSet]:
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
    _check_names(Path(config.source).expanduser(), config, both[0].features[label_column], label_column)
    labels = [_read_labels(rows, label_column) for rows in both]
    schema = getattr(both[0].features[label_column], "num_classes", None)
    num_classes = config.num_classes or schema or int(torch.cat(labels).max()) + 1
    for rows, each in zip(both, labels, strict=True):
        _check_labels(each, num_classes, str(rows.split))
    _check_trained(labels, num_classes, both[0].features[label_column], config)

    names = getattr(both[0].features[label_column], "names", None)
    class_names = None if names is None else tuple(names)

    def build(rows: datasets.Dataset, labels: Tensor, limit_name: str) -> ImageSet:
        indices = balanced(labels, getattr(config, limit_name), limit_name)
        kept, rows = labels[indices], rows.select_columns(image_column).with_format("arrow")
        if config.streaming:
            return ImageStream(kept, config, num_classes, rows, image_column, indices, class_names=class_names)
        return Images(
            kept, config, num_classes, decode_all(rows, image_column, indices, config), class_names=class_names
        )

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

    splits: dict[str, Tensor] = dict(zip(("train", "test"), map(torch.from_numpy, parts), strict=True))
    for name in ("train_split", "test_split"):
        if getattr(config, name) not in splits:
            raise LocalGradError(f"{name}={getattr(config, name)!r}: the digits have the splits train and test")
    return build(splits[config.train_split], "train_limit"), build(splits[config.test_split], "test_limit")


def _load_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    import datasets

    try:
        folder = Path(config.source).expanduser()
        local = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user who is not there
        raise LocalGradError(f"source={config.source[:80]!r} cannot be a folder: {error}"[:300]) from error
    if not local and (config.source[:1] in "./~" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source)):
        parent = next(path for path in folder.absolute().parents if path.is_dir())
        exists = sorted(path.name for path in parent.iterdir() if path.is_dir())
        raise LocalGradError(f"source={config.source!r} is not a folder; {parent} has the folders {exists}")
    offline = not local and not _hub_answers()
    try:
        with _quiet(offline):
            where = _local_arguments(folder, config) if local else {"path": config.source, "name": config.subset}
            train, test = datasets.load_dataset(**where, split=[config.train_split, config.test_split])
    except LocalGradError:
        raise
    except Exception as error:  # whatever it is, the set cannot be had
        why = " ".join(f"{error} {error.__cause__ or ''}".split())
        if offline:
            why = f"no such folder, not in the cache, and the Hugging Face hub cannot be reached ({why})"
        raise LocalGradError(
            f"source={config.source!r} (subset={config.subset!r}, train_split={config.train_split!r}, "
            f"test_split={config.test_split!r}) cannot be loaded: {why}; give a local folder, or a hub name and a "
            "connection, and splits that it has (--data.train-split and --data.test-split; "
            "in evaluate and reproduce --test-split)"
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
        return {"path": str(folder), "data_files": {split: _patterns(folder, splits[split]) for split in wanted}}
    if wanted.keys() == {"train"} and not any(path.suffix in _TABLES for path in folder.rglob("*")):
        return {"path": str(folder), "data_files": {"train": _patterns(folder, "")}}  # classes alone
    declared = config.subset and datasets.get_dataset_config_names(str(folder)) != ["default"]
    return {"path": str(folder), "name": config.subset if declared else None}


def _patterns(folder: Path, name: str) -> list[str]:
    """What matches all files of a split's folder, those of linked class folders too."""
    inside = f"{name}/" if name else ""
    links = [path.name for path in sorted((folder / name).iterdir()) if path.is_symlink() and path.is_dir()]
    odd = [link for link in links if has_magic(link)]
    if odd:
        raise LocalGradError(
            f"the linked folder {odd[0]!r} cannot be read, for *, ? and [] mean other names: rename it"
        )
    return [f"{inside}**", *(f"{inside}{link}/**" for link in links)]


def _check_names(folder: Path, config: DataConfig, feature: Any, column: str) -> None:
    """Refuse local parquet files whose classes have other names or another order: their numbers mean other classes."""
    names = getattr(feature, "names", None)
    if names is None or config.subset or not folder.is_dir():
        return
    import pyarrow.parquet as parquet

    for path in sorted(folder.rglob("*.parquet")):
        try:
            metadata = json.loads((parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
            own = metadata["info"]["features"][column]["names"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # without names, or not what was read
        if own != names:
            raise LocalGradError(
                f"{path} numbers the classes {own[:9]}, and the first file of the set {names[:9]}: the same number "
                "would be another class; write all splits with one ClassLabel"
            )


def _check_trained(labels: list[Tensor], num_classes: int, feature: Any, config: DataConfig) -> None:
    """Refuse to test on classes that no training image has, as where a folder sorted by class is sliced."""
    trained, tested = ({*each.unique().tolist()} & {*range(num_classes)} for each in labels)
    missing = sorted(tested - trained)
    if missing:
        names = getattr(feature, "names", None) or range(num_classes)
        said = [names[label] for label in missing[:9] if label < len(names)]
        raise LocalGradError(
            f"test_split={config.test_split!r} has {len(missing)} class(es) without an image in train_split="
            f"{config.train_split!r} ({', '.join(map(str, said))}): a slice of images sorted by class takes whole "
            "classes; put the images into train/CLASS and test/CLASS"
        )


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
        how = "" if allowed else "; images in folders get labels where all lie in SPLIT/CLASS/, of two classes or more"
        raise LocalGradError(f"{field}={given!r}: choose from {allowed}; the columns of the set are {kinds}{how}")
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
