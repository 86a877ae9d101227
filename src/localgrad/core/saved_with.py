"""Auxiliary networks in an optimizer's state: a checkpoint of the optimizer saves and loads them too."""

from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from localgrad.errors import LocalGradError

KEY = "auxiliary_networks"
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def keep_in(optimizer: AnyOptimizer, networks: nn.Module) -> AnyOptimizer:
    """Save these networks in the optimizer's `state_dict`, and load them in its `load_state_dict`.

    Returns:
        The optimizer.

    Raises:
        LocalGradError: the optimizer is not one of PyTorch; on loading, the state holds no auxiliary networks.
    """
    typed_in_part: Any = optimizer
    if not isinstance(typed_in_part, Optimizer):
        raise LocalGradError(
            f"optimizer is a {type(typed_in_part).__name__}: give an optimizer of PyTorch, before a library wraps it"
        )

    def save(_: Optimizer, state: dict[str, Any]) -> None:
        state[KEY] = networks.state_dict()

    def load(_: Optimizer, state: dict[str, Any]) -> None:
        if KEY not in state:
            raise LocalGradError(
                "the optimizer's state holds no auxiliary networks, so they would begin anew: it was saved without "
                "save_with; give optimizer.load_state_dict a state that has them, or load it before save_with"
            )
        networks.load_state_dict(state[KEY])

    typed_in_part.register_state_dict_post_hook(save)
    typed_in_part.register_load_state_dict_pre_hook(load)
    return optimizer
