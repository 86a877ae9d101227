"""The code in the documents runs, page by page, as it stands."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import localgrad
from localgrad import errors

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


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = {*re.findall(r"^::: (\S+)$", pages, re.M)}
    assert {f"localgrad.{name}" for name in localgrad.__all__} <= shown
    kinds = [kind.__name__ for kind in vars(errors).values() if isinstance(kind, type)]
    assert {f"localgrad.errors.{name}" for name in kinds} <= shown


def test_every_name_of_localgrad_that_a_text_gives_exists() -> None:
    """In messages, docstrings and pages; benchmarks and examples import what they use."""
    texts = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    named = {name for path in texts for name in re.findall(r"localgrad(?:\.[A-Za-z_]\w*)+", path.read_text())}
    assert len(named) > 100
    assert not [name for name in sorted(named) if not _exists(name)]


def _exists(name: str) -> bool:
    """Whether a dotted name is a module of localgrad, or an attribute of one."""
    files = [path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    module = max((each for each in modules if f"{name}.".startswith(f"{each}.")), key=len)
    value: Any = importlib.import_module(module)
    for attribute in name.removeprefix(module).split(".")[1:]:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


def test_the_examples_of_docstrings_run() -> None:
    modules = [path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text()]
    assert modules
    for path in modules:
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        outcome = doctest.testmod(importlib.import_module(name))
        assert outcome.attempted
        assert not outcome.failed, name
