"""The result of a run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from localgrad.config.schema import TrainConfig
from localgrad.config.typed import parse
from localgrad.data.fingerprint import Fingerprint
from localgrad.errors import LocalGradError

Content = TypeVar("Content")

SCHEMA = 1
"""Version of the fields of files; raised when a field changes its meaning."""


def as_file(kind: str, values: Any) -> dict[str, Any]:
    """What a file holds: its kind, the schema of its fields, and the fields of a dataclass or a table."""
    return {"kind": kind, "schema": SCHEMA, **(values if isinstance(values, dict) else dataclasses.asdict(values))}


def fields_of(values: Any, path: Path, kind: str | None = None) -> Any:
    """What a file holds beside its kind and schema. Files of the first versions say neither, and are of schema 1.

    Args:
        values: what the file holds.
        path: the file, for the message.
        kind: what the file should be; any if None.

    Raises:
        LocalGradError: it is of another kind, or its schema is of a later version.
    """
    if not isinstance(values, dict):
        return values
    schema = values.get("schema", SCHEMA)
    if type(schema) is not int or schema > SCHEMA:
        raise LocalGradError(f"{path} has schema {schema!r}, this version reads up to {SCHEMA}: update localgrad")
    if kind is not None and values.get("kind", kind) != kind:
        raise LocalGradError(f"{path} has the kind {str(values['kind'])[:40]!r}, not {kind!r}: it is another file")
    return {name: value for name, value in values.items() if name not in ("kind", "schema")}


def from_file(content: type[Content], values: Any, path: Path) -> Content:
    """The dataclass of a result file.

    Args:
        content: the dataclass.
        values: what the file holds.
        path: the file, for the message.

    Raises:
        LocalGradError: the schema is of a later version, or a field is missing, unknown or of another type.
    """
    values = fields_of(values, path)
    try:
        return parse(content, values)
    except LocalGradError as problem:
        raise LocalGradError(f"{path} is damaged: {problem}") from None


@dataclass(frozen=True)
class Result:
    """Outcome of a finished run, the content of `result.json`."""

    config: TrainConfig
    """The complete config."""
    test_error: float
    """Test error in percent after the last epoch."""
    best_test_error: float
    """Smallest test error in percent over the evaluated epochs (chosen on the test images, as in the papers)."""
    best_epoch: int
    """Epoch of the smallest test error."""
    local_errors: list[float | None] | None
    """Test error in percent of each block's own head after the last epoch, when that was asked for."""
    cuts: list[str]
    """Units after which gradients were isolated."""
    num_blocks: int
    """Number of gradient-isolated blocks, the last one included."""
    parameters: dict[str, int]
    """Number of parameters: `backbone`, `auxiliary` and, of both together, `trainable`."""
    peak_memory_bytes: int
    """Most bytes of tensors that one training step held beyond what was there before it."""
    seconds_per_step: float | None
    """Median seconds from one optimizer step of the last epoch to the next; None for a run of one or two."""
    wall_seconds: float
    """Seconds of training and evaluation, over all sittings."""
    device: str
    """Name of the processor or GPU."""
    precision: str
    """The precision that `auto` stood for."""
    versions: dict[str, str]
    """Versions of localgrad, Python, torch, torchvision and lightning."""
    commit: str | None
    """Commit of localgrad's code, with `-dirty` if changed; None where it is in no repository."""
    skipped: int = 0
    """Batches skipped because a loss or gradient was not finite."""
    num_classes: int | None = None
    """Number of classes of the images, and of the network."""
    class_names: list[str] | None = None
    """Their names in order, where the images have such."""
    chosen_on: str = "test"
    """Images that the best epoch is chosen on: `test`, or `validation` where the config names such a split."""
    train_images: Fingerprint | None = None
    """What tells the images apart that it was trained on."""
    test_images: Fingerprint | None = None
    """Likewise of those that it was tested on."""
    date: str | None = None
    """Day and time of the end, in UTC, by ISO 8601."""
    command: str | None = None
    """Command that made the run, where `localgrad reproduce` did."""
    test_errors: list[float | None] | None = None
    """Test error in percent after each epoch, None where it was not evaluated; `reproduce` keeps them here."""

    def __post_init__(self) -> None:
        for name in ("backbone", "auxiliary"):
            if name not in self.parameters:
                raise ValueError(f"parameters has no {name!r}")
        if self.local_errors is not None and len(self.local_errors) != self.num_blocks:
            raise ValueError(f"local_errors must be a list of {self.num_blocks}, it has {len(self.local_errors)}")
