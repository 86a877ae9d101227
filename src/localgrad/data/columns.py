"""Find the image and the label column of a table, and turn labels of any type into class indices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from localgrad.data.config import DataConfig, flag
from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets

LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels")
"""Preferred names if several columns could hold the label (CIFAR-100 has a fine and a coarse label)."""
OTHER_LABEL_NAMES = ("class", "classes", "target", "targets", "category", "cls", "y", "class_id", "label_id", "digit")
IMAGE_NAMES = (
    "image",
    "img",
    "picture",
    "photo",
    "path",
    "file",
    "file_name",
    "filename",
    "image_path",
    "pixel_values",
)
"""Names by which a column of strings is taken for paths of images; its type alone could be any text."""
MOST_COLUMNS = 8


def find_columns(features: datasets.Features, config: DataConfig) -> tuple[str, str]:
    """Names of the image column and of the label column.

    A column that the config does not name is chosen by its type, then by usual names.

    Raises:
        LocalGradError: the config names a column that does not exist or has another type, or it names none and the
            choice is ambiguous.
    """
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    encoded = [name for name, kind in features.items() if _is_encoded(kind)]
    paths = [name for name, kind in features.items() if _dtype(kind) in ("string", "large_string")]
    found = images or encoded or [name for name in paths if name.lower() in IMAGE_NAMES]
    image = _choose("image_column", config.image_column, [*images, *encoded, *paths], found, features)

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    others = {name: kind for name, kind in features.items() if name not in (image, *classes)}
    values = [name for name, kind in others.items() if _can_be_label(kind)]
    values = [name for name in values if not name.startswith("__")]  # webdataset's __key__ and __url__
    usual = [name for name in classes or values if name.lower() in LABEL_NAMES]
    usual = usual or [name for name in classes or values if name.lower() in OTHER_LABEL_NAMES]
    found = classes if len(classes) == 1 else usual
    return image, _choose("label_column", config.label_column, [*classes, *values], found, features)


def _dtype(kind: Any) -> str:
    return str(getattr(kind, "dtype", ""))


def _is_encoded(kind: Any) -> bool:
    """Whether a column has bytes, or the struct with a field `bytes` that `datasets` writes."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return _dtype(kind) in ("binary", "large_binary")


def _can_be_label(kind: Any) -> bool:
    return any(word in _dtype(kind) for word in ("int", "float", "bool", "string"))


def _choose(field: str, given: str | None, allowed: list[str], found: list[str], features: datasets.Features) -> str:
    if given is None and len(found) == 1:
        return found[0]
    if given in allowed:
        return given
    kinds = [f"{name} ({_kind(kind)})" for name, kind in features.items()]
    shown = ", ".join(kinds[:MOST_COLUMNS]) + (f" and {len(kinds) - MOST_COLUMNS} more" if kinds[MOST_COLUMNS:] else "")
    what = "the images" if field == "image_column" else "the labels"
    why = f"{flag(field)} {given}: there is no such column of {what}" if given else f"which column has {what}?"
    if not allowed and field == "image_column" and len(kinds) > MOST_COLUMNS:
        how = "Pixels in columns are not read: PIL.Image.fromarray(row.reshape(28, 28)).save(f'SPLIT/{label}/{n}.png')."
    else:
        how = f"Give {flag(field)} {' or '.join(allowed[:MOST_COLUMNS])}." if allowed else "The table needs one."
    raise LocalGradError(f"{why}\n  The table has {shown}.\n  {how}")


def _kind(kind: Any) -> str:
    return _dtype(kind) if type(kind).__name__ == "Value" else type(kind).__name__


def class_numbers(
    parts: Sequence[datasets.Dataset], splits: Sequence[str], column: str
) -> tuple[list[Tensor], tuple[str, ...] | None]:
    """Class indices of each part, (N,) int64, and the names of the classes if they have names, else None.

    Whole numbers are class indices already. Strings and booleans are sorted over all parts, and a class's index is its
    position in that order.

    Args:
        parts: tables of rows, such as the training and the test split.
        splits: name of each part, for messages.
        column: the label column.

    Raises:
        LocalGradError: an image has no label, or its label is no whole number.
    """
    kind = parts[0].features[column]
    arrays = [_values(rows, split, column) for rows, split in zip(parts, splits, strict=True)]
    names = getattr(kind, "names", None)
    if any(pa.types.is_string(each.type) or pa.types.is_large_string(each.type) for each in arrays):
        return _by_name([each.cast(pa.string()).to_pylist() for each in arrays])
    if all(pa.types.is_boolean(each.type) for each in arrays):
        return _by_name([[str(value) for value in each.to_pylist()] for each in arrays])
    numbers = [each.to_numpy(zero_copy_only=False) for each in arrays]
    for split, values in zip(splits, numbers, strict=True):
        wrong = values != np.round(values.astype(np.float64))
        if wrong.any():
            raise LocalGradError(
                f"{split} image {int(wrong.argmax())} has the label {values[wrong.argmax()]} in column {column!r}: "
                f"classes are whole numbers or names; give another {flag('label_column')}"
            )
    return [torch.from_numpy(values.astype(np.int64)) for values in numbers], None if names is None else tuple(names)


def _values(rows: datasets.Dataset, split: str, column: str) -> pa.Array:
    labels = rows.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    if labels.null_count:
        first = labels.is_null().to_pylist().index(True)
        raise LocalGradError(
            f"{split} image {first} has no label in column {column!r} ({labels.null_count:,} of {len(labels):,} have "
            "none): leave such rows out"
        )
    return labels


def _by_name(values: list[list[str]]) -> tuple[list[Tensor], tuple[str, ...]]:
    names = tuple(sorted({value for each in values for value in each}))
    numbers = {name: number for number, name in enumerate(names)}
    return [torch.tensor([numbers[value] for value in each], dtype=torch.int64) for each in values], names


def check_class_names(folder: Path, kind: Any, column: str) -> None:
    """Refuse local parquet files that list other class names or another order: an index would mean another class.

    Args:
        folder: folder of the files; if it does not exist, nothing is checked.
        kind: type of the label column in the rows that were read; checked only if it is a `ClassLabel`.
        column: name of the label column.

    Raises:
        LocalGradError: the names in a file differ from those of `kind`.
    """
    names = getattr(kind, "names", None)
    if names is None or not folder.is_dir():
        return
    import pyarrow.parquet as parquet

    for path in sorted(folder.rglob("*.parquet")):
        try:
            metadata = json.loads((parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
            own = metadata["info"]["features"][column]["names"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the file lists no class names, or cannot be read as parquet
        if own != names:
            raise LocalGradError(
                f"{path.name} numbers the classes {own[:9]}, and the first file {names[:9]}: the same number "
                "would be another class; write all splits with one ClassLabel"
            )
