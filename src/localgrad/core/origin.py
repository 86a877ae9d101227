"""The model that blocks were split from. Training is refused when it no longer has the modules that blocks hold."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from localgrad.core.momentum import MomentumAuxiliary
from localgrad.core.tables import own_buffers, own_modules, own_parameters, slots
from localgrad.errors import LocalGradError

WAY_OUT = "make such changes first, then split, then make the optimizers"
HALF = (torch.float16, torch.bfloat16)


class Origin:
    """The modules, parameters and buffers that blocks hold of a model, and their places in the model.

    `load_state_dict(assign=True)`, a new layer, a converted norm, an adapter or a cast after `split` leave blocks with
    modules, parameters or buffers that are no longer the model's, or with auxiliary networks that do not fit them.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Any]) -> None:
        self.model = model
        held = {module for block in blocks for module in block.body.modules()}
        own: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        self.modules = {module: name for name, module in own.items() if module in held}
        self.parameters = {parameter: name for name, parameter in model.named_parameters()}
        self.dtypes = {p: p.dtype for block in blocks for p in block.parameters() if p.is_floating_point()}
        self._slots, self._sizes = self._outside(held)
        places = {buffer: (module, name) for module in own.values() for name, buffer in own_buffers(module).items()}
        # buffers that a piece of the traced model holds itself, and the module of the model that owns each
        self.buffers = [
            (piece, name, *places[buffer])
            for piece in held - set(own.values())
            for name, buffer in own_buffers(piece).items()
            if buffer in places
        ]
        self._slots += self._buffer_slots()

    def _outside(self, held: set[nn.Module]) -> tuple[list[tuple[dict[str, Any], str, Any]], list[tuple[Any, int]]]:
        """Children and parameters of modules outside of the blocks, and the sizes of the tables that hold them."""
        outside = [module for module in self.model.modules() if module not in held]
        tables = [table for module in outside for table in (own_modules(module), own_parameters(module))]
        return [slot for module in outside for slot in slots(module)], [(table, len(table)) for table in tables]

    def _buffer_slots(self) -> list[tuple[dict[str, Any], str, Any]]:
        return [(own_buffers(owner), name, own_buffers(owner).get(name)) for _, _, owner, name in self.buffers]

    def unchanged(self) -> bool:
        """Whether modules outside of the blocks hold the same children and parameters as at the last check."""
        same = all(holder.get(name) is value for holder, name, value in self._slots)
        return same and all(len(table) == size for table, size in self._sizes)

    def gone(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        """Names of the parameters that the model had at `split` and has no longer."""
        present = set(self.model.parameters())
        return [self.parameters[p] for p in parameters if p in self.parameters and p not in present]

    def check(self, blocks: Sequence[Any]) -> None:
        """Refuse blocks that are no longer the model's, and give blocks the model's present buffers.

        Raises:
            LocalGradError: a block holds a module or parameter that the model no longer has; the model has parameters
                that no block has; units that a momentum copies have changed since; only some parameters were cast;
                averaged weights were cast to 16 bits.
        """
        modules, parameters = set(self.model.modules()), set(self.model.parameters())
        for piece, name, owner, owner_name in self.buffers:
            own_buffers(piece)[name] = own_buffers(owner).get(owner_name)
        for index, block in enumerate(blocks):
            kinds: list[tuple[str, Any, set[Any], dict[Any, str]]] = [
                ("module", block.body.modules(), modules, self.modules),
                ("parameter", block.body.parameters(), parameters, self.parameters),
            ]
            for kind, found, present, names in kinds:
                gone = [names[value] for value in found if value in names and value not in present]
                if gone:
                    raise LocalGradError(
                        f"block {index} holds {len(gone)} {kind}{'s' * (len(gone) > 1)} that the model no longer has, "
                        f"{gone[0]!r} first: replaced since split (load_state_dict(assign=True), a new layer, a "
                        f"converted norm, a cast); {WAY_OUT}"
                    )
            self._check_momentum(index, block)
        trained = {parameter for block in blocks for parameter in block.parameters()}
        added = [n for n, p in self.model.named_parameters() if p not in self.parameters and p not in trained]
        if added:
            raise LocalGradError(
                f"the model has {added[0]!r} since split, and no block trains or runs it: {WAY_OUT}, or use "
                "localgrad.isolate, which runs the model's own forward pass"
            )
        self._check_casts(blocks)
        held = {module for block in blocks for module in block.body.modules()}
        self._slots, self._sizes = self._outside(held)
        self._slots += self._buffer_slots()

    def _check_momentum(self, index: int, block: Any) -> None:
        if isinstance(block.momentum, MomentumAuxiliary) and not block.momentum.is_current():
            raise LocalGradError(
                f"the units that the momentum of block {index} copies have changed since split (requires_grad, an "
                f"adapter, a replaced layer), and the copies are of what they were; {WAY_OUT}"
            )

    def _check_casts(self, blocks: Sequence[Any]) -> None:
        now = [p for block in blocks for p in block.parameters() if p in self.dtypes]
        cast = [p for p in now if p.dtype != self.dtypes[p]]
        if cast and len(cast) < len(now):
            raise LocalGradError(
                f"{len(cast)} of the blocks' {len(now)} parameters are {cast[0].dtype} and were "
                f"{self.dtypes[cast[0]]} at split, so that bodies and auxiliary networks do not fit together: cast the "
                "model first, then split, or compute under autocast"
            )
        for block in blocks:
            averaged = block.momentum.followed() if isinstance(block.momentum, MomentumAuxiliary) else []
            if cast and averaged and averaged[0].dtype in HALF and 0 < block.momentum.decay < 1:
                raise LocalGradError(
                    f"the weights were cast to {averaged[0].dtype} since split, in which an average with decay "
                    f"{block.momentum.decay} stands still: keep them in float32 and compute under autocast"
                )
        self.dtypes = {p: p.dtype for p in now}
