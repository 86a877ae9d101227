"""The house: which package may import which, and what each needs from outside."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from torch import nn

SOURCE = Path(__file__).parents[1] / "src" / "localgrad"
FLOORS = (
    "errors",
    "core",
    "objectives",
    "planning parallel models",
    "data",
    "config",
    "recipes runs",
    "training",
    "results",
    "analysis",
    "commands",
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
CORE = ("core", "objectives", "planning", "parallel")
PRIVATE = {
    "core.autograd_graph": "_C _autograd _forward_cls _sequence_nr _top_saved_tensors_default_hooks",
    "core.eager": "_disable_dynamo",
    "core.initialise": "_reset_parameters",
    "core.recompute": "_NormBase",
    "core.replicas": "_ddp_ignored _ddp_params_and_buffers_to_ignore _get_active_ddp_module _module_parameters"
    " _set_params_and_buffers_to_ignore_for_model",
    "core.tables": "_modules _parameters _buffers _forward_hooks _forward_pre_hooks _backward_hooks"
    " _backward_pre_hooks",
    "core.tracing": "_tensor_constant",
    "core.trees": "_pytree",
    "core.versions": "_version",
    "core.wrapped": "_orig_mod",
    "parallel.batchnorm": "_BatchNorm",
    "planning.measure": "_python_dispatch _scaled_dot_product_flash_attention"
    " _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_flash_attention_for_cpu_backward",
    "planning.simulation": "_subclasses",
    "training.devices": "_is_mkldnn_bf16_supported",
    "training.nonfinite": "_step_supports_amp_scaling",
}
"""The private names of torch that the project uses, each in the one file that names it."""
TABLES = set(vars(nn.Module()))
NOT_OF_TORCH = {"_exit", "_localgrad_", "_patch16_224"}  # of os, and parts of names of modules and models
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def arrows() -> dict[str, set[str]]:
    """Of each module the modules of localgrad that it imports, inside functions too."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "localgrad":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[module].add(full if full in MODULES else str(node.module))
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & MODULES.keys()
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_package_imports_one_above_it() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if package(module) != package(target)
        and package(module)  # the root holds the public names
        and FLOOR.get(package(module), len(FLOORS)) <= FLOOR.get(package(target), len(FLOORS))
    ]
    assert not wrong


