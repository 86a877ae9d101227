"""A block of an isolated model: its cut, units and parameters, read from one observed forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from localgrad.core.channels import channel_dim_of, usual_channel_dim
from localgrad.core.observed import Call, ForwardPass, takes, trained_by_block, units_between
from localgrad.core.units import Unit
from localgrad.errors import LocalGradError, warn


@dataclass(frozen=True, eq=False)
class IsolatedBlock:
    """One block of an isolated model.

    Attributes:
        unit: the module of the cut that ends the block; None for the last block.
        following: units of the next block in a chain: the first reads the cut's output, each later one the output of
            the unit before it. Empty if the model calls the first inside its own activation checkpointing.
        rest: all units from the first of these to the end of the network.
        parameters: the parameters of the model that belong to the block.
        inner: the block's outermost modules that have children, are no containers and hold no cut.
    """

    unit: Unit | None
    following: tuple[Unit, ...]
    rest: tuple[Unit, ...]
    parameters: tuple[nn.Parameter, ...]
    inner: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """Name of the cut, "the end" for the last block."""
        return "the end" if self.unit is None else self.unit.name


def isolated_blocks(
    model: nn.Module, run: ForwardPass, cuts: Sequence[Call]
) -> tuple[list[IsolatedBlock], dict[nn.Parameter, int]]:
    """The blocks between the cuts, and for each parameter that several blocks use the last of them, which trains it.

    Raises:
        LocalGradError: a block reads a tensor from inside another block.
    """
    reached, (end_to_end,) = trained_by_block(run, cuts), trained_by_block(run, ())
    tied: dict[nn.Parameter, int] = {}
    owner: dict[nn.Parameter, int] = {}
    for name, parameter in model.named_parameters():
        users = [block for block, found in enumerate(reached) if parameter in found]
        owner[parameter] = users[-1] if users else _block_of(name, model, run, cuts)
        if not users and parameter.requires_grad and parameter in end_to_end:
            warn(
                f"no local loss reaches {name}, so nothing trains it: the loss of a block reads the first tensor that "
                "the cut's module returns, and other tensors go on detached; cut elsewhere, or freeze it"
            )
        if len(users) > 1:
            tied[parameter] = users[-1]
            warn(
                f"{name} is used by blocks {', '.join(str(user + 1) for user in users)}: block {users[-1] + 1} alone "
                "trains it, and the others use it as it is"
            )
    return [_isolated_block(run, cuts, block, owner) for block in range(len(cuts) + 1)], tied


def _block_of(name: str, model: nn.Module, run: ForwardPass, cuts: Sequence[Call]) -> int:
    """The block of a parameter that no loss reaches: that of the innermost called module that holds it.

    If a cut is inside this module, it is that of the next called module in order: a model that skips layers at random
    may have skipped the parameter's module in this run.
    """
    around = [call for call in run.calls if not call.name or name.startswith(f"{call.name}.")]
    call = max(around, key=lambda call: len(call.name), default=None)
    if call is not None and any(call.holds(cut) for cut in cuts):
        called = {call.name: call for call in run.calls}
        modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        names = list(modules)
        later = names[names.index(name.rpartition(".")[0]) :]
        call = next((called[each] for each in later if each in called), None)
    return len(cuts) if call is None else sum(cut.end < call.end for cut in cuts)


def _isolated_block(
    run: ForwardPass, cuts: Sequence[Call], block: int, owner: dict[nn.Parameter, int]
) -> IsolatedBlock:
    start = cuts[block - 1].end if block else 0
    cut = cuts[block] if block < len(cuts) else None
    parameters = tuple(parameter for parameter, index in owner.items() if index == block)
    units = units_between(run, start, cuts, cut.end if cut else None)
    inner = tuple(call.module for call in units if any(True for _ in call.module.children()))
    if cut is None:
        return IsolatedBlock(None, (), (), parameters, inner)
    is_last = block == len(cuts) - 1
    chain = _chain(cut, units_between(run, cut.end, cuts, None if is_last else cuts[block + 1].end), is_last)
    module = chain[0].module if chain else None
    later = [call for call in units_between(run, cut.end) if chain and call.start >= chain[0].start and call.features]
    following = () if chain and chain[0].checkpointed else tuple(map(_unit, chain))
    return IsolatedBlock(_unit(cut, module), following, tuple(map(_unit, later)), parameters, inner)


def _chain(cut: Call, found: Sequence[Call], is_last: bool) -> list[Call]:
    """A chain of units: the first reads the cut's output, each later one the output of the unit before it.

    The model's head, the last unit of the last block, is left out unless it is the only unit.
    """
    found = (found[:-1] or found) if is_last else found
    first = next((index for index, call in enumerate(found) if takes(call, cut)), None)
    chain = [] if first is None else [found[first]]
    later: Sequence[Call] = () if first is None else found[first + 1 :]
    for call in later:
        if chain[-1].source not in call.arguments:
            break
        chain.append(call)
    return chain


def _unit(call: Call, following: nn.Module | None = None) -> Unit:
    assert call.features is not None
    features = torch.empty(call.features, dtype=call.dtype, device="meta")
    dim = channel_dim_of(features, [call.module], [following] if following else [])
    dim = usual_channel_dim(features.ndim) if dim is None else dim
    return Unit(call.name, call.module, call.features, dim, call.writes_input, call.inputs, call.dtype)


def chosen_blocks(blocks: Sequence[IsolatedBlock], index: int | None) -> Sequence[int]:
    """The index of a block, or of all blocks if it is None.

    Raises:
        LocalGradError: there is no such block, or the blocks are not known yet.
    """
    if not blocks:
        raise LocalGradError("the blocks are not known before the first batch: give isolate(..., example=batch)")
    if index is None:
        return range(len(blocks))
    if index not in range(len(blocks)):
        raise LocalGradError(f"block is {index!r}: there are {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    return [index]


def described(blocks: Sequence[IsolatedBlock], networks: Sequence[tuple[nn.Module | None, nn.Module | None]]) -> str:
    """A line for each block: where it ends, what it trains, and the sizes of its auxiliary networks."""
    lines: list[str] = []
    for index, block in enumerate(blocks):
        trained = sum(parameter.numel() for parameter in block.parameters if parameter.requires_grad)
        line = f"  {index + 1}  to {block.name}: trains {trained:,} parameters"
        for network in networks[index] if block.unit else ():
            if network is not None:
                line += f"; {type(network).__name__} {sum(p.numel() for p in network.parameters()):,}"
        lines.append(line)
    return "\n".join(lines)
