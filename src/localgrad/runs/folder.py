"""The folder of a run, and its files."""

import dataclasses
import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.config.methods import with_defaults
from localgrad.config.saved import differences, from_dict
from localgrad.config.schema import TrainConfig
from localgrad.config.typed import parse
from localgrad.data.fingerprint import Fingerprint
from localgrad.data.sets import ImageSet
from localgrad.data.sources import located
from localgrad.errors import LocalGradError
from localgrad.runs.files import atomic_write, lock, read_json, versions, write_json
from localgrad.runs.result import Result, as_file, fields_of, from_file

logger = logging.getLogger(__name__)


LOCK_SECONDS = 10.0
"""How long to wait for the lock of a folder: workers of a killed process hold it until they exit, seconds later."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder: the paths of its files, their checks, and the functions that write and read them."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self._own("checkpoint.pt")

    @property
    def metrics(self) -> Path:
        return self._own("metrics.jsonl")

    @property
    def model(self) -> Path:
        return self._own("model.safetensors")

    @property
    def best_model(self) -> Path:
        return self._own("best.safetensors")

    @property
    def result(self) -> Path:
        return self._own("result.json")

    @property
    def images(self) -> Path:
        return self._own("images.json")

    @property
    def _config(self) -> Path:
        return self._own("config.json")

    @property
    def is_started(self) -> bool:
        return self._config.exists()

    @property
    def is_finished(self) -> bool:
        return self.result.exists()

    @property
    def has_checkpoint(self) -> bool:
        return bool(versions(self.checkpoint))

    def _own(self, name: str) -> Path:
        """Path of a file in the folder. Symbolic links are refused: they may point to a file of another run."""
        path = self.path / name
        if path.is_symlink():
            raise LocalGradError(f"{path} is a link to {path.readlink()}: a run folder holds its files itself; copy it")
        return path

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Check that a run may use the folder; nothing is written.

        Args:
            config: the config of the run.
            resume: whether to continue the run in the folder. A finished run can be resumed with more epochs.

        Raises:
            LocalGradError: the folder holds another run, a finished run, or without `resume` an unfinished run; or
                `resume` is given and the folder holds no run.
        """
        try:
            started = self._config.exists()
        except OSError as error:
            raise LocalGradError(
                f"{str(self.path)[:80]!r} cannot be a run folder: {error.strerror}; give another --run-dir"
            ) from error
        if not started:
            if resume:
                raise LocalGradError(f"{self.path} holds no run to resume; leave out --resume to start one there")
            return
        before = with_defaults(self.config())  # options that a later version added get their defaults
        more = before.optim.epochs < config.optim.epochs
        if self.is_finished and not (resume and more):
            raise LocalGradError(
                f"{self.path} holds a finished run of {before.optim.epochs} epochs: go on with --resume --epochs MORE, "
                "or give another --run-dir to begin a new one"
            )
        if resume and more:  # the run continues with the learning rate schedule of the new number of epochs
            optim = dataclasses.replace(before.optim, epochs=config.optim.epochs)
            before = dataclasses.replace(before, optim=optim, patience=config.patience)
        place = config.data.source if self.images.exists() else located(before.data).source
        before = dataclasses.replace(before, data=dataclasses.replace(before.data, source=place))  # see check_images
        changed = differences(before, config)
        if changed:
            raise LocalGradError(
                f"{self.path} holds a different run (saved -> asked for: {'; '.join(changed)}); give another --run-dir"
            )
        if not resume:
            raise LocalGradError(f"{self.path} holds this run, not finished; continue it with --resume")

    def check_images(self, *, train: ImageSet | None = None, test: ImageSet | None = None) -> None:
        """Check by fingerprint that image sets are those of the run; their path may differ.

        Runs of earlier versions have no fingerprints and accept all images.

        Args:
            train: the training set; None checks nothing.
            test: the test set; None checks nothing.

        Raises:
            LocalGradError: number of images, number of classes, labels, or a sample of the files differ.
        """
        for part, images in (("train", train), ("test", test)):
            before = self.known_images(part)
            if images is None or images.fingerprint is None or before is None:
                continue
            difference = before.difference(images.fingerprint)
            if difference is not None:
                raise LocalGradError(
                    f"{self.path} was trained with other images than those of --data {images.config.source}:\n"
                    f"  its {before.split} images were {difference}.\n  Give --data FOLDER with the images of the run."
                )

    def known_images(self, part: str) -> Fingerprint | None:
        """Saved fingerprint of the run's images, for the part `train` or `test`; None for a run of an earlier version.

        Raises:
            LocalGradError: the file of fingerprints is damaged.
        """
        if not self.images.exists():
            return None
        saved = fields_of(read_json(self.images), self.images, "images")
        try:
            return parse(Fingerprint, saved.get(part) if isinstance(saved, dict) else saved, part)
        except LocalGradError as error:
            raise LocalGradError(f"{self.images} was changed or cut short ({error}): remove it") from None

    def keep_images(self, train: ImageSet, test: ImageSet) -> None:
        """Save the fingerprints of the run's images for `check_images`, if both sets have one."""
        if train.fingerprint is not None and test.fingerprint is not None:
            parts = {"train": train.fingerprint, "test": test.fingerprint}
            write_json(self.images, as_file("images", {name: dataclasses.asdict(part) for name, part in parts.items()}))

    @contextmanager
    def locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Context: create the folder and hold its lock. The lock is released if the process ends or is killed.

        Args:
            seconds: how long to wait while another process holds the lock.

        Raises:
            LocalGradError: another process holds the lock, or the folder cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self._own(".lock").open("w")
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        with file:
            try:
                lock(file, seconds)
            except BlockingIOError:
                raise LocalGradError(
                    f"another process is training in {self.path}; wait for it, or give another --run-dir"
                ) from None
            except (ImportError, OSError) as error:  # on Windows, or a file system without locks
                logger.warning("%s cannot be locked (%s): start no second process there", self.path, error)
            yield

    def _unusable(self, error: Exception) -> LocalGradError:
        why = getattr(error, "strerror", None) or error
        return LocalGradError(f"the run folder {str(self.path)!r} cannot be made or read: {why}")

    def start(self, config: TrainConfig, lines: int) -> None:
        """Save the config and clean the folder before training.

        The metrics are truncated to their first `lines` lines. Temporary files, checkpoints beyond `keep_checkpoints`
        and the result of an earlier end of the run are removed.

        Raises:
            LocalGradError: the folder cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left_over in self.path.glob(".*.tmp"):
                left_over.unlink()
            for version in list(versions(self.checkpoint).values())[config.keep_checkpoints :]:
                version.unlink()
            kept = self.metrics.read_bytes().splitlines(keepends=True)[:lines] if self.metrics.exists() else []
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        if len(kept) < lines:
            logger.warning("%s has lost %d of its first %d lines", self.metrics, lines - len(kept), lines)
        self.result.unlink(missing_ok=True)  # of the run with fewer epochs
        write_json(self._config, as_file("config", config))
        with atomic_write(self.metrics) as file:
            file.writelines(kept)

    def config(self) -> TrainConfig:
        """The saved config. Options that a later version of localgrad added get their defaults.

        Raises:
            LocalGradError: the folder has no config, or the config is damaged.
        """
        values = fields_of(read_json(self._config), self._config, "config")
        try:
            return with_defaults(from_dict(values))
        except LocalGradError as problem:
            raise LocalGradError(f"{self._config}: {problem}") from None

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` and flush it to disk."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LocalGradError(f"{self.metrics} could not be written: {error.strerror or error}") from error

    def save_checkpoint(self, state: dict[str, Any], keep: int = 1) -> None:
        """Write a checkpoint atomically and keep the newest `keep` ones. `torch.save` adds a CRC-32 of each part."""
        buffer = io.BytesIO()
        torch.save(as_file("checkpoint", state), buffer)
        with atomic_write(self.checkpoint, keep) as file:
            file.write(buffer.getbuffer())

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """Read the newest intact checkpoint; log a warning if newer ones are damaged.

        Only tensors and plain values are loaded (`weights_only=True`).

        Returns:
            Path and content of the checkpoint.

        Raises:
            LocalGradError: there is no checkpoint, none is intact, or the newest intact file holds other objects.
        """
        damaged: list[str] = []
        for path in versions(self.checkpoint).values():
            try:
                content = fields_of(_read_checkpoint(self._own(path.name)), path, "checkpoint")
            except _DamagedError as error:
                damaged.append(str(error))
                continue
            if damaged:
                logger.warning("%s; %s is taken, the one before", "; ".join(damaged), path)
            return path, content
        if damaged:
            raise LocalGradError(f"{'; '.join(damaged)}; no intact one is left, so start again in another --run-dir")
        raise LocalGradError(f"{self.path} has no checkpoint.pt: its run has saved none yet, or it was removed")

    def set_aside_newer(self, taken: Path) -> None:
        """Rename checkpoints newer than the loaded one, which are damaged, so that they do not count as kept."""
        for path in versions(self.checkpoint).values():
            if path == taken:
                return
            path.replace(f"{path}.damaged")

    def save_model(
        self, weights: dict[str, Tensor], metadata: dict[str, str] | None = None, *, best: bool = False
    ) -> None:
        """Write weights under the model's own names to `model.safetensors`, or with `best` to `best.safetensors`."""
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        with atomic_write(self.best_model if best else self.model) as file:
            file.write(save(state, metadata))

    def load_model(self, model: nn.Module, *, best: bool = False) -> None:
        """Load the weights of the last epoch, or with `best` of the best epoch, into a model.

        Raises:
            LocalGradError: the file does not exist, is damaged, or belongs to another model.
        """
        from safetensors.torch import load

        path = self.best_model if best else self.model
        if not path.exists():
            why = "it was trained without --keep-best" if best else "its run is not finished (train --resume)"
            raise LocalGradError(f"{self.path} has no {path.name}: {why}")
        try:
            state = load(path.read_bytes())
        except Exception as error:  # safetensors raises many classes for a broken file
            raise LocalGradError(
                f"{path} is cut short or damaged ({_reason(error)}); remove it and result.json, and "
                "train --resume writes it again from the checkpoint"
            ) from error
        load_state(model.load_state_dict, state, path)

    def classes(self) -> tuple[int | None, list[str] | None]:
        """Number and names of the classes of a finished run; each is None if unknown, both if it is unfinished."""
        if not self.is_finished:
            return None, None
        result = from_file(Result, read_json(self.result), self.result)
        return result.num_classes, result.class_names

    def save_result(self, result: Result) -> None:
        """Write `result.json`, which marks the run as finished."""
        write_json(self.result, as_file("run", result))