def test_no_circle_of_imports() -> None:
    graph, done = arrows(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        for target in graph[module]:
            visit(target, (*path, module))
        done.add(module)

    for module in MODULES:
        if module != "localgrad":  # the root imports what is public, and nothing imports the root
            visit(module, ())


def test_the_root_has_few_rooms() -> None:
    rooms = [path for path in SOURCE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(rooms) <= 18


def test_the_core_needs_torch_and_numpy_alone() -> None:
    """Import `localgrad` and every module of the core packages where nothing else can be imported."""
    modules = sorted(module for module in MODULES if package(module) in CORE)
    program = f"""
import importlib, sys
import torch, numpy
import torch.distributed.fsdp, torch.utils.flop_counter, torch._subclasses.fake_tensor, torch.utils.checkpoint
import torch.nn.parallel, torch.optim.swa_utils, torch.distributed._composable
allowed = set(sys.stdlib_module_names) | {{name.partition(".")[0] for name in sys.modules}} | {{"localgrad"}}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{{name}} is not torch, NumPy or the standard library")

sys.meta_path.insert(0, Blocked())
for name in ["localgrad", *{modules!r}]:
    importlib.import_module(name)
import localgrad
localgrad.plan
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("name", ["localgrad.planning.plan", "torch.utils.flop_counter"])
def test_importing_localgrad_leaves_the_planner_out(name: str) -> None:
    program = (
        f"import sys, torch; before = {name!r} in sys.modules; import localgrad; print(before, {name!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    before, after = done.stdout.split()
    assert after == before


def test_no_other_file_knows_an_objective_by_name() -> None:
    """A new objective touches its own file, the public names, the list of methods, and the tests' cases."""
    from localgrad.config.methods import OBJECTIVES

    listed = (SOURCE / "config" / "schema.py").read_text()
    assert all(f"`{name}`" in listed for name in OBJECTIVES), "the help of --objective.name lists them"
    known = {"localgrad", "localgrad.config.methods"}
    for module, path in MODULES.items():
        if module in known or package(module) in ("objectives", "recipes"):
            continue
        tree = ast.parse(path.read_text())
        imported = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("localgrad.objectives.")
        }
        assert not imported & {f"localgrad.objectives.{name}" for name in OBJECTIVES}, module
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not words & (OBJECTIVES.keys() - {"classifier"}), module


def private_names(source: str) -> set[str]:
    """Names with a leading underscore that a file takes from elsewhere: attributes, imports, and names in quotes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= {node.attr} if not is_own or node.attr in TABLES else set()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "localgrad":
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return {name for name in found if name.strip("_") and name.startswith("_") and not name.startswith("__")}


def test_each_private_name_of_torch_is_in_one_file() -> None:
    """A new release of torch may rename it: then there is one place to mend."""
    homes = {name: f"localgrad.{module}" for module, names in PRIVATE.items() for name in names.split()}
    used = {
        (name, module) for module, path in MODULES.items() for name in private_names(path.read_text()) - NOT_OF_TORCH
    }
    assert used == set(homes.items())


@pytest.mark.parametrize(
    "line",
    [
        "from torch._dynamo import reset",
        "from torch.utils import _pytree as trees",
        "import torch._inductor.config as config",
        "layer._parameters.clear()",
        "self.layer._buffers['mean'] = None",
        "hasattr(model, '_orig_mod')",
        "torch.Tensor._version",
        "self._modules.clear()",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert len(private_names(line)) == 1
    assert not private_names("self._own = cls._other = _local(__name__, '_', '_two words')")


READS_WORDS = re.compile(r"\bin str\(|\bstr\(\w+\)\.(startswith|endswith|find|count)|\.args\[0\]\.|message=r?[\"']")
"""How code looks that decides by the text of an error, or silences a warning by its text."""


def test_the_words_of_errors_are_read_in_one_file() -> None:
    reading = {module for module, path in MODULES.items() if READS_WORDS.search(path.read_text())}
    assert reading == {"localgrad.core.wording"}


@pytest.mark.parametrize(
    "line",
    [
        'if "CUDA error" in str(error):',
        'str(problem).startswith("no")',
        'error.args[0].count("a")',
        'warnings.filterwarnings("ignore", message="This")',
    ],
)
def test_code_that_reads_words_is_found(line: str) -> None:
    assert READS_WORDS.search(line)
    assert not READS_WORDS.search('f"{str(error)[:200]}"')


LONGEST = 50
"""Lines of a function, docstring and signature aside."""


def test_a_function_fits_a_screen() -> None:
    def length(function: ast.FunctionDef) -> int:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore[reportOptionalOperand]

    lengths = {
        f"{module}.{node.name}": length(node)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(lengths) > 500 and not {name: lines for name, lines in lengths.items() if lines > LONGEST}


PATCHES = {"setattr", "delattr", "setitem", "delitem"}


def test_no_test_patches_a_name_of_the_library() -> None:
    """A test gives what it needs: images, a network, a signal, a clock."""
    found: set[str] = set()
    for path in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = {a.asname or a.name for node in imports if str(node.module).startswith("localgrad") for a in node.names}
        for node in ast.walk(tree):
            patched = [target for target in getattr(node, "targets", []) if isinstance(target, ast.Attribute)]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES:
                patched = node.args[:1]
            names = {ast.unparse(part) for part in patched}
            found |= {name for name in names if name.strip("'").split(".")[0] in {*own, "localgrad"}}
    assert not found


def test_no_test_imports_a_test() -> None:
    """What tests share is in `helpers/`."""
    files = [*Path(__file__).parent.rglob("*.py")]
    found = [path.name for path in files if re.search(r"^\s*(from|import) (\w+\.)*test_", path.read_text(), re.M)]
    assert not found
