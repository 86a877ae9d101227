"""The autograd graph: its nodes, edges and leaves, and the order in which nodes were created."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

Node = Any
"""A node of the autograd graph. It is Any because torch types it in part."""
Edge = tuple[Node, int]
"""A node of the autograd graph and the index of its output: together they stand for one tensor."""


def edges(tensors: Sequence[Tensor]) -> tuple[Edge, ...]:
    """The tensors that require a gradient, as edges, each once."""
    ends = (get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad)
    return tuple(dict.fromkeys((end[0], end[1]) for end in ends))


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates, such as a parameter; None for the node of an operation."""
    return getattr(node, "variable", None)


def is_reentrant_checkpoint(node: Node) -> bool:
    """Whether a node stands for a run with `checkpoint(..., use_reentrant=True)`, whose graph shows no parameters."""
    return getattr(node, "_forward_cls", None) is CheckpointFunction


def made_at(node: Node) -> int:
    """Sequence number of a node: in one thread, a node that is created later has a larger number."""
    return node._sequence_nr()


def derives_from(tensor: Tensor, *leaves: Tensor) -> bool:
    """Whether a tensor is one of these leaves, or is computed from one in its autograd graph."""
    wanted = {id(leaf) for leaf in leaves}
    if tensor.grad_fn is None:
        return id(tensor) in wanted
    seen, waiting = set[Node](), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if id(leaf_of(node)) in wanted:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def saves_with(pack: Callable[[Tensor], Any]) -> bool:
    """Whether `pack` is the innermost saved-tensor hook now: autograd passes it the tensors to save for backward."""
    graph: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    hooks = graph._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled() and hooks is not None and hooks[0] is pack
