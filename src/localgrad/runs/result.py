"""The result of a run, and the common form of result files: a kind, a schema version, and fields."""

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
"""Schema version of files, which grows when a field changes its meaning."""


def as_file(kind: str, values: Any) -> dict[str, Any]:
    """Content of a file: its kind, the schema version, and the fields of a dataclass or dict."""
    return {"kind": kind, "schema": SCHEMA, **(values if isinstance(values, dict) else dataclasses.asdict(values))}


def fields_of(values: Any, path: Path, kind: str | None = None) -> Any:
    """The fields of a file without kind and schema. Files of the first versions have neither, and count as schema 1.

    Args:
        values: content of the file; anything but a dict is returned unchanged.
        path: the file, for the message.
        kind: the expected kind; None accepts any.

    Raises:
        LocalGradError: the file is of another kind, or its schema is of a later version.
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
    """Parse a result file into a dataclass.

    Args:
        content: the dataclass.
        values: content of the file.
        path: the file, for the message.

    Raises:
        LocalGradError: the schema is of a later version, a field is missing or of another type, or the config has an
            unknown field. Other unknown fields are ignored.
    """
    values = fields_of(values, path)
    try:
        return parse(content, values)
    except LocalGradError as problem:
        raise LocalGradError(f"{path} is damaged: {problem}") from None


@dataclass(frozen=True)
class Result:
    """Result of a finished run, the content of `result.json`."""

    config: TrainConfig
    """The complete config."""
    test_error: float
    """Test error in percent after the last epoch."""
    best_test_error: float
    """Test error in percent of the best epoch. Without a validation split it is the smallest one, as in the papers."""
    best_epoch: int
    """The epoch with the smallest error on the images that `chosen_on` names."""
    local_errors: list[float | None] | None
    """Test error in percent of each block's local head after the last epoch, if `local_heads` is on; else None."""
    cuts: list[str]
    """Units after which gradients were isolated."""
    num_blocks: int
    """Number of gradient-isolated blocks, the last one included."""
    parameters: dict[str, int]
    """Number of parameters of the `backbone`, of the `auxiliary` networks, and of the `trainable` ones in both."""
    peak_memory_bytes: int | None
    """Peak memory of one training step: bytes of tensors on top of those that were allocated before it; None if it was
    not measured."""
    seconds_per_step: float | None
    """Median seconds from one optimizer step of the last epoch to the next; None for a run of one or two steps."""
    wall_seconds: float
    """Seconds of training and evaluation, without pauses before a resume."""
    device: str
    """Name of the CPU or GPU."""
    precision: str
    """Precision of the run, with `auto` resolved."""
    versions: dict[str, str]
    """Versions of localgrad, Python, torch, torchvision and lightning."""
    commit: str | None
    """Commit of localgrad's code, with `-dirty` if changed; None if it is in no git repository."""
    skipped: int = 0
    """Batches skipped because a loss or gradient was not finite."""
    num_classes: int | None = None
    """Number of classes of the images, and of the network."""
    class_names: list[str] | None = None
    """Names of the classes in order of their index; None if they have no names."""
    chosen_on: str = "test"
    """Images on which the best epoch is chosen: `test`, or `validation` if the config names a validation split."""
    train_images: Fingerprint | None = None
    """Fingerprint of the training images."""
    test_images: Fingerprint | None = None
    """Fingerprint of the test images."""
    date: str | None = None
    """Date and time of the end of the run, in UTC, by ISO 8601."""
    command: str | None = None
    """Command of the run, if `localgrad reproduce` started it."""
    test_errors: list[float | None] | None = None
    """Test error in percent after each epoch (None if not evaluated); only `localgrad reproduce` fills this in."""

    def __post_init__(self) -> None:
        for name in ("backbone", "auxiliary"):
            if name not in self.parameters:
                raise ValueError(f"parameters has no {name!r}")
        if self.local_errors is not None and len(self.local_errors) != self.num_blocks:
            raise ValueError(f"local_errors must be a list of {self.num_blocks}, it has {len(self.local_errors)}")
