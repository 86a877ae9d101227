"""Greedy local learning: pooled features and one linear layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from localgrad.core.initialise import initialise
from localgrad.core.site import Criterion, Site
from localgrad.errors import CannotSitError
from localgrad.objectives.layout import AsMap, MeanOverSpace, check_num_classes
from localgrad.objectives.targets import HeadCriterion


class Classifier(nn.Module):
    """A criterion on the scores of a linear layer on pooled features; see `classifier`."""

    reads_inputs = False

    def __init__(self, site: Site, num_classes: int, criterion: Criterion | None) -> None:
        super().__init__()
        self.criterion = HeadCriterion(criterion, site, num_classes)
        channels = site.features[site.channel_dim]
        if len(site.features) == 3 and site.channel_dim != 1:
            self.classifier = nn.Sequential(
                nn.LayerNorm(channels), TokenPool(_prefix_tokens(site)), nn.Linear(channels, num_classes)
            )
        else:
            as_map = AsMap(site, "classifier")
            self.classifier = nn.Sequential(as_map, MeanOverSpace(), nn.Linear(channels, num_classes))
        initialise(self)

    def predict(self, features: Tensor) -> Tensor:
        """Features to class scores `(N, num_classes)`."""
        return self.classifier(features)

    def forward(self, features: Tensor, targets: Any, inputs: Tensor) -> Tensor:
        """Features, targets of the criterion (classes `(N,)`) and inputs (unused) to a scalar loss."""
        return self.criterion(self.predict(features), targets)


def _prefix_tokens(site: Site) -> int:
    try:
        return AsMap(site, "classifier").prefix_tokens
    except CannotSitError:
        return 0  # the tokens form no grid of patches


class TokenPool(nn.Module):
    """Tokens `(N, L, D)` to `(N, D)`: the class token if there is one, else the mean over the patches."""

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        # the first token is a class token if there is 1, if there are 2 (class and distillation token), or if the
        # number is odd (class token and an even number of registers); any other number are registers alone
        self.first_token = prefix_tokens == 2 or prefix_tokens % 2 == 1

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.first_token else tokens[:, self.prefix_tokens :].mean(1)


def classifier(num_classes: int, criterion: Criterion | None = None) -> Callable[[Site], nn.Module]:
    """Greedy supervised local learning: `L = criterion(W pool(h) + b, y)`, cross-entropy in the paper.

    Maps are averaged over space. Tokens `(N, L, D)` pass a LayerNorm; then the class token is taken, or without one the
    mean over the patches (the local head of MAN++ for ViT). The first of the tokens before the patches is the class
    token if there are two such tokens (DeiT) or an odd number. Four or any larger even number are registers, which are
    left out of the mean.

    Args:
        num_classes: width of the head: classes (2 or more under cross-entropy), labels, or values to predict.
        criterion: loss of the head's scores `(N, num_classes)` and the targets. By default it is the model's criterion,
            which is cross-entropy unless `split` gets another.

    Returns:
        A function of a site that builds the module. The module's head is `.classifier`.

    Raises:
        SettingsError: `num_classes` is less than 1.
        CannotSitError: when built, `num_classes` is 1 under cross-entropy.

    Source: Belilovsky et al. 2019 (https://arxiv.org/abs/1812.11446), section 3; head `0c1f` of Wang et al. 2021
    (https://arxiv.org/abs/2101.10832).
    """
    check_num_classes(num_classes, at_least=1)
    return lambda site: Classifier(site, num_classes, criterion)
