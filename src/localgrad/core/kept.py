"""Refuse a backward pass through a tensor that a module stored in its forward pass and whose graph is freed.

An example is the balance loss of a mixture of experts inside a local block.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from localgrad.core.autograd_graph import derives_from
from localgrad.core.tables import own_buffers, own_modules, own_parameters
from localgrad.core.trees import leaves
from localgrad.errors import LocalGradError


def kept_by(module: nn.Module) -> dict[str, Tensor]:
    """Tensors with an autograd graph that a module holds itself, by attribute name; the first of each attribute."""
    tables = (own_parameters(module), own_modules(module), own_buffers(module))
    found: dict[str, Tensor] = {}
    for name, value in (vars(module) | own_buffers(module)).items():
        for leaf in () if any(value is table for table in tables) else leaves(value):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                found.setdefault(name, leaf)
    return found


class KeptTensors:
    """Tensors that a model's modules store in a forward pass, computed with parameters of local blocks.

    The first forward pass shows which modules store such tensors.

    Args:
        model: the model.
        trained: the parameters of local blocks, whose graph is freed before the forward pass ends.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.keepers: list[tuple[str, nn.Module]] | None = None

    def refuse_backward(self) -> None:
        """Call it after a forward pass: a backward pass that reaches such a tensor raises a LocalGradError."""
        if self.keepers is None:
            modules: dict[str, nn.Module] = dict(self.model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
            self.keepers = [
                (name, module)
                for name, module in modules.items()
                if any(derives_from(tensor, *self.trained) for tensor in kept_by(module).values())
            ]
        for module_name, module in self.keepers:
            for name, tensor in kept_by(module).items():
                tensor.register_hook(_Refusal(module_name, name))  # pyright: ignore[reportUnknownMemberType]


class _Refusal:
    """A tensor hook that raises a LocalGradError with the name of the stored tensor."""

    def __init__(self, module: str, attribute: str) -> None:
        self.module, self.attribute = module, attribute

    def __call__(self, gradient: Any) -> None:
        name = f"{self.module}.{self.attribute}".strip(".")
        raise LocalGradError(
            f"a loss is made of {name!r}, which is inside a local block whose gradients are computed and whose graph "
            "is gone: add it to the block's local loss in an objective of your own (docs/extending.md), or detach it"
        )
