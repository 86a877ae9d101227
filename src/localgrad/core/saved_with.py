"""Auxiliary networks in an optimizer's state, so that whoever saves and loads the optimizer saves and loads them."""

from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from localgrad.errors import LocalGradError

KEY = "auxiliary_networks"
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def keep_in(optimizer: AnyOptimizer, networks: nn.Module) -> AnyOptimizer:
    """Let the optimizer's `state_dict` hold the tensors of these networks, and its `load_state_dict` load them.

    Raises:
        LocalGradError: it is no optimizer of PyTorch; on loading, the state has no auxiliary networks.
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
