"""Tensors that modules keep of their forward pass, as a balance loss of experts, when their block's graph is gone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from localgrad.core.autograd_graph import derives_from
from localgrad.core.tables import own_modules, own_parameters
from localgrad.core.trees import leaves
from localgrad.errors import LocalGradError


def kept_by(module: nn.Module) -> dict[str, Tensor]:
    """The tensors with a graph that a module holds itself, by the name of the attribute."""
    tables = (own_parameters(module), own_modules(module))
    found: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        for leaf in () if any(value is table for table in tables) else leaves(value):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                found.setdefault(name, leaf)
    return found


class KeptTensors:
    """What the modules of a model keep that is made with some parameters, as the first forward pass shows.

    Args:
        model: the model.
        trained: the parameters, whose graph is gone when the forward pass ends.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.keepers: list[tuple[str, nn.Module]] | None = None

    def refuse_backward(self) -> None:
        """After a forward pass: say what to do where a gradient comes to such a tensor."""
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
    """A hook on a kept tensor."""

    def __init__(self, module: str, attribute: str) -> None:
        self.module, self.attribute = module, attribute

    def __call__(self, gradient: Any) -> None:
        name = f"{self.module}.{self.attribute}".strip(".")
        raise LocalGradError(
            f"a loss is made of {name!r}, which is inside a local block whose gradients are computed and whose graph "
            "is gone: add it to the block's local loss in an objective of your own (docs/extending.md), or detach it"
        )
