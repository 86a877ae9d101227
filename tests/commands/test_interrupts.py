"""Ctrl-C in the first seconds, while modules are loaded, is one line and exit code 130; warnings are sentences."""

import importlib
import warnings
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


def test_an_interrupt_while_torch_is_loading_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localgrad.commands.evaluate.loading", interrupted)
    assert parse.QUIET_SECONDS > 0
    assert main(["evaluate", "run"]) == 130
    assert capsys.readouterr().err == "localgrad: interrupted\n"


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
