"""Check that pieces compute what the model does: both run on the same batch, in training and evaluation mode."""

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from localgrad.core.autograd_graph import leaf_of
from localgrad.core.pieces import Piece
from localgrad.core.restore import restored
from localgrad.core.versions import version
from localgrad.errors import NotTraceableError


@dataclass(frozen=True, eq=False)
class _Outcome:
    """The result of one run of a model, or of its pieces.

    Attributes:
        output: the detached output; None if it is no tensor.
        buffers: copies of the model's buffers after the run.
        drawn: states of the random generators after the run.
        reached: ids of the parameters that a backward pass from the output would reach.
        reentrant: number of reentrant checkpoints in the autograd graph, which hide their parameters.
        kept: number of tensors that autograd saved for the backward pass.
    """

    output: Tensor | None
    buffers: list[Tensor]
    drawn: tuple[Any, ...]
    reached: set[int]
    reentrant: int
    kept: int


def check_composition(model: nn.Module, pieces: Sequence[Piece], samples: Tensor) -> list[bool] | None:
    """Compare pieces and model in both modes: outputs, buffers, random draws, and which parameters get a gradient.

    A trace holds flags, numbers and branches as constants. Named submodules leave out what the forward pass does
    between them. The comparison finds both.

    Returns:
        Whether each piece changes its input in place while training; None on the meta device, which has no values.

    Raises:
        LocalGradError: the pieces do not compute what the model does, or the model checkpoints activations itself.
    """
    if samples.is_meta:
        return None
    writes: list[bool] = []

    def composed(features: Tensor) -> Tensor:
        writes.clear()
        for piece in pieces:
            given, before = features, version(features)
            features = piece.module(given)
            writes.append(version(given) != before)
        return features

    name = type(model).__name__
    modules = [model, *(piece.module for piece in pieces)]
    for training in (False, True):
        own, cut = (_outcome(model, run, modules, samples, training) for run in (model, composed))
        # the output is no tensor where a model has auxiliary heads: they are left out, and may draw random numbers
        if own.output is not None and not (_alike(own, cut) and own.drawn == cut.drawn):
            if "forward" in vars(model):
                raise NotTraceableError(
                    f"{name}.forward was replaced (Accelerate's prepare(model) does that), and blocks would "
                    "not run it: split the model first and prepare the blocks, or use localgrad.isolate"
                )
            raise NotTraceableError(
                f"{name}, cut into units, does not compute what it did in {_mode(training)}: its forward pass draws "
                "random numbers, changes a buffer or branches outside of a torch.nn layer; move that into a submodule "
                "of an nn.Sequential, name the submodules: units(model, example, names=[...]), or use localgrad.isolate"
            )
        if own.reentrant > cut.reentrant or (cut.kept > own.kept and own.reached == cut.reached):
            raise NotTraceableError(
                f"{name} checkpoints its activations itself, which cutting it takes away: switch that off (as "
                "set_grad_checkpointing(False) or gradient_checkpointing_disable() do) and give split(recompute=True)"
            )
        if own.reached != cut.reached:
            names = [name for name, parameter in model.named_parameters() if id(parameter) in own.reached ^ cut.reached]
            raise NotTraceableError(
                f"{name}, cut into units, would train other parameters than it did "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): its forward pass has torch.no_grad() "
                "outside of a torch.nn layer, which tracing cannot see; give these parameters requires_grad_(False) "
                "instead"
            )
    return writes


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _outcome(model: nn.Module, run: Any, modules: Sequence[nn.Module], samples: Tensor, training: bool) -> _Outcome:
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    with restored(model):
        for module in modules:
            module.train(training)
        with (
            seeded(samples.device),
            torch.set_grad_enabled(training),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = run(samples.clone())
            drawn = _random_state(samples.device)
        values = output.detach() if isinstance(output, Tensor) else None
        return _Outcome(values, [buffer.clone() for buffer in model.buffers()], drawn, *_reached(output), kept)


def _alike(first: _Outcome, second: _Outcome) -> bool:
    assert first.output is not None and second.output is not None
    pairs = zip((first.output, *first.buffers), (second.output, *second.buffers), strict=True)
    return all(_same(*pair) for pair in pairs)


def two_samples(batch: Tensor) -> Tensor:
    """The first two samples of a batch, or its only one twice: batch norm needs more than one value."""
    return torch.cat([batch[:2], batch[:1]])[:2]


def _reached(output: Any) -> tuple[set[int], int]:
    """Ids of the parameters that a backward pass from the output would reach, and number of reentrant checkpoints."""
    output = cast(Any, output[0] if isinstance(output, tuple | list) else output)
    found: set[int] = set()
    seen = set[Any]()
    waiting: list[Any] = [output.grad_fn] if isinstance(output, Tensor) and output.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        found |= set() if leaf is None else {id(leaf)}
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found, sum(node.name() == "CheckpointFunctionBackward" for node in seen)


@contextmanager
def seeded(device: torch.device) -> Generator[None, None, None]:
    """Context: all random generators are seeded with 0, and restored at the end."""
    python, arrays = random.getstate(), np.random.get_state()
    on_cpu = device.type in ("cpu", "meta")
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not restore it
    devices = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    with torch.random.fork_rng(devices=devices):  # pyright: ignore[reportUnknownMemberType]
        try:
            # torch.manual_seed seeds the devices' generators too
            seed: Any = cast(Any, torch.default_generator if on_cpu else torch).manual_seed
            seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """States of the random generators of torch, the device, Python and NumPy."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    _, keys, position, *_ = np.random.get_state()
    return (*(state.tolist() for state in states), random.getstate(), keys.tolist(), position)  # pyright: ignore


def _same(first: Tensor, second: Tensor) -> bool:
    close = 0.0 if first.device.type == "cpu" else 1e-3  # other devices may add in another order
    return first.shape == second.shape and torch.allclose(first, second, rtol=close, atol=close, equal_nan=True)
