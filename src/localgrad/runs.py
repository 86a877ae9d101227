"""A run folder: `config.json`, `metrics.jsonl`, `result.json`, `checkpoint.pt`, `model.safetensors`.

Every file but the metrics is written whole or not at all: to a temporary file beside it, flushed to the disk, then
renamed. The metrics get one line an epoch; on resume they are cut back to the lines that the checkpoint knows.
"""

import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from localgrad.config import TrainConfig, differences, from_dict, to_dict
from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself; `result.json` is this, field by field."""

    config: dict[str, Any]
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
    seconds_per_step: float
    """Median seconds from one optimizer step of the last epoch to the next."""
    wall_seconds: float
    """Seconds of training and evaluation, over all sittings."""
    device: str
    """Name of the processor or GPU."""
    precision: str
    """The precision that `auto` stood for."""
    versions: dict[str, str]
    """Versions of localgrad, Python, torch and lightning."""
    commit: str | None
    """Commit of the working directory, or None outside a git repository."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the name of `path` only once everything is on the disk.

    Raises:
        LocalGradError: the disk is full or cannot be written; what `path` held before is still whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise LocalGradError(f"{path} could not be written ({why}); what it held before is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        LocalGradError: it is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise LocalGradError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except OSError as error:
        raise LocalGradError(f"{path} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LocalGradError(f"{path} is not readable as JSON ({error}); it was changed or cut short") from None


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def is_finished(self) -> bool:
        return self.result.exists()

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Looks, without writing anything, whether this run may use the folder.

        Raises:
            LocalGradError: the folder is another run's, or finished, or, without `resume`, in use.
        """
        if not (self.path / "config.json").exists():
            if resume:
                raise LocalGradError(f"{self.path} holds no run to resume; leave out --resume to start one there")
            return
        if self.is_finished:
            raise LocalGradError(f"{self.path} holds a finished run; give another --run-dir")
        changed = differences(self.config(), config)
        if changed:
            raise LocalGradError(
                f"{self.path} holds a different run (saved -> asked for: {'; '.join(changed)}); give another --run-dir"
            )
        if not resume:
            raise LocalGradError(f"{self.path} holds this run, not finished; continue it with --resume")

    def start(self, config: TrainConfig, lines: int) -> None:
        """Makes the folder, saves the config in it and cuts the metrics back to their first `lines` lines.

        Raises:
            LocalGradError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalGradError(f"the run folder {self.path} cannot be made: {error.strerror or error}") from error
        for left_over in self.path.glob(".*.tmp"):
            left_over.unlink()
        write_json(self.path / "config.json", to_dict(config))
        kept = self.metrics.read_bytes().splitlines(keepends=True)[:lines] if self.metrics.exists() else []
        with atomic_write(self.metrics) as file:
            file.writelines(kept)

    def config(self) -> TrainConfig:
        """The saved config."""
        return from_dict(read_json(self.path / "config.json"))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one line to the metrics and flushes it to the disk."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LocalGradError(f"{self.metrics} could not be written: {error.strerror or error}") from error

    def open_board(self, epoch: int) -> "Board":
        """A TensorBoard writer in this folder, which overrides what an interrupted sitting wrote from `epoch` on.

        Raises:
            LocalGradError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise LocalGradError("--tensorboard needs TensorBoard: pip install 'localgrad[tensorboard]'") from None
        return Board(SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes the checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic_write(self.checkpoint) as file:
            file.write(buffer.getbuffer())

    def load_checkpoint(self) -> dict[str, Any]:
        """Reads the checkpoint; only tensors and plain values are accepted, no code is run.

        Raises:
            LocalGradError: it is missing, cut short, or holds anything else.
        """
        try:
            data = self.checkpoint.read_bytes()
        except FileNotFoundError:
            raise LocalGradError(f"{self.path} has no checkpoint.pt") from None
        return _loaded(self.checkpoint, lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))

    def save_model(self, model: nn.Module) -> None:
        """Writes the weights under the model's own names."""
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        with atomic_write(self.model) as file:
            file.write(save(state))

    def load_model(self, model: nn.Module) -> None:
        """Loads the saved weights into a model.

        Raises:
            LocalGradError: there are none, or they are cut short, or of another model.
        """
        from safetensors.torch import load

        if not self.model.exists():
            raise LocalGradError(f"{self.path} has no model.safetensors: its run is not finished (train --resume)")
        state = _loaded(self.model, lambda: load(self.model.read_bytes()))
        load_state(model.load_state_dict, state, self.model)

    def save_result(self, result: Result) -> None:
        """Writes the result, which marks the run as finished."""
        write_json(self.result, dataclasses.asdict(result))


@dataclass(frozen=True)
class Board:
    """Writes lines of metrics for TensorBoard."""

    writer: Any

    def write(self, line: dict[str, Any]) -> None:
        """Writes every number of a line, with one curve a block where there is one number a block."""
        for name, value in line.items():
            values = (
                {f"{name}/block{number}": part for number, part in enumerate(value, start=1)}
                if isinstance(value, list)
                else {name: value}
            )
            for label, number in values.items():
                if number is not None and name != "epoch":
                    self.writer.add_scalar(label, number, line["epoch"])
        self.writer.flush()


def _loaded(path: Path, read: Callable[[], Any]) -> dict[str, Any]:
    try:
        state = read()
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        reason = str(error).partition("\n")[0]
        raise LocalGradError(f"{path} is cut short or damaged and was not loaded ({reason})") from error
    if not isinstance(state, dict):
        raise LocalGradError(f"{path} is not a localgrad file: it holds a {type(state).__name__}, not a table")
    return state


def load_state(load: Callable[[Any], Any], state: Any, path: Path) -> None:
    """Calls a `load_state_dict` and names the file when the state is that of something else.

    Raises:
        LocalGradError: names or shapes do not match.
    """
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LocalGradError(f"{path} belongs to another model: {' '.join(str(error).split())[:300]}") from error
