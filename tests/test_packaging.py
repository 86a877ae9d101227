"""The package: what it declares is what it imports, and a command without its extra says which one to install."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}


def imported(folder: Path) -> set[str]:
    """Top-level packages that the files of a folder import, inside functions too."""
    found = set[str]()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"localgrad"}


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {line.partition("[")[0].partition(">")[0].partition("=")[0].strip().lower() for line in lines}


def test_every_import_is_declared() -> None:
    names = {NAMES.get(name, name) for name in imported(ROOT / "src")}
    assert names <= declared("train", "timm", "tensorboard")


def test_the_library_depends_on_torch_and_numpy_alone() -> None:
    assert declared() == {"torch", "numpy"}


@pytest.mark.parametrize("command", [["recipes"], ["units", "cifar_resnet"], ["train", "digits-dgl"]])
def test_a_command_without_its_extra_says_which_to_install(command: list[str]) -> None:
    program = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tyro", "rich", "lightning", "datasets"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from localgrad.commands.main import main
sys.exit(main({command!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "pip install 'localgrad[train]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
