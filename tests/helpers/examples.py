"""The scripts of `examples/` as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples"
sys.path.append(str(FOLDER))  # as for a script that is run: the files beside it


def example(name: str) -> ModuleType:
    """The script `examples/NAME.py`."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
