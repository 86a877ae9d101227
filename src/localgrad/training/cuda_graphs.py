"""CUDA graphs: a step is captured once and replayed, so the host launches one graph instead of many kernels."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


WARM_UPS = 2
"""Steps per shape before its capture, in which optimizers allocate their state and cuDNN times its algorithms."""


@dataclass(frozen=True)
class Recorded:
    """A captured step, with the tensors that each replay reads and writes."""

    graph: Any
    inputs: Tensor
    targets: Tensor
    outputs: tuple[Tensor, ...]


class GraphedStep:
    """Runs a step as a CUDA graph, from the third batch of each shape on.

    A replay launches the kernels of the captured step on a new batch. Python numbers keep their values at the capture.
    So the step must not read a tensor's values, seed a generator, or use a number that changes: the learning rate must
    be a tensor on the device, written in place. Activations stay allocated between steps, in one memory pool for all
    shapes.

    Args:
        step: function from inputs and targets to a tuple of tensors; it changes weights and state in place.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen = Counter[Any]()
        self._recorded: dict[Any, Recorded] = {}
        self._pool: Any = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Run the step on a batch; return its outputs in tensors that no later replay overwrites."""
        shape = (inputs.shape, inputs.dtype, inputs.stride(), targets.shape, targets.dtype)
        self._seen[shape] += 1
        if self._seen[shape] <= WARM_UPS:
            return self._step(inputs, targets)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(inputs, targets)
        recorded = self._recorded[shape]
        recorded.inputs.copy_(inputs)
        recorded.targets.copy_(targets)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)

    def _record(self, inputs: Tensor, targets: Tensor) -> Recorded:
        inputs, targets = inputs.clone(), targets.clone()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # "thread_local" lets other threads call CUDA during the capture: a data loader's thread pins the next batch
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._step(inputs, targets)
        return Recorded(graph, inputs, targets, outputs)
