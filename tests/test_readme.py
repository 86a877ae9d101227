"""The README's code runs as it stands, and the package keeps its promises about names and imports."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import localgrad

README = (Path(__file__).parents[1] / "README.md").read_text()
GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CODE_WORDS = {word for code in re.findall(r"`+([^`]+)`+", README) for word in re.findall(r"\w+", code)}
"""The words of README's code, inline and in blocks: "man" is in "command", and "plan" in prose."""


def test_the_code_of_the_readme_trains_a_model() -> None:
    torch.manual_seed(0)
    names = {"loader": [(torch.randn(4, 3, 64, 64), torch.arange(4)) for _ in range(2)]}
    exec(BLOCKS[0], names)
    assert len(BLOCKS) == 1
    losses = names["isolation"].losses
    assert len(losses) == 3
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
    untrained = torchvision.models.resnet18(num_classes=10).state_dict()
    assert names["model"].state_dict().keys() == untrained.keys()


def test_the_public_names_have_docstrings() -> None:
    assert len(localgrad.__all__) <= 20
    for name in localgrad.__all__:
        assert name in CODE_WORDS or name in ("Block", "Isolation", "Site"), name
        assert (getattr(localgrad, name).__doc__ or "").strip(), name


def test_the_papers_errors_in_the_text_are_those_of_the_recipes() -> None:
    from localgrad.recipes import recipe

    errors = [recipe(f"cifar10-resnet32-{row}").paper_error for row in ("e2e", "k16-dgl", "k16-dgl-man")]
    said = "{:.2f} % end-to-end, {:.2f} % for DGL and {:.2f} % for DGL + MAN".format(*errors)
    assert said in " ".join(README.split())


def test_importing_localgrad_imports_nothing_heavy() -> None:
    heavy = "torchvision", "datasets", "matplotlib", "sklearn", "lightning", "timm", "rich", "tyro", "PIL", "pandas"
    code = f"import sys, localgrad; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_guide_names_every_command_and_no_other() -> None:
    from localgrad.commands.main import COMMANDS

    assert {*re.findall(r"(?:^ +|`)localgrad (\w+) ", GUIDE, re.M)} == {*COMMANDS}


def test_the_figures_of_the_documents_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "documents.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("documents", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for document in module.DOCUMENTS:
        assert module.filled(document.read_text()) == document.read_text()
    memory = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    assert module.filled(memory.replace("15.56", "14.56")) == memory
    assert "15.56" in memory


def test_every_flag_that_is_documented_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from localgrad.commands.main import COMMANDS, main
    from localgrad.commands.parse import SHORT

    root = Path(__file__).parents[1]
    pages = [root / "README.md", root / "CONTRIBUTING.md", root / "benchmarks" / "README.md", *root.glob("docs/*.md")]
    texts = {str(path): path.read_text() for path in pages}
    texts |= {name: str(importlib.import_module(f"localgrad.commands.{name}").__doc__) for name in COMMANDS}
    flags, count = {}, 0
    monkeypatch.setenv("COLUMNS", "110")
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        flags[name] = {word.strip(",") for word in capsys.readouterr().out.split() if word.startswith("-")}
    flags["train"] |= {*SHORT}
    flags["predict"] |= {"--json"}
    for where, text in texts.items():
        for name, given in re.findall(rf"localgrad ({'|'.join(COMMANDS)})( [^`\n#|]*)?", text.replace("\\\n", " ")):
            for flag in re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", given):
                assert flag.rstrip(".") in flags[name], (where, name, flag)
                count += 1
    assert count > 50
