"""The autograd graph: its nodes and edges, the leaves below it, and the order in which it was made."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Node = Any
"""A node of the autograd graph, which torch types in part."""
Edge = tuple[Node, int]
"""An output of a node of the autograd graph, which is a tensor that requires a gradient."""


def edges(tensors: Sequence[Tensor]) -> tuple[Edge, ...]:
    """The tensors that require a gradient, as edges, each once."""
    ends = (get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad)
    return tuple(dict.fromkeys((end[0], end[1]) for end in ends))


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates, such as a parameter; None for the node of an operation."""
    return getattr(node, "variable", None)


def made_at(node: Node) -> int:
    """When a node was made: a number that grows from node to node of a thread."""
    return node._sequence_nr()


def derives_from(tensor: Tensor, *leaves: Tensor) -> bool:
    """Whether a tensor is made from one of these leaves of its graph; a leaf itself is."""
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
    """Whether tensors that a backward pass needs are handed to this function now, and not to a hook inside it."""
    graph: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    hooks = graph._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled() and hooks is not None and hooks[0] is pack
