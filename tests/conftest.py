"""One thread a test process: small tensors gain nothing from more, and bits do not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest


@pytest.fixture(autouse=True)
def _no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as in a file, also where pytest's workers pass on the width of a terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)
