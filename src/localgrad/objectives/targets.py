"""The criterion that heads apply to scores and targets, and checks of targets."""

import copy
import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.site import Criterion, Site
from localgrad.errors import CannotSitError, LocalGradError

OTHER_TARGETS = (
    "for several labels a sample give a criterion for them (nn.BCEWithLogitsLoss()), for values to predict "
    "F.mse_loss, for targets a pixel or a token an objective that keeps places apart (localgrad.dense)"
)


class HeadCriterion(nn.Module):
    """The loss of a head, `criterion(scores, targets)`. Without a criterion it is the site's.

    Scores are cast to float32 first, unless targets are float64. Scores `(N, 1)` become `(N,)` if targets are `(N,)`. A
    criterion with trained parameters is copied, since no two blocks may train the same parameters. Any other criterion
    is used itself, so that later changes of it (annealed label smoothing) take effect here too.

    Softmax cross-entropy takes classes `(N,)` or rows of probabilities `(N, C)`; other targets are refused. Rows of
    numbers are checked by their values, which needs a synchronization with the device.

    Attributes:
        is_softmax: whether the criterion is softmax cross-entropy.
        ignore_index: the class that the criterion ignores.
    """

    def __init__(self, criterion: Criterion | None, site: Site, num_classes: int) -> None:
        super().__init__()
        criterion = site.criterion if criterion is None else criterion
        trains = isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters())
        self.trained = copy.deepcopy(criterion) if trains else None
        self._criterion = (criterion,)  # a tuple is not registered
        function: Any = criterion
        options: dict[str, Any] = {}
        if isinstance(criterion, functools.partial):
            function, options = criterion.func, criterion.keywords
        self.is_softmax = function is F.cross_entropy or isinstance(function, nn.CrossEntropyLoss)
        self.ignore_index: int = options.get("ignore_index", getattr(cast(Any, criterion), "ignore_index", -100))
        if self.is_softmax and num_classes < 2:
            raise CannotSitError(
                f"num_classes is {num_classes} (block {site.index}), and softmax cross-entropy tells 2 or more apart; "
                "for one value a sample give criterion=F.mse_loss or nn.BCEWithLogitsLoss()"
            )

    def forward(self, scores: Tensor, targets: Any) -> Tensor:
        """Scores `(N, C)` and targets to the criterion's loss."""
        if not (isinstance(targets, Tensor) and targets.dtype == torch.float64):
            scores = scores.float()
        if isinstance(targets, Tensor) and targets.ndim == 1 and scores.shape[1] == 1:
            scores = scores[:, 0]
        if self.is_softmax and scores.ndim == 2:  # scores of pixels are left to the criterion's own checks
            check_softmax_targets(scores, targets)
        return self._on(scores.device)(scores, targets)

    def _on(self, device: torch.device) -> Criterion:
        """The criterion, with its buffers (such as class weights) on the device of the scores."""
        criterion = self._criterion[0] if self.trained is None else self.trained
        if isinstance(criterion, nn.Module) and any(buffer.device != device for buffer in criterion.buffers()):
            return copy.deepcopy(criterion).to(device)
        return criterion


def check_softmax_targets(scores: Tensor, targets: Any) -> None:
    """Refuse targets that are neither classes `(N,)` nor rows of probabilities `(N, C)`."""
    takes = f"it takes one class a sample, (N,) of torch.int64, or probabilities (N, {scores.shape[1]})"
    if not isinstance(targets, Tensor):
        raise LocalGradError(f"targets are a {type(targets).__name__} under softmax cross-entropy: {takes}")
    given = f"targets are {targets.dtype} of shape {tuple(targets.shape)} under softmax cross-entropy"
    if not targets.is_floating_point():
        if targets.ndim != 1:
            raise LocalGradError(f"{given}: {takes}; {OTHER_TARGETS}")
        if targets.dtype not in (torch.int64, torch.uint8):
            raise LocalGradError(f"{given}: {takes}; give targets.long()")
        return
    if targets.ndim != 2 or targets.shape[1] != scores.shape[1]:
        raise LocalGradError(f"{given}: {takes}; classes as targets.long(); {OTHER_TARGETS}")
    if has_values(targets) and not is_distribution(targets):
        raise LocalGradError(f"{given}, and their rows are no probabilities that sum to 1: {takes}; {OTHER_TARGETS}")


def check_classes(targets: Any, what: str) -> None:
    """Refuse targets that are not one class per sample, `(N,)`; `what` names the loss in the message."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
        is_tensor = isinstance(targets, Tensor)
        given = f"{targets.dtype} of shape {tuple(targets.shape)}" if is_tensor else f"a {type(targets).__name__}"
        raise LocalGradError(
            f"targets are {given}: {what} compares the classes of samples and takes one a sample, (N,) of torch.int64"
        )


def is_distribution(rows: Tensor) -> bool:
    """Whether no entry of `(N, C)` is negative and each row sums to 1, within 0.02 (for rows in 16-bit dtypes)."""
    return bool(((rows >= 0).all(1) & ((rows.detach().float().sum(1) - 1).abs() <= 0.02)).all())


def has_values(tensor: Tensor) -> bool:
    """Whether the host can read the values: not on `meta`, in a simulation, or while a CUDA graph is captured."""
    if tensor.untyped_storage().device.type == "meta":
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def left_out(targets: Tensor, ignore_index: int) -> Tensor:
    """Mask `(N,)` of the samples without a label: those of class `ignore_index`, and of any class below 0."""
    return (targets == ignore_index) | (targets < 0)
