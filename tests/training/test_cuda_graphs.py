"""Recorded steps. A processor has no graphs, so a tape stands in that keeps and repeats operators as CUDA does."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.runs import ADAMW, LOCAL, SKIP, assert_same_run, equal, everything, reproducible, weights
from helpers.training import CrashError, crash, eventful, fit_as_on_cuda, work_as_on_cuda
from localgrad.commands.main import main
from localgrad.config.checks import validate
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.training.build import build_run
from localgrad.training.cuda_graphs import GraphedStep
from localgrad.training.schedule import set_learning_rate
from localgrad.training.step import train_step
from localgrad.training.trainer import epoch_batches, fit


class Tape(TorchDispatchMode):
    """What a CUDA graph does, with operators for kernels.

    While it records nothing is changed: contents of tensors that were there before are put back at the end. A replay
    runs the same operators on the same tensors in the same order; numbers that were Python's stay as they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _tensors((args, kwargs)):
            pointer = value.untyped_storage().data_ptr()
            if pointer not in self._made and pointer not in self._before:
                self._before[pointer] = (_bytes(value), _bytes(value).clone())
        result = func(*args, **kwargs)
        results = _tensors(result)
        self._made |= {value.untyped_storage().data_ptr() for value in results} - self._before.keys()
        self.operators.append((func, args, kwargs, results))
        return result

    def put_back(self) -> None:
        for now, before in self._before.values():
            now.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.operators:
            for kept, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if kept.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    kept.detach().copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes that are recorded."""
    made: list[Tape] = []

    def tape() -> Tape:
        made.append(Tape())
        return made[-1]

    @contextlib.contextmanager
    def recording(graph: Tape, pool: Any, capture_error_mode: str) -> Iterator[None]:
        with graph:
            yield
        graph.put_back()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    return made


def test_a_step_is_recorded_once_a_shape_after_two_that_are_not(tapes: list[Tape]) -> None:
    weight, calls = torch.zeros(()), []

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(inputs))
        weight.add_(inputs.sum() + targets.sum())
        return (weight * 1,)

    graphed, total = GraphedStep(step), 0.0
    outputs = []
    for number, size in enumerate([2, 2, 3, 2, 3, 2, 3, 3], start=1):
        total += size * number + size
        outputs.append((graphed(torch.full((size,), float(number)), torch.ones(size, dtype=torch.long))[0], total))
    assert all(float(output) == expected for output, expected in outputs), "outputs of earlier steps stay as they were"
    assert calls == [2, 2, 3, 2, 3, 3], "of each size: two that are not recorded, one that is"
    assert len(tapes) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [LOCAL, SKIP, replace(LOCAL, step_each_block=True), replace(LOCAL, optim=ADAMW)],
    ids=["stop", "skip", "each block", "adamw"],
)
def test_a_replayed_run_is_the_same_run(config: TrainConfig, tmp_path: Path, tapes: list[Tape]) -> None:
    """Three epochs with three learning rates, and a last batch of another size."""
    config = replace(config, optim=replace(config.optim, epochs=3))
    fit_as_on_cuda(config, tmp_path / "replayed", recorded=True)
    assert len(tapes) == 2, "16 images, and the last 2 of an epoch"
    fit(config, tmp_path / "plain", quiet=True)
    replayed, plain = (weights(tmp_path / run) for run in ("replayed", "plain"))
    # on the device a learning rate is a float32, which AdamW would otherwise compute with as a float64
    tolerance = 1e-5 if config.optim.name == "adamw" else 0.0
    torch.testing.assert_close(replayed, plain, rtol=tolerance, atol=tolerance)
    lines = [reproducible(tmp_path / run) for run in ("replayed", "plain")]
    assert [line["lr"] for line in lines[0]] == [line["lr"] for line in lines[1]]
    if not tolerance:
        assert lines[0] == lines[1]


def test_bad_batches_are_skipped_in_a_replay_too_and_stop_it(tmp_path: Path, tapes: list[Tape]) -> None:
    run = build_run(SKIP)
    work_as_on_cuda(run, recorded=True)
    set_learning_rate(run.optimizers, 0.1, run.rate)
    batches = [batch for batch in epoch_batches(run) if len(batch[0]) == 16]
    for inputs, targets in batches:
        train_step(run, inputs, targets)
    assert len(tapes) == 1
    bad = (batches[0][0] * float("nan"), batches[0][1])
    before = everything(run)
    train_step(run, *bad)
    train_step(run, *bad)
    assert equal(everything(run), before)
    train_step(run, *batches[0])
    after = everything(run)
    assert not equal(after, before)
    for _ in range(3):
        train_step(run, *bad)
    with pytest.raises(LocalGradError, match=" 2 batches"):
        train_step(run, *batches[0])
    assert run.state.skipped == 4
    assert equal(everything(run), after), "a good batch after it finds the run stopped"


def test_an_interrupted_replayed_run_resumes_to_the_same_bits(tmp_path: Path, tapes: list[Tape]) -> None:
    fit_as_on_cuda(LOCAL, tmp_path / "straight", recorded=True)
    config = replace(LOCAL, checkpoint_every=3)
    with pytest.raises(CrashError):
        fit_as_on_cuda(config, tmp_path / "run", images=eventful(config, {}, evaluation={1: crash}), recorded=True)
    fit_as_on_cuda(config, tmp_path / "run", resume=True, recorded=True)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert tapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator": "cpu"}, "cuda_graph is on with accelerator cpu and devices 1: it takes one CUDA device"),
        ({"accelerator": "cuda", "devices": 2}, "devices 2: it takes one CUDA device"),
        ({"accelerator": "cuda", "recompute": True}, "cuda_graph goes not with recompute"),
        ({"accelerator": "cuda", "momentum": replace(LOCAL.momentum, recompute=True)}, "cuda_graph goes not with rec"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        validate(replace(LOCAL, cuda_graph=True, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--data.train-limit 40 --data.test-limit 20 --optim.batch-size 20"
    run = ["train", "digits-dgl", "--run-dir", str(tmp_path / "run"), "--cuda-graph", *small.split()]
    assert main(run) == 2
    said = capsys.readouterr().err
    assert said.startswith("localgrad: cuda_graph is on and the device is cpu")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
