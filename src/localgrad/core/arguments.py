"""Arguments of a model's forward pass: which of them are the inputs and the targets."""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from localgrad.core.observed import tensors_in
from localgrad.errors import LocalGradError


class ForwardArguments:
    """Finds inputs and targets among the arguments of a model's forward pass.

    Args:
        model: the model, whose `forward` has the names of the arguments and their order.
        targets: name of the argument that holds the targets, or None.

    Raises:
        LocalGradError: `forward` has no argument of this name.
    """

    def __init__(self, model: nn.Module, targets: str | None) -> None:
        parameters = signature(model.forward).parameters
        self.names = list(parameters)
        self.of_targets = targets
        takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
        if targets is not None and targets not in self.names and not takes_any:
            raise LocalGradError(
                f"targets is {targets!r}: {type(model).__name__}.forward takes {', '.join(self.names)}; name one of "
                "them, or leave it out and set isolation.targets before each call"
            )

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The first tensor among the arguments other than the targets, in forward's order, detached; or None."""
        given = self._by_name(args, kwargs)
        ordered = [given[name] for name in (*self.names, *given) if name in given and name != self.of_targets]
        found = next(iter(tensors_in(ordered)), None)
        return None if found is None else found.detach()

    def targets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of the argument that holds the targets, or None."""
        return None if self.of_targets is None else self._by_name(args, kwargs).get(self.of_targets)

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)
