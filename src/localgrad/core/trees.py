"""Trees: tensors in nested tuples, lists and dicts, as targets may be."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in order; a tensor or None is a tree of one leaf."""
    return pytree.tree_leaves(tree)


def mapped(function: Callable[[Any], Any], tree: Any, kind: type[Any] = Tensor) -> Any:
    """The tree with `function` applied to each leaf of class `kind`, tensors by default; other leaves stay."""
    return pytree.tree_map_only(kind, function, tree)


def batch_parts(tree: Any, size: int, parts: int) -> Iterator[Any]:
    """Split the tree into `parts` along the batch dimension, as evenly as possible.

    Tensors with `size` samples are split; other leaves (a temperature, None) go to every part.
    """
    batched = [leaf for leaf in leaves(tree) if _has_samples(leaf, size)]
    cut = [leaf.tensor_split(parts) for leaf in batched]
    for part in range(parts):
        pieces = iter([pieces[part] for pieces in cut])
        yield pytree.tree_map_only(
            Tensor, lambda leaf, pieces=pieces: next(pieces) if _has_samples(leaf, size) else leaf, tree
        )


def _has_samples(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size
