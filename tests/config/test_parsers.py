"""Whatever the files of a run folder hold: reading them gives what was written, or a `LocalGradError` of one line."""

import copy
import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.runs import LOCAL, NORM_FREE, few
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.saved import from_dict, to_dict
from localgrad.errors import LocalGradError
from localgrad.runs.folder import RunFolder
from localgrad.training import checkpoint
from localgrad.training.build import build_run
from localgrad.training.run import Run

many = settings(few, max_examples=60)

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    plain | st.sampled_from(["dgl", "man", "../x", "train", 2**64, 10**400, -1, 0, 1e-320]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)
tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]),
)


@cache
def home() -> RunFolder:
    """The folder of the run."""
    folder = RunFolder(Path(tempfile.mkdtemp()))
    folder.start(with_defaults(NORM_FREE), 0)
    return folder


@cache
def run() -> Run:
    """A run whose objects checkpoints are loaded into, with one step's worth of optimizer state."""
    made = build_run(with_defaults(NORM_FREE))
    for optimizer in made.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    checkpoint.save(made, home())
    return made


@cache
def saved() -> dict[str, Any]:
    run()
    return home().newest_checkpoint()[1]


def refused_or(read: Callable[[], Any]) -> Any:
    """What reading gives; None where it was refused in one line."""
    try:
        return read()
    except LocalGradError as error:
        assert "\n" not in str(error)
        assert "weights_only" not in str(error)
        event("refused")
        return None


def replaced(data: st.DataObject, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """A copy of a tree of tables and lists with one place, at a random depth, dropped, added or given another value."""
    if not isinstance(tree, dict | list) or not tree or data.draw(st.integers(0, 5)) == 0:
        return data.draw(values)
    changed = copy.copy(tree)
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = data.draw(st.sampled_from(keys))
    how = data.draw(st.integers(0, 9))
    if how == 0:
        del changed[key]
    elif how == 1 and isinstance(changed, dict):
        changed[data.draw(st.text(max_size=6))] = data.draw(values)
    elif how == 1:
        changed.append(data.draw(values))
    else:
        changed[key] = replaced(data, tree[key], values)
    return changed


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """Bytes with a part cut off, taken out, put in twice, overwritten, or a bit flipped."""
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = min(len(whole), start + data.draw(st.integers(1, 64)))
    how = data.draw(st.sampled_from(["cut", "lose", "repeat", "overwrite", "flip", "append"]))
    if how == "cut":
        return whole[:start]
    if how == "lose":
        return whole[:start] + whole[stop:]
    if how == "repeat":
        return whole[:stop] + whole[start:]
    if how == "flip":
        return whole[:start] + bytes([whole[start] ^ 1 << data.draw(st.integers(0, 7))]) + whole[start + 1 :]
    noise = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
    return whole[:start] + noise + whole[stop:] if how == "overwrite" else whole + noise


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _config(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        (folder.path / "config.json").write_bytes(text)
        config = refused_or(lambda: validate(folder.config()))
    if config is not None:
        event("accepted")
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again == config
        assert math.isfinite(config.optim.lr)


@many
@given(st.data())
def test_a_changed_config(data: st.DataObject) -> None:
    tree = to_dict(LOCAL)
    for _ in range(data.draw(st.integers(1, 3))):
        tree = replaced(data, tree, json_values)
    _config(json.dumps(tree).encode())


@many
@given(json_values)
def test_a_config_of_any_values(values: Any) -> None:
    _config(json.dumps(values).encode())


@many
@given(st.data())
def test_a_config_of_damaged_bytes(data: st.DataObject) -> None:
    _config(damaged(data, json.dumps(to_dict(LOCAL), indent=2).encode()))


@many
@given(st.data())
def test_a_checkpoint_of_damaged_bytes(data: st.DataObject) -> None:
    """It is what was written, or it is refused: nothing in between."""
    run()
    whole = home().checkpoint.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        folder.checkpoint.write_bytes(damaged(data, whole))
        found = refused_or(lambda: folder.newest_checkpoint()[1])
    assert found is None or same(found, saved())


@many
@given(st.data())
def test_a_checkpoint_of_changed_content(data: st.DataObject) -> None:
    tree = replaced(data, saved(), json_values | tensors)
    made = run()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        torch.save(tree, folder.checkpoint)
        refused_or(lambda: checkpoint.load(made, folder))


@many
@given(st.data())
def test_weights_of_damaged_bytes(data: st.DataObject) -> None:
    made = run()
    home().save_model(made.model.state_dict())
    whole = home().model.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        folder.model.write_bytes(damaged(data, whole))
        refused_or(lambda: folder.load_model(copy.deepcopy(made.model)))


def test_what_was_written_is_read() -> None:
    """So that the refusals above are not for another reason."""
    made = run()
    checkpoint.load(made, home())
    home().save_model(made.model.state_dict())
    home().load_model(made.model)
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt"):
        broken = {**saved(), "optimizers": saved()["optimizers"][:1]}
        with tempfile.TemporaryDirectory() as scratch:
            folder = RunFolder(Path(scratch))
            folder.save_checkpoint(broken)
            checkpoint.load(made, folder)
