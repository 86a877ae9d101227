"""Ctrl-C in the first seconds, while modules are loaded, is one line and exit code 130; warnings are sentences."""

import importlib
import os
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localgrad.commands import parse
from localgrad.commands.main import main
from localgrad.errors import LocalGradWarning


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("words", ["train digits-dgl --quiet", "evaluate run", "report results", "plan cifar_resnet"])
def test_an_interrupt_while_loading_is_one_line(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(words.split()) == 130
    assert capsys.readouterr() == ("", "localgrad: interrupted\n")


def heed() -> None:
    """Ctrl-C counts in a child, also of a suite in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


PRESSED = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Press(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
sys.argv = ["localgrad", *{words!r}]
from localgrad.__main__ import main
sys.exit(main())
"""
"""A process in which Ctrl-C is pressed when a module is about to be imported."""


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("recipes", "localgrad.commands.main"),
        ("recipes", "tyro"),
        ("train digits-dgl --run-dir {folder}/run", "localgrad.config.schema"),
        ("train digits-dgl --run-dir {folder}/run", "numpy._core.multiarray"),
        ("train digits-dgl --run-dir {folder}/run", "lightning.fabric"),
        ("demo --run-dir {folder}/demo", "torch"),
        ("report {folder}", "matplotlib"),
        ("predict {folder} cat.jpg", "torch"),
        ("evaluate {folder}", "torch"),
    ],
)
def test_ctrl_c_before_the_work_is_one_line_and_leaves_nothing(words: str, module: str, tmp_path: Path) -> None:
    program = PRESSED.format(module=module, words=words.format(folder=tmp_path).split())
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=heed,
    )
    progress = ("localgrad: loading ", "localgrad: trains ")  # what may be said before the work begins
    said = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    assert (done.returncode, said, done.stdout) == (130, ["localgrad: interrupted"], "")
    assert not list(tmp_path.iterdir())


def test_the_command_is_the_module_that_sets_the_handler_first() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"localgrad": "localgrad.__main__:main"}


def test_the_handler_stands_before_anything_takes_time() -> None:
    """Nothing but Python's own start-up and what a signal needs comes before it."""
    program = """
import sys
before = {*sys.modules}
import localgrad.commands.interrupts
print(*sorted({name.partition(".")[0] for name in {*sys.modules} - before}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert {*done.stdout.split()} <= {
        *("localgrad", "importlib", "warnings", "signal", "_signal", "__future__"),
        *("enum", "functools", "types", "operator", "reprlib", "keyword", "itertools"),  # `enum` is of `signal`
        *("collections", "_collections", "_functools", "_operator"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("words", ["train digits-dgl --run-dir {folder}/run", "demo --run-dir {folder}/demo"])
def test_ctrl_c_in_the_first_seconds_is_as_clean_as_later(words: str, tmp_path: Path) -> None:
    """Python's own start-up is before 0.15 s here, unless the machine is very busy; nothing can be said in it."""
    for number, seconds in enumerate((0.15, 0.3, 0.6, 1, 2, 4)):
        arguments = words.format(folder=tmp_path / str(number)).split()
        process = subprocess.Popen(
            [sys.executable, "-m", "localgrad", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed,
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "Traceback" not in said, (seconds, said)
        assert sum("interrupted" in line for line in said.splitlines()) == 1


def test_ctrl_c_while_a_string_is_executed_ends_with_the_same_code(tmp_path: Path) -> None:
    """`python -m` forgets the exit code after a KeyboardInterrupt in `exec` of a string, as `dataclass` calls it."""
    (tmp_path / "pressed.py").write_text(
        """
import os, signal, sys
from localgrad.commands.interrupts import leave_at_once, raise_again

leave_at_once()
raise_again()
try:
    exec("os.kill(os.getpid(), signal.SIGINT); [number for number in range(1000)]")
except KeyboardInterrupt:
    sys.exit(130)
"""
    )
    command = [sys.executable, "-m", "pressed"]
    done = subprocess.run(command, cwd=tmp_path, check=False, timeout=60, preexec_fn=heed)
    assert done.returncode == 130


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    program = PRESSED.format(module="tyro", words=["recipes", "vit"])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as `nohup` and `command &` in a script do
    )
    assert (done.returncode, done.stderr) == (0, "") and "vit" in done.stdout


def test_work_that_is_interrupted_is_an_exception_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that files are closed and what is half written is removed."""
    from localgrad.commands.interrupts import leave_at_once

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        leave_at_once()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        with parse.loading(quiet=True):
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_warning_of_the_library_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*_: Any) -> Any:
        warnings.warn("the block trains nothing", LocalGradWarning, stacklevel=2)
        return SimpleNamespace(main=lambda _: 0)

    monkeypatch.setattr(importlib, "import_module", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["recipes"]) == 0
    assert capsys.readouterr().err == "localgrad: the block trains nothing\n"
