"""The code in the documents runs, page by page, as it stands."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, names)
    assert names


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"{page.relative_to(ROOT / 'docs')}" in navigation, page


def test_the_examples_of_docstrings_run() -> None:
    modules = [path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text()]
    assert modules
    for path in modules:
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        outcome = doctest.testmod(importlib.import_module(name))
        assert outcome.attempted
        assert not outcome.failed, name
