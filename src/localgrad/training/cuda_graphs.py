"""CUDA graphs: a step recorded once and replayed, so that the host launches one thing instead of thousands."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


WARM_UPS = 2
"""Batches of a shape before it is recorded: optimizers make their state, cuDNN tries its algorithms."""


@dataclass(frozen=True)
class Recorded:
    """One recorded step, and the tensors that it reads and writes at each replay."""

    graph: Any
    inputs: Tensor
    targets: Tensor
    outputs: tuple[Tensor, ...]


class GraphedStep:
    """Runs a step; from the third batch of a shape on as a CUDA graph of that shape.

    A replay does on the device what the recorded step did, on the batch that it is given: the same kernels, with the
    same numbers wherever the step took a number from Python. So the step must not look at what a tensor holds, draw
    from a seed of its own, or read a number that changes, such as a learning rate: that must be a tensor on the
    device, written in place. Activations stay allocated between steps, in one pool for all shapes.

    Args:
        step: inputs and targets to tensors; what it changes it must change in place.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen = Counter[Any]()
        self._recorded: dict[Any, Recorded] = {}
        self._pool: Any = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the step gives for a batch, in tensors that no later step writes to."""
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
        # other threads, as one that pins the next batch's memory, may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._step(inputs, targets)
        return Recorded(graph, inputs, targets, outputs)
