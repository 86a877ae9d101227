"""The momentum auxiliary network: copies of the next block's first units, one trained, one an EMA of their weights."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from localgrad.core.recompute import recomputed
from localgrad.core.units import Unit
from localgrad.core.versions import versions

Momentum = Callable[[Sequence[Unit]], "MomentumAuxiliary"]
"""A function that builds the momentum auxiliary network of a block from the units of the next block."""

Call = Callable[[nn.Module, Tensor], Tensor]
"""A function that calls a module with features, and with further arguments if the module takes any."""


class MomentumAuxiliary(nn.Module):
    """Copies of the next block's first units, between a block's features and its objective.

    Frozen parameters are not copied: the copies hold the same tensors as the units. The average covers the units'
    trained floating-point parameters. Each module of a copy is in the mode (training or evaluation) of its source.

    Attributes:
        bias: the trained copy of the next unit, a per-channel parameter in the fused form, or None.
        ema: the copy that follows the next unit by exponential moving average, or None.
        scale: the learnable scalar of MAN++, or None.
        decay: m in `ema <- m * ema + (1 - m) * next unit`.
        depth: how many units of the next block are copied.
        pool: side of the squares, in pixels, over which features are averaged before the branches; 1 for none.
        residual_once: whether the features are subtracted from the sum, so that the residual path counts once.
    """

    def __init__(
        self,
        source: Sequence[Unit],
        bias: nn.Module | nn.Parameter | None,
        ema: nn.Module | None,
        scale: nn.Parameter | None,
        decay: float,
        recompute: bool,
        pool: int = 1,
        residual_once: bool = False,
        lightweight: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.bias, self.ema, self.scale = bias, ema, scale
        self.decay, self.recompute, self.pool, self.residual_once = decay, recompute, pool, residual_once
        self._bias_is_copy = lightweight is None
        self.depth = len(source)
        self._seen: tuple[int, ...] = ()
        self._due: tuple[list[Tensor], tuple[int, ...]] | None = None
        self._source_writes_input, self._inputs = source[0].writes_input, source[0].inputs
        # tuples are not registered: the next block's modules are not this module's
        self._units = units = tuple(unit.module for unit in source)
        copies = [branch for branch in (bias, ema) if isinstance(branch, nn.Module) and branch is not lightweight]
        self._modes = tuple(pair for branch in copies for pair in _pairs(branch, units))
        self._averaged = () if ema is None else tuple(_trained(_pairs(ema, units)))
        self._made_of = self._structure()

    def forward(self, features: Tensor, call: Call = nn.Module.__call__) -> Tensor:
        """Run the branches on the block's features and mix their outputs, by the formulas of `man` and `manpp`.

        Args:
            features: output of the block, `(N, C, H, W)` or `(N, L, D)`.
            call: calls a copy with features, for copies that take further arguments (a mask, rotary embeddings).
        """
        if self.pool > 1:
            features = F.avg_pool2d(features, self.pool, ceil_mode=True)
        if not isinstance(self.bias, nn.Module):
            assert self.ema is not None
            mixed = self._branch(self.ema, features, call)
            return mixed if self.bias is None else mixed + self.bias
        biased = self._branch(self.bias, features, call)
        if self.ema is None:
            return biased
        if self.scale is None:
            mixed = biased + self._branch(self.ema, features, call)
            return mixed - features if self.residual_once else mixed
        return self.scale * biased + (2 - self.scale) * self._branch(self.ema, features, call)

    def _branch(self, branch: nn.Module, features: Tensor, call: Call) -> Tensor:
        """Run one branch; with `recompute` as its own checkpoint, so that activations of one branch live at a time."""

        def run(features: Tensor) -> Tensor:
            if branch is self.bias and not self._bias_is_copy:
                return branch(features)
            for unit in branch.children() if self.depth > 1 else (branch,):
                features = call(unit, features)
            return features

        if self.recompute:
            return recomputed(run, features, branch, self._source_writes_input)
        # a unit that works in place must not change the features for the other branch and the next block
        return run(features.clone() if self._source_writes_input else features)

    def followed(self) -> list[nn.Parameter]:
        """The next block's parameters that the EMA reads; none without an EMA."""
        return [getattr(module, name) for _, module, name in self._averaged]

    def averages(self) -> list[nn.Parameter]:
        """The EMA's parameters that follow those of `followed()`, in the same order."""
        return [getattr(module, name) for module, _, name in self._averaged]

    @torch.no_grad()
    def features(self, source: Unit) -> torch.Size:
        """Shape of the output of `forward`; `source` is the last unit that is copied."""
        if self.pool == 1:
            return source.features
        like = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        modes = [(module, module.training) for module in self.modules()]
        shape = self.eval()(torch.zeros(self._inputs, dtype=like.dtype, device=like.device)).shape
        for module, training in modes:
            module.training = training
        return shape

    @torch.no_grad()
    def update(self, towards: Sequence[Tensor] | None = None) -> None:
        """Update the EMA: `ema <- m * ema + (1 - m) * unit`, in one fused call.

        Args:
            towards: weights to average in, instead of the present values of `followed()`.
        """
        if self._averaged:
            followed = self.followed() if towards is None else towards
            get_ema_multi_avg_fn(self.decay)(self.averages(), followed, 0)  # pyright: ignore

    def _structure(self) -> list[object]:
        """The units' modules and their parameters' `requires_grad`, to be compared later."""
        modules = [module for unit in self._units for module in unit.modules()]
        return [*modules, *(p.requires_grad for module in modules for p in module.parameters(recurse=False))]

    def is_current(self) -> bool:
        """Whether the next block's units have the same modules and trained parameters as when they were copied."""
        return self._structure() == self._made_of

    def match_modes(self) -> None:
        """Give each module of the copies the training mode of its source; norms may be frozen in evaluation mode."""
        for module, source in self._modes:
            if module.training != source.training:
                module.training = source.training

    def shared(self) -> list[nn.Parameter]:
        """The next block's frozen parameters, which the copies share instead of copying them."""
        sources = {id(parameter) for _, source in self._modes for parameter in source.parameters(recurse=False)}
        return [parameter for parameter in self.parameters() if id(parameter) in sources]

    def follow(self) -> None:
        """Update the EMA if the next unit's weights have changed since the last call: once per optimizer step.

        A trained EMA (the fused form) is updated by `settle`, after its optimizer has stepped, with the weights that
        the next unit has at this call.
        """
        followed = self.followed()
        if versions(followed) == self._seen:
            return
        self._seen = versions(followed)
        averages = self.averages()
        if any(average.requires_grad for average in averages):
            self._due = [weight.detach().clone() for weight in followed], versions(averages)
        else:
            self.update()

    def settle(self) -> None:
        """Do the update that `follow` postponed, if the optimizer has stepped since."""
        if self._due is not None and versions(self.averages()) != self._due[1]:
            self.update(self._due[0])
            self._due = None


def _pairs(branch: nn.Module, source: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a module of the copy and the module that it copies."""
    copies = [branch] if len(source) == 1 else list(branch.children())
    return [
        pair
        for module, unit in zip(copies, source, strict=True)
        for pair in zip(module.modules(), unit.modules(), strict=True)
    ]


def _trained(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> list[tuple[nn.Module, nn.Module, str]]:
    """The source's trained parameters, each once, as (module of the copy, module of the source, name)."""
    found: dict[int, tuple[nn.Module, nn.Module, str]] = {}
    for module, source in pairs:
        for name, parameter in source.named_parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(id(parameter), (module, source, name))
    return list(found.values())
