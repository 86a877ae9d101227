"""Places that cannot be written: said before any work, on a real read-only file system; no error is hidden."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from localgrad.commands.main import main
from localgrad.errors import LocalGradError
from localgrad.runs import files
from localgrad.runs.files import check_writable

READ_ONLY = """
mount -t tmpfs none {place} && mount -o remount,ro {place} || exit 77
"$@"
"""
WRITING = {
    "time {place}": "{place}/step-times.json cannot be written: {place} is read-only; give another --output",
    "time {place} -o {place}/t.json": "{place}/t.json cannot be written: {place} is read-only; give another --output",
    "report {place} -o {place}/r.html": "{place}/r.html cannot be written: {place} is read-only; give another --output",
    "report {place} -o {place}/a/r.html": "{place}/a/r.html cannot be written: {place} is read-only; give another",
    "analyse {place}/run": "{place}/run/analysis cannot be written: {place} is read-only; give another --output",
    "plan cifar_resnet -o {place}/plan": "{place}/plan cannot be written: {place} is read-only; give another --output",
    "reproduce digits -o {place}/table": "{place}/table cannot be written: {place} is read-only; give another --output",
    "train digits-dgl --run-dir {place}/run": "{place}/run cannot be written: {place} is read-only; give another --run",
    "demo --run-dir {place}": "{place} cannot be written: {place} is read-only; give another --run-dir",
}


def on_read_only(place: Path, program: str, *arguments: str) -> str:
    """What a program prints where a read-only file system is mounted at a place."""
    command = ["unshare", "-rm", "sh", "-c", READ_ONLY.format(place=place), "sh", sys.executable, "-c", program]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode in (77, 1) and not done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_command_says_so_at_once(tmp_path: Path) -> None:
    program = """
import sys
from localgrad.commands.main import main
sys.stderr = sys.stdout
for command in sys.argv[1:]:
    assert main(command.split()) == 2, command
    assert "torch" not in sys.modules, command
"""
    said = on_read_only(tmp_path, program, *(command.format(place=tmp_path) for command in WRITING)).splitlines()
    expected = ["localgrad: " + message.format(place=tmp_path) for message in WRITING.values()]
    said = [line for line in said if not line.startswith("localgrad: trains ")]
    assert len(said) == len(expected)
    assert all(line.startswith(message) for line, message in zip(said, expected, strict=True)), said


def test_a_write_that_fails_later_says_why(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from localgrad.errors import LocalGradError
from localgrad.runs.files import atomic_write
try:
    with atomic_write(Path(sys.argv[1])) as file:
        file.write(b"")
except LocalGradError as error:
    print(error)
"""
    said = on_read_only(tmp_path, program, str(tmp_path / "page.html"))
    assert said == f"{tmp_path}/page.html could not be written (Read-only file system); what it held before is intact\n"


def test_a_cleanup_that_fails_does_not_hide_the_first_error(tmp_path: Path) -> None:
    """The folder becomes read-only while a file in it is written, so that the temporary file cannot be removed."""
    program = """
import os, sys
from pathlib import Path
from localgrad.runs.files import atomic_write
path = Path(sys.argv[1])
path.parent.mkdir()
if os.getuid() == 0:  # who may write everywhere
    os.chown(path.parent, 65534, 65534)
    os.chmod(path.parent.parent, 0o755)
    os.setuid(65534)
try:
    with atomic_write(path):
        path.parent.chmod(0o500)
        1 / 0
except ZeroDivisionError:
    print("first error", *(file.name.startswith(".page.html.") for file in path.parent.iterdir()))
"""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        path = str(folder / "inner" / "page.html")
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
        assert done.stdout == "first error True\n", done.stderr
    finally:
        shutil.rmtree(folder)


def test_the_same_where_no_file_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "page.html"):
        raise ZeroDivisionError


def test_what_can_be_written_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b" / "c.json")
    check_writable(Path(os.devnull))
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    with pytest.raises(LocalGradError, match=r"file/x/y cannot be made: .*file is a file; give another --output"):
        check_writable(tmp_path / "file" / "x" / "y")
    assert main(["train", "digits-dgl", "--run-dir", str(tmp_path / "file")]) == 2
    assert "cannot be" in capsys.readouterr().err