class _DamagedError(LocalGradError):
    """A file is cut short or its checksum is wrong."""


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            broken = file.testzip()
    except Exception as error:  # zipfile raises many classes for a broken file
        raise _DamagedError(f"{path} is cut short or damaged ({_reason(error) or 'it cannot be read'})") from error
    if broken is not None:
        raise _DamagedError(f"{path} is damaged (the checksum of its part {broken} is wrong)")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # the checksums are right, so the file was written with such objects
        raise LocalGradError(
            f"{path} is refused: it holds more than tensors and plain values, which no checkpoint of localgrad does; "
            "do not trust this folder, or remove that file to go on from the checkpoint before"
        ) from error
    except Exception as error:
        raise _DamagedError(f"{path} is cut short or damaged ({_reason(error)})") from error
    return _table(state, path)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _table(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise LocalGradError(f"{path} is not a localgrad file: it holds a {type(state).__name__}, not a table")
    return state


def load_state(load: Callable[[Any], Any], state: Any, path: Path) -> None:
    """Call a function such as `load_state_dict`; if it fails, the error names the file.

    Args:
        load: the function, called with `state`.
        state: the state from the file.
        path: the file.

    Raises:
        LocalGradError: names or shapes of the state do not match.
    """
    try:
        load(state)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LocalGradError(f"{path} belongs to another model: {' '.join(str(error).split())[:300]}") from error
