"""Help and first signs: every flag in words at any width, nothing heavy is loaded for it, short flags work."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest

from localgrad.commands.main import COMMANDS, main
from localgrad.commands.parse import SHORT, loading
from localgrad.config.schema import TrainConfig


def flags(kind: Any = TrainConfig, prefix: str = "") -> list[str]:
    """All flags of `train` that are fields of a config."""
    found = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        inner = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        found += flags(inner, f"{name}.") if inner else [f"--{name}"]
    return found


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_help_of_train_lists_every_flag_in_words(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = helped(capsys, "train")
    listed = {word for line in out.splitlines() for word in line.replace(",", " ").split()}
    assert {*flags(), "--run-dir", "--resume", "--dry-run", "--quiet"} <= listed
    assert "data options" in out and "optim options" in out and "model options" in out  # in groups
    assert "{None}" not in out and "STR" not in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("usage")) <= columns


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help_of_each_command_has_a_sentence_for_each_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = helped(capsys, command)
    assert f"localgrad {command}" in out and "{None}" not in out and "STR" not in out
    signature = inspect.signature(getattr(importlib.import_module(f"localgrad.commands.{command}"), command))
    for name, parameter in signature.parameters.items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in out if parameter.kind is parameter.KEYWORD_ONLY else flag.upper() in out
    said = out.count("(default: ") + out.count("(required)")
    assert said >= len(signature.parameters) - 1  # an empty word is no default


@pytest.mark.parametrize("words", ["--version", "--help", "train --help", "recipes vit", "reproduce", "plan --help"])
def test_what_needs_no_network_to_train_loads_no_torch(words: str) -> None:
    """So that it is there in well under two seconds."""
    program = f"""
import sys
from localgrad.commands.main import main
try:
    main({words.split()!r})
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.split()[-1] == "False" and done.stdout


def test_loading_is_said_after_a_second(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("localgrad.commands.parse.QUIET_SECONDS", 0.0)
    import time

    with loading():
        time.sleep(0.2)
    assert capsys.readouterr().err == "localgrad: loading PyTorch ...\n"
    with loading(quiet=True):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_short_flags_stand_for_flags_that_there_are() -> None:
    assert {*SHORT.values()} <= {*flags()}


@pytest.mark.parametrize("command", ["analyse", "plan", "report", "reproduce", "time"])
def test_output_has_a_letter_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "-o" in helped(capsys, command).replace(",", " ").split()
