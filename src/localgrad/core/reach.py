"""Reach: a local loss also trains blocks before its own. A block's graph is kept for the last loss that reaches it."""

# pyright: reportUnnecessaryIsInstance=false

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localgrad.errors import LocalGradError


def check_reach(reach: int) -> None:
    """Refuse a reach that is not an integer of 1 or more."""
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 1:
        raise LocalGradError(
            f"reach is {reach!r}: a loss trains 1 block, its own (local learning), 2, that and the one before, or more"
        )


@dataclass(eq=False)
class _Waiting:
    """A body whose graph is kept until the last loss that reaches it.

    Attributes:
        entry: the body's input, a leaf; it requires a gradient if there is a block before.
        output: the body's output, with its graph.
        parameters: the parameters of the body that are trained.
        total: gradient at the output, summed over all losses so far.
        pending: the part of `total` that is not yet passed on to the block before.
    """

    entry: Tensor
    output: Tensor
    parameters: list[nn.Parameter]
    total: Tensor | None = None
    pending: Tensor | None = None

    def receive(self, gradient: Tensor | None) -> None:
        """Add a gradient at the output, of one loss or summed over several; None adds nothing."""
        if gradient is None:
            return
        nothing_passed = self.pending is self.total
        self.total = gradient if self.total is None else self.total + gradient
        if nothing_passed:
            self.pending = self.total
        else:
            self.pending = gradient if self.pending is None else self.pending + gradient

    def input_gradient(self) -> Tensor | None:
        """Back-propagate `pending` to the input, and return the gradient there. The graph is kept."""
        if self.pending is None or not self.entry.requires_grad:
            return None
        torch.autograd.backward(self.output, self.pending, inputs=[self.entry], retain_graph=True)
        gradient, self.entry.grad, self.pending = self.entry.grad, None, None
        return gradient

    def finish(self, with_input: bool) -> Tensor | None:
        """Back-propagate `total` to the parameters and free the graph; `with_input` returns the input's gradient."""
        wanted: list[Tensor] = [*self.parameters, *[self.entry] * (with_input and self.entry.requires_grad)]
        if wanted and self.total is not None and self.output.requires_grad:
            torch.autograd.backward(self.output, self.total, inputs=wanted)
        return self.entry.grad if with_input else None


class Span:
    """The blocks whose graphs are kept: block j is trained by the losses of blocks j to j + reach - 1.

    The gradients of a body's parameters are linear in the gradient at its output. So each body has one backward pass
    for its parameters, with the sum over all losses that reach it. Before that it has up to `reach - 1` backward passes
    for its input alone, with the losses that reach the block before. At the end of the network one pass does both.
    """

    def __init__(self, reach: int, num_blocks: int) -> None:
        self.reach, self.num_blocks, self.finished = reach, num_blocks, 0
        self.waiting: list[_Waiting] = []

    def add(self, parameters: list[nn.Parameter], entry: Tensor, output: Tensor, gradient: Tensor | None) -> range:
        """Add the next block with its own loss's gradient at its output; return the blocks with complete gradients."""
        self.waiting.append(_Waiting(entry, output, parameters))
        self.waiting[-1].receive(gradient)
        begin, at_end = self.finished, self.finished + len(self.waiting) == self.num_blocks
        if at_end or len(self.waiting) == self.reach:
            self._descend(at_end)
            self.finished = self.num_blocks if at_end else begin + 1
            del self.waiting[: self.finished - begin]
        return range(begin, self.finished)

    def end(self, gradient: Tensor | None) -> None:
        """Finish all blocks whose graphs are kept. `gradient` is that of the last block's loss at its input."""
        self.waiting[-1].receive(gradient)
        self._descend(at_end=True)
        self.waiting.clear()

    def _descend(self, at_end: bool) -> None:
        """Pass pending gradients from the last waiting block down to the first; finish the first, or all `at_end`."""
        for place in reversed(range(len(self.waiting))):
            block, ends = self.waiting[place], at_end or place == 0
            passes_down = place > 0
            at_once = ends and passes_down and block.pending is block.total
            gradient = block.input_gradient() if passes_down and not at_once else None
            if ends:
                at_input = block.finish(with_input=at_once)
                gradient = at_input if at_once else gradient
            if passes_down:
                self.waiting[place - 1].receive(gradient)
