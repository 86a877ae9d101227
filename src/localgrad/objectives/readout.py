"""The model's own output layer, read but not trained, as the last layer of a local head."""

# pyright: reportUnnecessaryIsInstance=false

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.initialise import draw_anew
from localgrad.core.modules import named_modules
from localgrad.core.site import Site
from localgrad.errors import LocalGradError
from localgrad.objectives.layout import full_precision
from localgrad.objectives.tokens import check_shift, shifted

SCORES_AT_ONCE = 2**24
"""Number of scores in memory at once if `chunk` is None: 64 MiB of float32."""


class Readout(nn.Module):
    """Cross-entropy of scores that the model's own output layer computes; see `readout`."""

    def __init__(
        self,
        site: Site,
        head: str,
        norm: str | None,
        depth: int,
        shift: bool,
        ignore_index: int,
        chunk: int | None,
    ) -> None:
        super().__init__()
        # a tuple is not registered; the layer is looked up by name because it may be replaced (a resized vocabulary)
        self._model, self._head = (site.model,), head
        self.shift, self.ignore_index, self.chunk = shift, ignore_index, chunk
        self._checked = False
        channels = site.features[-1]
        if len(site.features) not in (2, 3) or site.channel_dim != len(site.features) - 1:
            raise LocalGradError(
                f"readout cannot sit on features {tuple(site.features)} (block {site.index}): it takes tokens "
                "(N, L, D) or vectors (N, D); localgrad.dense takes maps"
            )
        weight, _ = self._output_layer()
        if weight.ndim != 2 or weight.shape[1] != channels:
            raise LocalGradError(
                f"readout cannot read {head!r}: its weight is {tuple(weight.shape)} and features have {channels} "
                f"channels (block {site.index}); name a linear layer of that width, or use localgrad.dense"
            )
        own_norm = nn.RMSNorm(channels) if norm is None else copy.deepcopy(_submodule(site.model, norm, "norm"))
        self.classifier = nn.Sequential(*_fresh_units(site, depth), own_norm.requires_grad_(True))
        self.scale = nn.Parameter(torch.ones(1))

    def _output_layer(self) -> tuple[Tensor, Tensor | None]:
        layer = _submodule(self._model[0], self._head, "head")
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, Tensor):
            raise LocalGradError(
                f"head {self._head!r} is a {type(layer).__name__} without a weight: name a linear layer"
            )
        return weight.detach(), None if bias is None else bias.detach()

    def predict(self, features: Tensor) -> Tensor:
        """Features `(N, L, D)` or `(N, D)` to scores `(N, L, V)` or `(N, V)`, all in memory at once."""
        weight, bias = self._output_layer()
        hidden = self.scale * self.classifier(features)
        return F.linear(hidden.to(weight.dtype), weight, bias)

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """Features, classes `(N, L)` or `(N,)` and inputs (read once, to check `shift`) to a scalar loss in float32."""
        if targets.shape != features.shape[:-1] or targets.is_floating_point():
            raise LocalGradError(
                f"readout got features {tuple(features.shape)} and targets {tuple(targets.shape)} {targets.dtype}: "
                f"give one class for each of {tuple(features.shape[:-1])}, as integers"
            )
        if targets.ndim == 2:
            if not self._checked:
                check_shift(targets, inputs, self.shift, self.ignore_index, "readout")
                self._checked = True
            targets = shifted(targets, self.ignore_index) if self.shift else targets
        hidden = (self.scale * self.classifier(features)).flatten(0, -2)
        weight, bias = self._output_layer()
        return linear_cross_entropy(hidden, weight, bias, targets.flatten(), self.ignore_index, self.chunk)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets)`, a few rows at a time, with a gradient for `hidden` alone.

    The forward pass computes the gradient `(softmax(z) - onehot(y)) @ weight` together with the loss, chunk by chunk.
    It saves this gradient for the backward pass instead of the scores: D numbers a row instead of V.

    Args:
        hidden: `(T, D)`.
        weight: `(V, D)`.
        bias: `(V,)` or None.
        targets: classes `(T,)`.
        ignore_index: the class of rows that do not count. If no row counts the loss is 0.
        chunk: number of rows at once; None takes as many as give 16 million scores.

    Returns:
        The mean over the rows that count, in float32 (float64 for float64). Products are computed in the dtype of
        autocast if it is on, else in the dtype that `hidden` and `weight` promote to.
    """
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    chunk = chunk or max(1, SCORES_AT_ONCE // len(weight))
    with full_precision(hidden):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, ignore_index, chunk)  # pyright: ignore


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        counted = targets != ignore_index
        classes = targets.masked_fill(~counted, 0)[:, None]
        total = hidden.new_zeros((), dtype=wide)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            scores = F.linear(hidden[rows].to(weight.dtype), weight, bias).to(wide)
            log_p = scores.log_softmax(1)
            total += F.nll_loss(log_p, targets[rows], ignore_index=ignore_index, reduction="sum")
            if gradient is not None:
                error = log_p.exp_()
                error.scatter_add_(1, classes[rows], error.new_full(classes[rows].shape, -1))
                error.masked_fill_(~counted[rows, None], 0)
                gradient[rows] = (error.to(weight.dtype) @ weight).to(hidden.dtype)
        count = counted.sum().clamp(min=1)
        ctx.save_for_backward(gradient, count)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, count = ctx.saved_tensors
        # divided here and not in forward: the gradient of one of many tokens may be too small for float16
        return gradient * (gradients[0] / count).to(gradient.dtype), None, None, None, None, None


def _submodule(model: nn.Module | None, name: str, argument: str) -> nn.Module:
    found = dict(named_modules(model)).get(name) if model is not None else None
    if found is None or not name:
        have = "the site has no model" if model is None else f"{type(model).__name__} has no such submodule"
        raise LocalGradError(
            f"{argument} is {name!r} and {have}: give a dotted name as model.named_modules() lists it, "
            'such as readout("lm_head")'
        )
    return found


def _fresh_units(site: Site, depth: int) -> list[nn.Module]:
    """Copies of the first `depth` units after the cut, with their own weights, drawn anew."""
    following = list(itertools.islice(site.following, depth))
    if len(following) < depth:
        raise LocalGradError(
            f"depth is {depth} and {len(following)} units follow block {site.index}: give at most so many"
        )
    fresh = [copy.deepcopy(unit.module).requires_grad_(True) for unit in following]
    for unit, module in zip(following, fresh, strict=True):
        needed = [
            parameter.name
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if len(needed) > 1 or unit.features[-1] != site.features[-1]:
            raise LocalGradError(
                f"depth is {depth} and {unit.name!r} after block {site.index} takes {', '.join(needed)} and gives "
                f"{tuple(unit.features)}: fresh units take and give features {tuple(site.features)} alone; give depth=0"
            )
        draw_anew(list(module.modules()))
    return fresh


def readout(
    head: str,
    norm: str | None = None,
    depth: int = 0,
    *,
    shift: bool = True,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Callable[[Site], nn.Module]:
    """Class scores by the model's own output layer, read-only: `z = s norm(phi(h)) W^T + b`, `L = CE(z, y)`.

    W and b are the present weights of the model's output layer. The last block trains them; local losses give them no
    gradient. The block has its own norm, its own number s (initially 1) and its own phi, `depth` units shaped like
    those after the cut. For a language model this saves an output layer of V x D weights for each block.

    The scores of all tokens are never in memory at once: loss and gradient are computed for a chunk of tokens at a
    time.

    Args:
        head: dotted name of the model's output layer, such as `"lm_head"`: a linear layer `(V, D)` with or without
            bias, whose weight may be tied to the embedding.
        norm: dotted name of the norm before it, such as `"transformer.ln_f"`. The block gets a copy with the norm's
            present values and trains it. None gives a new RMSNorm.
        depth: number of new units before the norm, shaped like those after the cut.
        shift: whether labels `(N, L)` repeat the input tokens, as for causal models of Hugging Face, so that each
            position predicts the next token. Give False if labels are next tokens already, or other labels (masked
            models). The first batch is checked. It has no effect on vectors `(N, D)`.
        ignore_index: the class of tokens that do not count.
        chunk: number of tokens at once. None takes as many as give 16 million scores, 64 MiB in float32.

    Returns:
        A function of a site that builds the module; phi and the norm are `.classifier`, s is `.scale`.

    Raises:
        LocalGradError: `depth` or `chunk` is out of range; when built, the model has no such layer, the layer's width
            is not that of the features, or a unit after the cut cannot run alone; on the first batch, `shift` is wrong.

    Source: SOLO (https://arxiv.org/abs/2609.35440), where phi is two transformer blocks.
    """
    if not isinstance(head, str) or not head or not (norm is None or isinstance(norm, str)):
        raise LocalGradError(
            f'head is {head!r} and norm {norm!r}: give names of submodules, such as readout("lm_head")'
        )
    if not isinstance(depth, int) or depth < 0:
        raise LocalGradError(f"depth is {depth!r}: it is a number of units, 0 or more")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise LocalGradError(f"chunk is {chunk!r}: it is a number of tokens, 1 or more, or None")
    return lambda site: Readout(site, head, norm, depth, shift, ignore_index, chunk)
