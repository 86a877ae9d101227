"""Checks of blocks and optimizers before a local step: a full check once, and again after a change."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from localgrad.core.block import Block
from localgrad.core.origin import Origin
from localgrad.core.tables import slots
from localgrad.core.wrapped import compiled_from
from localgrad.errors import LocalGradError, SettingsError, warn

Optimizers = Optimizer | Sequence[Optimizer] | None
"""What trains a block: one optimizer, several with disjoint parameters, or None for a block that trains nothing."""


def of_block(optimizers: Optimizers) -> tuple[Any, ...]:
    """The optimizers of one block, as a tuple."""
    if optimizers is None:
        return ()
    return tuple(optimizers) if isinstance(optimizers, list | tuple) else (optimizers,)


def inner(block: nn.Module) -> Block:
    """The block inside its wrapper (data-parallel or compiled); an unwrapped block itself."""
    if isinstance(block, nn.parallel.DistributedDataParallel):
        return inner(block.module)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    compiled = compiled_from(block)
    return block if compiled is None else inner(compiled)  # pyright: ignore[reportReturnType]


def check_optimizers(blocks: Sequence[nn.Module], optimizers: Sequence[Optimizers]) -> None:
    """Refuse optimizers that are not a list with one entry (optimizer, sequence or None) for each block."""
    if isinstance(blocks, Block) or isinstance(optimizers, Optimizer | Tensor) or not hasattr(optimizers, "__len__"):
        raise LocalGradError(
            f"blocks is a {type(blocks).__name__} and optimizers a {type(optimizers).__name__}: give two lists, "
            "what `split` gave and one optimizer a block"
        )
    if not len(blocks):
        raise LocalGradError("blocks is empty: give the list that `split` gave")
    if len(optimizers) != len(blocks):
        raise LocalGradError(
            f"{len(optimizers)} optimizers for {len(blocks)} blocks: give one a block, "
            "[SGD(block.trainable_parameters(), lr=0.1) for block in blocks]"
        )


def check_step(blocks: Sequence[nn.Module], optimizers: Sequence[Optimizers]) -> None:
    """Refuse blocks and optimizers that would train something else than the model's blocks.

    The full check runs once, and again when blocks, optimizers or model have changed. Copies of a momentum get the
    training modes of their sources here.

    Raises:
        LocalGradError: a block is in evaluation mode, or no longer holds the model's modules; its optimizers have
            parameters of another block, leave one out, share one, or need a closure.

    Warns:
        LocalGradWarning: a block has gradients that no local step left.
    """
    check_optimizers(blocks, optimizers)
    own = [inner(block) for block in blocks]
    for block in own:
        block.check_training()
        block.match_modes()
    origins: dict[int, Origin] = {id(block.origin): block.origin for block in own if block.origin is not None}
    known = all(
        block.checked is not None and block.checked.holds(of_block(given))
        for block, given in zip(own, optimizers, strict=True)
    )
    if not known or not all(origin.unchanged() for origin in origins.values()):
        for origin in origins.values():
            origin.check([block for block in own if block.origin is origin])
        for index, (block, given) in enumerate(zip(own, optimizers, strict=True)):
            check_parameters(index, block, of_block(given))
            block.checked = Checked(block, of_block(given))
    for index, block in enumerate(own):
        if not block.accumulates and block.checked.has_gradients():
            warn(
                f"block {index} has gradients that no local step left, and this one adds to them: call "
                "optimizer.zero_grad() before, if they are not meant to count"
            )


class Checked:
    """A snapshot of a block and its optimizers at the time of the check, to notice later changes."""

    def __init__(self, block: Block, optimizers: Sequence[Any]) -> None:
        self._optimizers = tuple(optimizers)
        self._groups = [(group["params"], len(group["params"])) for group in _groups(optimizers)]
        self._flags = [(p, p.requires_grad, p.dtype) for p in block.parameters()]
        self._slots = [slot for module in block.modules() for slot in slots(module)]

    def has_gradients(self) -> bool:
        """Whether a parameter of the block has a gradient."""
        return any(parameter.grad is not None for parameter, _, _ in self._flags)

    def holds(self, optimizers: Sequence[Any]) -> bool:
        """Whether block and optimizers have not changed since the check."""
        groups = _groups(optimizers)
        return (
            len(optimizers) == len(self._optimizers)
            and all(given is known for given, known in zip(optimizers, self._optimizers, strict=True))
            and len(groups) == len(self._groups)
            and all(
                group["params"] is known and len(known) == size
                for group, (known, size) in zip(groups, self._groups, strict=True)
            )
            and all(p.requires_grad is trains and p.dtype is dtype for p, trains, dtype in self._flags)
            and all(holder.get(name) is value for holder, name, value in self._slots)
        )


def _groups(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]


def check_parameters(index: int, block: Block, optimizers: Sequence[Any]) -> None:
    """Refuse optimizers that have parameters of another block, leave out trained ones of their own, or share one."""
    for optimizer in optimizers:
        _check_kind(index, optimizer)
    given = [parameter for group in _groups(optimizers) for parameter in group["params"]]
    if len({id(parameter) for parameter in given}) < len(given):
        raise SettingsError(
            f"the {len(optimizers)} optimizers of block {index} share a parameter, which would be stepped twice: give "
            "each its own, as those with two dimensions to one and the rest to another"
        )
    own = {id(parameter): parameter.requires_grad for parameter in block.parameters()}
    foreign = [parameter for parameter in given if id(parameter) not in own]
    present = {id(parameter) for parameter in given}
    missing = sum(trains and key not in present for key, trains in own.items())
    if not (foreign or missing):
        return
    gone: list[str] = [] if block.origin is None else block.origin.gone(foreign)
    if gone:
        raise LocalGradError(
            f"the optimizer of block {index} has {len(gone)} parameters that the model no longer has, {gone[0]!r} "
            "first: they were replaced since it was made (load_state_dict(assign=True), an adapter, another device); "
            "make the optimizers after such changes"
        )
    what = f"optimizer {index} has" if optimizers else f"optimizer {index} is None, which has"
    raise LocalGradError(
        f"{what} {len(foreign)} parameters that are not of block {index} and lacks {missing} that are: "
        "give each block an optimizer over its own, as SGD(block.trainable_parameters(), lr=0.1), and what is not "
        "to be trained requires_grad_(False)"
    )


def _check_kind(index: int, optimizer: Any) -> None:
    """Refuse objects that are no optimizers, and optimizers whose step needs a closure."""
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise LocalGradError(
            f"optimizer {index} is a {type(optimizer).__name__}: give a torch optimizer for each block, or a list of "
            "them that share its parameters, or None where nothing is trained"
        )
    # step is read from the class, because schedulers replace it on the optimizer, with another signature
    kind: Any = type(optimizer)  # pyright: ignore[reportUnknownVariableType]
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise SettingsError(
            f"optimizer {index} is a {type(optimizer).__name__}, whose step takes a closure that computes the "
            "loss again: a local step computes it once; give an optimizer whose step() needs none, as SGD or AdamW"
        )
