"""Atomic writes, kept versions of a file, JSON, and lock files."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from localgrad.errors import LocalGradError


@contextmanager
def atomic_write(path: Path, keep: int = 1) -> Iterator[BinaryIO]:
    """Context: a temporary file that is flushed to disk and renamed to `path` at the end.

    With `keep` above 1 the previous content becomes `path.1`, the one before it `path.2`, and so on, `keep` versions in
    all. Wherever the process is killed, there are at least as many intact versions as before the call.

    Follows symbolic links. Writes directly to what is no regular file, such as /dev/stdout.

    Raises:
        LocalGradError: the disk is full or cannot be written; `path` is unchanged.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112, PTH113
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep > 1:
            _make_room(path)
        temporary.replace(path)
        _sync(path.parent)
        if keep > 1:
            for version in list(versions(path).values())[keep:]:
                version.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise LocalGradError(f"{path} could not be written ({why}); what it held before is intact") from error
    finally:
        with contextlib.suppress(OSError):  # which would hide what went wrong
            temporary.unlink(missing_ok=True)


def check_writable(path: Path, flag: str = "--output") -> None:
    """Refuses, before any work, a file or folder that cannot be made or written.

    Args:
        path: it, or what will be made.
        flag: what gives another one.

    Raises:
        LocalGradError: the nearest folder that is there is read-only, or a file is in its place.
    """
    try:
        as_folder = path.exists() and not path.is_file()  # a folder itself, or what is written directly, as /dev/stdout
        there = next(each for each in ([path] if as_folder else path.absolute().parents) if each.exists())
    except OSError as error:
        raise LocalGradError(
            f"{str(path)[:80]!r} cannot be a file or folder: {error.strerror}; give another {flag}"
        ) from error
    if not as_folder and not there.is_dir():
        raise LocalGradError(f"{path} cannot be made: {there} is a file; give another {flag}")
    if not os.access(there, os.W_OK):
        raise LocalGradError(f"{path} cannot be written: {there} is read-only; give another {flag}")


def _make_room(path: Path) -> None:
    """Renames the versions to `path.1`, `path.2`, ..., in an order in which none takes the name of another."""
    for number, version in enumerate(versions(path).values()):  # a kill may have left a gap
        version.rename(path if number == 0 else f"{path}.{number}")
    for number, version in reversed(versions(path).items()):
        version.rename(f"{path}.{number + 1}")


def versions(path: Path) -> dict[int, Path]:
    """`path`, `path.1`, `path.2`, ..., those that are there, by number: the newest first. 0 is `path` itself."""
    found = {int(file.suffix[1:]): file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdecimal()}
    if os.path.lexists(path):
        found[0] = path
    return dict(sorted(found.items()))


def lock(file: TextIO, seconds: float = 0.0) -> None:
    """Locks a file for as long as it is open, here or in a process that inherited it.

    Raises:
        BlockingIOError: another one still has it after so many seconds.
    """
    import fcntl

    give_up = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def _sync(folder: Path) -> None:
    """Makes the names in a folder as lasting as the files' contents; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, hint: str = "") -> None:
    """Makes a folder with all those above it.

    Args:
        path: the folder; it may be there.
        hint: what to do where it cannot be made, as `give another --output`.

    Raises:
        LocalGradError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        why = getattr(error, "strerror", None) or error
        raise LocalGradError(f"{path} cannot be made: {why}" + (f"; {hint}" if hint else "")) from error


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes a value as JSON, atomically; on one line with `indent=None`."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path, *, finite: bool = False) -> Any:
    """Reads a JSON file.

    Raises:
        LocalGradError: it is missing, cannot be read, or is no JSON; with `finite`, also one with NaN or infinities.
    """

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(path.read_text(), parse_constant=refused if finite else None)
    except FileNotFoundError:
        raise LocalGradError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except OSError as error:
        raise LocalGradError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too long, nested too deep
        raise LocalGradError(f"{path} is not readable as JSON ({error}); it was changed or cut short") from None
