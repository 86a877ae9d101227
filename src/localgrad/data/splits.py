"""Select rows of a data set: by names and slices of its splits, or by a stratified hold-out for testing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from localgrad.data.config import flag
from localgrad.data.folders import split_named
from localgrad.errors import LocalGradError

if TYPE_CHECKING:
    import datasets

_NAME = re.compile(r"(^|\+)\s*([\w.-]+)")


def named(spec: str, there: Sequence[str]) -> str | None:
    """Rewrite a specification with existing names, `val[:50%]` as `validation[:50%]`; None if a split is missing."""
    found = {name: split_named(name, there) for _, name in _NAME.findall(spec)}
    if not found or None in found.values():
        return None
    return _NAME.sub(lambda match: match[1] + str(found[match[2]]), spec)


def rows_of(spec: str, read: Callable[[str], datasets.Dataset], field: str) -> tuple[datasets.Dataset, Tensor]:
    """All rows of the splits in a specification, concatenated, and the positions of the rows that it selects.

    Args:
        spec: names of splits with optional slices, such as `train[:80%]+validation`.
        read: function from the name of a split to its rows.
        field: the field of `DataConfig` with the specification, for messages.

    Raises:
        LocalGradError: the specification cannot be parsed, or selects no row.
    """
    import datasets

    names = list(dict.fromkeys(name for _, name in _NAME.findall(spec)))
    wholes = {name: read(name) for name in names}
    try:
        slices = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(wholes[name]) for name in names})
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise LocalGradError(f"{flag(field)} {spec}: {error}; give NAME, NAME[:5000] or NAME[:80%]") from error
    first = dict(zip(names, accumulate((len(wholes[name]) for name in names), initial=0), strict=False))
    taken = [
        torch.arange(part.from_ or 0, len(wholes[part.splitname]) if part.to is None else part.to)
        + first[part.splitname]
        for part in slices
    ]
    positions = torch.cat(taken)
    if not len(positions):
        raise LocalGradError(f"{flag(field)} {spec} has no data")
    return wholes[names[0]] if len(names) == 1 else datasets.concatenate_datasets(list(wholes.values())), positions


def held_back(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified random split into training and test positions, both ascending.

    A class with two images or more has at least one on each side. A class with a single image has it for training.

    Args:
        labels: class indices, (N,) int64.
        fraction: fraction of each class to test on, more than 0 and less than 1.
        seed: seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    test: list[Tensor] = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(len(own) * fraction)), len(own) - 1)
        test.append(own[torch.randperm(len(own), generator=generator)[:count]])
    tested = torch.cat(test).sort().values
    trained = torch.ones(len(labels), dtype=torch.bool)
    trained[tested] = False
    return trained.nonzero()[:, 0], tested


def check_sorted(spec: str, labels: Tensor, whole: Tensor, field: str) -> None:
    """Refuse a slice that lacks classes because its split is sorted by class.

    Args:
        spec: the specification, such as `train[:5000]`.
        labels: class indices of the selected rows.
        whole: class indices of all rows of the splits.
        field: the field of `DataConfig` with the specification, for the message.

    Raises:
        LocalGradError: the slice lacks classes, and the rows are sorted by class.
    """
    classes, present = whole.unique(), labels.unique()
    if "[" not in spec or len(present) == len(classes) or len(classes) == len(whole):
        return
    runs = 1 + int((whole[1:] != whole[:-1]).sum())
    if runs > len(classes):
        return
    limit = flag("train_limit" if field == "train_split" else "test_limit")
    raise LocalGradError(
        f"{flag(field)} {spec} has images of {len(present)} of {len(classes)} classes, for the images are sorted by "
        f"class.\n  Give {limit} {len(labels)}, which takes evenly from each class, or {flag('test_fraction')} 0.2."
    )
