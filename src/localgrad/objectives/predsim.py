"""PredSim: the weighted sum of a prediction loss and a similarity matching loss."""

# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Criterion, Site
from localgrad.errors import SettingsError
from localgrad.objectives import fast
from localgrad.objectives.layout import AsMap, check_num_classes, full_precision
from localgrad.objectives.targets import HeadCriterion, check_classes, left_out


class PredSim(nn.Module):
    """The criterion on the scores of a linear layer, and a similarity matching loss; see `predsim`."""

    reads_inputs = False

    def __init__(
        self, site: Site, num_classes: int, beta: float, max_features: int, criterion: Criterion | None
    ) -> None:
        super().__init__()
        self.criterion = HeadCriterion(criterion, site, num_classes)
        self.as_map = AsMap(site, "predsim")
        channels, size = self.as_map.channels, self.as_map.size
        self.beta, self.num_classes = beta, num_classes
        pool, pooled = prediction_pool(channels, size, max_features)
        self.classifier = nn.Sequential(pool, nn.Flatten(), nn.Linear(channels * pooled[0] * pooled[1], num_classes))
        if len(site.features) == 2:
            self.similarity: nn.Module = nn.Linear(channels, channels, bias=False)
        else:
            self.similarity = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        initialise(self)

    def predict(self, features: Tensor) -> Tensor:
        """Features to class scores `(N, num_classes)`."""
        return self.classifier(self.as_map(features))

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """Features, targets (classes `(N,)` or rows `(N, num_classes)`) and inputs (unused) to a scalar loss."""
        prediction = self.criterion(self.predict(features), targets)
        matched = features if isinstance(self.similarity, nn.Linear) else self.as_map(features)
        found = similarity_matrix(self.similarity(matched))
        wanted, labelled = self._labels(targets)
        with full_precision(features):
            pairs = (labelled[:, None] * labelled).to(found)  # 1 where both samples have a label
            alike = similarity_matrix(wanted).to(found)  # CUDA refuses an mse_loss of two dtypes
            matching = F.mse_loss(found * pairs, alike * pairs) * (pairs.numel() / pairs.sum())
        return (1 - self.beta) * prediction + self.beta * matching

    def _labels(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of the samples as rows `(N, num_classes)`, and `(N,)` with 1 for a sample with a label, else 0."""
        if isinstance(targets, Tensor) and targets.ndim == 2 and targets.shape[1] == self.num_classes:
            return targets, targets.new_ones(len(targets), dtype=torch.float32)
        check_classes(targets, "predsim")
        ignored = left_out(targets, self.criterion.ignore_index)
        return F.one_hot(targets.masked_fill(ignored, 0), self.num_classes), (~ignored).float()


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of samples, `(N, ...)` to `(N, N)`, in float32 or wider.

    Maps of more than 3 channels and more than one row are first reduced to the standard deviation of each channel over
    space (unbiased). Each row is centred and divided by its norm (plus 1e-8); entries are clamped to [-1, 1].
    """
    with full_precision(features):
        features = features if features.dtype == torch.float64 else features.float()
        if features.ndim == 4 and features.shape[1] > 3 and features.shape[2] > 1:
            on_cpu = fast.is_on_cpu(features)
            features = fast.channel_deviation(features) if on_cpu else features.flatten(2).std(2)
        rows = features.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        length = cast(Tensor, cast(Any, rows).norm(dim=1, keepdim=True))
        rows = rows / (1e-8 + length)
        return (rows @ rows.T).clamp(-1, 1)


def prediction_pool(channels: int, size: tuple[int, int], limit: int) -> tuple[nn.Module, tuple[int, int]]:
    """Average pooling to at most `limit` features, or to one pixel if there are more than `limit` channels.

    The kernel is doubled in height and in width in turns, until the features are few enough.

    Returns:
        The layer, and the height and width of its output.
    """
    kernel, pooled, axis = [1, 1], [*size], 0
    while channels * pooled[0] * pooled[1] > limit and pooled != [1, 1]:
        if pooled[axis] > 1:
            kernel[axis] *= 2
            pooled[axis] = math.ceil(size[axis] / kernel[axis])
        axis = 1 - axis
    if kernel == [1, 1]:
        return nn.Identity(), (size[0], size[1])
    padding = [kernel[i] * (pooled[i] - size[i] // kernel[i]) // 2 for i in (0, 1)]
    layer = nn.AvgPool2d((kernel[0], kernel[1]), padding=(padding[0], padding[1]))
    left = [(size[i] + 2 * padding[i] - kernel[i]) // kernel[i] + 1 for i in (0, 1)]
    return layer, (left[0], left[1])


def predsim(
    num_classes: int, beta: float = 0.99, max_features: int = 512, criterion: Criterion | None = None
) -> Callable[[Site], nn.Module]:
    """PredSim: `L = (1 - beta) CE(W pool(h), y) + beta MSE(S(conv(h)), S(onehot(y)))`.

    S is the matrix of cosine similarities between the samples of the batch (`similarity_matrix`). MSE is the mean over
    all entries of the matrix, so a batch in two micro-batches has another loss. `conv` is a 3x3 convolution from C to C
    channels without bias; for vectors `(N, D)` it is a linear layer. Tokens are laid on the grid of patches. Pairs with
    a sample that the criterion ignores (or whose class is negative) are left out of the mean. Targets may also be rows
    `(N, num_classes)` of several labels or probabilities, which are used instead of onehot(y).

    Args:
        num_classes: number of classes, at least 2.
        beta: weight of similarity matching, from 0 to 1.
        max_features: the map is average-pooled to at most this number of features for the prediction, or to one pixel
            if there are more channels; 512 in the papers' tables on CIFAR, 1024 to 4096 in the original.
        criterion: loss of the head's scores `(N, num_classes)` and the targets, CE above. By default it is the model's
            criterion, which is cross-entropy unless `split` gets another.

    Returns:
        A function of a site that builds the module. The module's head is `.classifier`, and `conv` is `.similarity`.

    Raises:
        SettingsError: an argument is out of range.
        CannotSitError: when built, tokens form no grid.

    Source: Nøkland and Eidnes 2019, Training Neural Networks with Local Error Signals
    (https://arxiv.org/abs/1901.06656), section 2, and released code, `train.py`. Two choices follow AugLocal's tables:
    the last block's cross-entropy has weight 1 (1 - beta in the original), and the prediction layer keeps PyTorch's
    default initial values (zero in the original).
    """
    check_num_classes(num_classes)
    if not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise SettingsError(f"beta is {beta!r}: it is the weight of similarity matching, from 0 to 1; try 0.99")
    if max_features < 1:
        raise SettingsError(f"max_features is {max_features}: it must be at least 1; try 512")
    return lambda site: PredSim(site, num_classes, beta, max_features, criterion)
