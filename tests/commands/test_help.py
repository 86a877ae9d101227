"""Help and first signs: every flag in words at any width, nothing heavy is loaded for it, short flags work."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from localgrad.commands.help import paragraphs
from localgrad.commands.main import COMMANDS, main
from localgrad.commands.parse import SHORT, loading
from localgrad.config.schema import TrainConfig
from localgrad.errors import closest


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
    assert max(len(line) for line in out.splitlines()) <= columns


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_breaks_lines_between_words_and_only_where_they_are_full(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word or flag is split, and no line ends early because the source's line does."""
    monkeypatch.setenv("COLUMNS", "110")
    whole = helped(capsys, command)
    monkeypatch.setenv("COLUMNS", str(columns))
    out = helped(capsys, command)
    assert [word for word in out.split() if word != "\\"] == [word for word in whole.split() if word != "\\"]
    module = importlib.import_module(f"localgrad.commands.{command}")
    assert {*str(module.__doc__).split()} <= {*out.split()}
    lines = out.splitlines()
    assert all(len(line) <= columns for line in lines)
    for line, after in pairwise(lines):
        indent, (first, *_) = len(after) - len(after.lstrip()), [*after.split(), ""]
        begins = line.endswith((":", "\\")) or after.endswith(":") or indent == 2 or line.lstrip().startswith("usage")
        if line and after and indent == len(line) - len(line.lstrip()) and not begins:
            assert len(line) + 1 + len(first) > columns, (line, after)


def test_a_paragraph_is_filled_and_an_example_goes_on_behind_a_backslash() -> None:
    text = "One\ntwo-three\nfour.\n\nExamples:\n  localgrad train a --epochs 3\n  localgrad b"
    lines = ["One two-three four.", "", "Examples:", "  localgrad train \\", "      a --epochs 3", "  localgrad b"]
    assert paragraphs(text, 20).splitlines() == lines
    assert paragraphs("a/very/long/path/without/end", 9) == "a/very/long/path/without/end"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help_of_each_command_has_a_sentence_for_each_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = helped(capsys, command)
    assert f"localgrad {command}" in out and "{None}" not in out and "STR" not in out
    signature = inspect.signature(getattr(importlib.import_module(f"localgrad.commands.{command}"), command))
    for name, parameter in signature.parameters.items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in out if parameter.kind is parameter.KEYWORD_ONLY else flag.upper() in out
    said = " ".join(out.split()).count("(default: ") + out.count("(required)")
    assert said >= len(signature.parameters) - 1  # an empty word is no default


@pytest.mark.parametrize("words", ["--version", "--help", "train --help", "recipes vit", "reproduce", "plan --help"])
def test_what_needs_no_network_to_train_loads_no_torch(words: str) -> None:
    """So that it is there in well under two seconds."""
    program = f"""
import sys
from localgrad.commands.help import paragraphs
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
    import time

    said, give_up = "", time.monotonic() + 60
    with loading(seconds=0.0):
        while not said.endswith("\n") and time.monotonic() < give_up:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert said == "localgrad: loading PyTorch ...\n"
    with loading(quiet=True, seconds=0.0):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_short_flags_stand_for_flags_that_there_are() -> None:
    assert {*SHORT.values()} <= {*flags()}


@pytest.mark.parametrize("command", ["analyse", "plan", "report", "reproduce", "time"])
def test_output_has_a_letter_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "-o" in helped(capsys, command).replace(",", " ").split()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digits-e2e", "--epohcs", "3"], f"--epohcs, 3{closest('--epohcs', ['--epochs'])}"),
        (["train", "digits-e2e", "--optim.epochs", "abc"], "--optim.epochs: 'abc' is no whole number"),
        (["train", "digits-e2e", "--optim.epochs"], "--optim.epochs"),
        (["report"], "RESULTS"),
        (["time", "a", "b"], "b"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    *before, line = err.splitlines()
    assert len(before) <= 1 and all(other.endswith(" ...") for other in before)
    assert said in line and f"localgrad {words[0]}" in line and "--help" in line
