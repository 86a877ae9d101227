"""Atomic writes, older versions of a file, JSON, and lock files."""

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
    all. If the process is killed at any point, there are at least as many intact versions as before the call.

    Symbolic links are followed. A path that is no regular file, such as /dev/stdout, is written directly.

    Raises:
        LocalGradError: the file cannot be written, or the disk is full; the previous content is intact.
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
        with contextlib.suppress(OSError):  # an error here would hide the first one
            temporary.unlink(missing_ok=True)


def check_writable(path: Path, flag: str = "--output") -> None:
    """Check, before any work, that a file or folder can be created or written.

    Args:
        path: the file or folder; it need not exist.
        flag: the flag that gives another path, for the message.

    Raises:
        LocalGradError: the nearest existing parent is read-only or is a file, or the name is no valid path.
    """
    try:
        as_folder = path.exists() and not path.is_file()  # a folder, or a device such as /dev/stdout
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
    """Rename the versions of a file to `path.1`, `path.2`, ..., so that `path` is free; none is overwritten."""
    for number, version in enumerate(versions(path).values()):  # close a gap that a killed process may have left
        version.rename(path if number == 0 else f"{path}.{number}")
    for number, version in reversed(versions(path).items()):
        version.rename(f"{path}.{number + 1}")


def versions(path: Path) -> dict[int, Path]:
    """The existing files among `path`, `path.1`, `path.2`, ... by number, newest first; `path` itself is number 0."""
    found = {int(file.suffix[1:]): file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdecimal()}
    if os.path.lexists(path):
        found[0] = path
    return dict(sorted(found.items()))


def lock(file: TextIO, seconds: float = 0.0) -> None:
    """Lock a file exclusively, until it is closed here and in all processes that inherited it.

    Args:
        file: the open file.
        seconds: how long to wait for the lock.

    Raises:
        BlockingIOError: another process still holds the lock after this time.
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
    """Flush a folder's entries to disk, so that a rename survives a crash; no-op on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, hint: str = "") -> None:
    """Create a folder and its parents.

    Args:
        path: the folder; it may exist.
        hint: advice at the end of the error, such as `give another --output`.

    Raises:
        LocalGradError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        why = getattr(error, "strerror", None) or error
        raise LocalGradError(f"{path} cannot be made: {why}" + (f"; {hint}" if hint else "")) from error


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON, atomically; on one line with `indent=None`. NaN and infinities raise a ValueError."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path, *, finite: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        finite: refuse NaN and infinities, which Python's JSON allows.

    Raises:
        LocalGradError: the file is missing, cannot be read, or is no JSON.
    """

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(path.read_text(), parse_constant=refused if finite else None)
    except FileNotFoundError:
        raise LocalGradError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except OSError as error:
        raise LocalGradError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number that is too long, or too deep nesting
        raise LocalGradError(f"{path} is not readable as JSON ({error}); it was changed or cut short") from None
