"""One class a pixel or a token: losses against float64 formulas, layouts, refusals."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import LocalGradError, Site
from localgrad.objectives.dense import dense

CLASSES = 4


def site(features: tuple[int, ...], inputs: tuple[int, ...] = (2, 3, 16, 24), channel_dim: int = 1) -> Site:
    return Site(torch.Size(features), channel_dim, torch.Size(inputs), index=0, num_blocks=3)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(seed))


def resized(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, half-pixel centres, clamped at the border, in loops; scores `(C, h, w)`."""
    channels, low_h, low_w = scores.shape
    result = np.zeros((channels, height, width))
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * low_h / height - 0.5, 0)
            u = max((x + 0.5) * low_w / width - 0.5, 0)
            top, left = int(v), int(u)
            below, right = min(top + 1, low_h - 1), min(left + 1, low_w - 1)
            dv, du = v - top, u - left
            result[:, y, x] = (1 - dv) * ((1 - du) * scores[:, top, left] + du * scores[:, top, right])
            result[:, y, x] += dv * ((1 - du) * scores[:, below, left] + du * scores[:, below, right])
    return result


def naive(scores: np.ndarray, targets: np.ndarray, ignored: int, weight: np.ndarray) -> float:
    """Weighed mean cross-entropy; scores `(N, C, H, W)`."""
    total = mass = 0.0
    for n, y, x in np.ndindex(*targets.shape):
        target = targets[n, y, x]
        if target != ignored:
            row = scores[n, :, y, x]
            total += weight[target] * (math.log(np.exp(row).sum()) - row[target])
            mass += weight[target]
    return total / mass


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.0, 0.25]])
@pytest.mark.parametrize("ignored", [-100, 3, 255])
def test_maps_are_resized_to_the_targets(weight: list[float] | None, ignored: int) -> None:
    module = dense(CLASSES, weight=weight, ignore_index=ignored)(site((2, 8, 4, 6)))
    features, targets = maps(2, 8, 4, 6), classes(2, 16, 24)
    targets[0, :3] = ignored
    loss = module(features, targets, maps(2, 3, 16, 24))
    low = module.predict(features)
    assert low.shape == (2, CLASSES, 4, 6)
    scores = np.stack([resized(each, 16, 24) for each in low.detach().double().numpy()])
    expected = naive(scores, targets.numpy(), ignored, np.array(weight or [1.0] * CLASSES))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


def test_gradients_are_autograd_s_of_the_plain_formula() -> None:
    module = dense(CLASSES)(site((2, 8, 4, 6))).double()
    features = maps(2, 8, 4, 6).double().requires_grad_()
    targets = classes(2, 16, 24)
    (gradient,) = torch.autograd.grad(module(features, targets, maps(2, 3, 16, 24)), features)
    scores = F.interpolate(module.classifier(features), (16, 24), mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad(F.cross_entropy(scores, targets), features)
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_where_nothing_counts_the_loss_is_zero() -> None:
    for weight in (None, [1.0, 0.0, 1.0, 1.0]):
        module = dense(CLASSES, weight=weight, ignore_index=255)(site((2, 8, 4, 6)))
        features = maps(2, 8, 4, 6).requires_grad_()
        loss = module(features, torch.full((2, 16, 24), 255), maps(2, 3, 16, 24))
        loss.backward()
        assert loss == 0 and features.grad is not None and not features.grad.any()


def test_reconstruction_is_added_by_its_weight() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    module = dense(CLASSES, reconstruction=1.5, mean=mean, std=std)(site((2, 8, 4, 6)))
    features, targets = maps(2, 8, 4, 6), classes(2, 16, 24)
    loss = module(features, targets, images).detach()
    scores = F.interpolate(module.predict(features), (16, 24), mode="bilinear", align_corners=False)
    logits = module.decoder(features).detach().double().numpy()
    t = pixels.double().numpy()
    reconstruction = -(t * -np.log1p(np.exp(-logits)) + (1 - t) * -np.log1p(np.exp(logits))).mean()
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(scores, targets).detach()) + 1.5 * reconstruction, abs=1e-5
    )
    assert dense(CLASSES)(site((2, 8, 4, 6))).decoder is None


def test_tokens_of_a_text_have_one_class_each() -> None:
    module = dense(CLASSES)(site((2, 5, 8), (2, 5), channel_dim=2))
    features, targets, tokens = maps(2, 5, 8), classes(2, 5), classes(2, 5, seed=3)
    targets[1, 2] = -100
    x = features.double().numpy()
    norm, linear = module.classifier
    hidden = (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + norm.eps)
    scores = hidden @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    expected = naive(scores.transpose(0, 2, 1)[..., None], targets.numpy()[..., None], -100, np.ones(CLASSES))
    assert float(module(features, targets, tokens).detach()) == pytest.approx(expected, abs=1e-5)


def test_labels_that_repeat_the_tokens_are_shifted_or_refused() -> None:
    where = site((2, 5, 8), (2, 5), channel_dim=2)
    features, tokens = maps(2, 5, 8), classes(2, 5)
    module = dense(CLASSES, shift=True)(where)
    expected = F.cross_entropy(module.predict(features)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(module(features, tokens, tokens), expected)
    with pytest.raises(LocalGradError, match="shift=True"):
        dense(CLASSES)(where)(features, tokens, tokens)
    with pytest.raises(LocalGradError, match="shift=False"):
        dense(CLASSES, shift=True)(where)(features, classes(2, 5, seed=3), tokens)


def test_tokens_of_an_image_are_laid_on_its_grid() -> None:
    module = dense(CLASSES)(site((2, 1 + 24, 8), (2, 3, 16, 24), channel_dim=2))
    features, targets = maps(2, 25, 8), classes(2, 16, 24)
    low = module.predict(features)
    assert low.shape == (2, CLASSES, 4, 6)
    as_map = features[:, 1:].transpose(1, 2).reshape(2, 8, 4, 6)
    assert torch.allclose(low, module.classifier(as_map))
    assert module(features, targets, maps(2, 3, 16, 24)).ndim == 0


def test_another_criterion_gets_scores_of_the_targets_size() -> None:
    module = dense(1, criterion=lambda scores, depth: (scores[:, 0] - depth).square().mean())(site((2, 8, 4, 6)))
    features, depth = maps(2, 8, 4, 6), maps(2, 16, 24)
    scores = F.interpolate(module.predict(features), (16, 24), mode="bilinear", align_corners=False)
    assert torch.allclose(module(features, depth, depth), (scores[:, 0] - depth).square().mean())
    labels = dense(CLASSES, criterion=nn.BCEWithLogitsLoss())(site((2, 8, 4, 6)))
    assert labels(features, torch.rand(2, CLASSES, 16, 24), depth).ndim == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "2 or more"),
        ({"weight": [1.0, 2.0]}, "2 values for 4 classes"),
        ({"criterion": "mse"}, "give a function"),
        ({"criterion": nn.CrossEntropyLoss(), "weight": [1.0] * 4}, "has the weights itself"),
        ({"reconstruction": -1.0}, "0 or more"),
        ({"mean": (0.5,), "std": ()}, "one std above 0"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        dense(**{"num_classes": CLASSES} | options)


def test_sites_and_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LocalGradError, match="takes vectors"):
        dense(CLASSES)(site((2, 8)))
    with pytest.raises(LocalGradError, match="channel means"):
        dense(CLASSES, reconstruction=1.0)(site((2, 8, 4, 6)))
    with pytest.raises(LocalGradError):
        dense(CLASSES, reconstruction=1.0, mean=(0.5,), std=(0.5,))(site((2, 5, 8), (2, 5), channel_dim=2))
    with pytest.raises(LocalGradError, match="one class a pixel"):
        dense(CLASSES)(site((2, 8, 4, 6)))(maps(2, 8, 4, 6), classes(2), maps(2, 3, 16, 24))
    with pytest.raises(LocalGradError, match=r"\(2, 4\)"):
        dense(CLASSES)(site((2, 5, 8), (2, 5), channel_dim=2))(maps(2, 5, 8), classes(2, 4), classes(2, 5))


class Doubled(nn.Module):
    """A criterion with an ignored class of its own."""

    ignore_index = 3

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        return 2 * F.cross_entropy(scores, targets, ignore_index=self.ignore_index)


def test_the_models_criterion_is_taken_where_none_is_given() -> None:
    weighed = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 1.0]), label_smoothing=0.1)
    features, targets = maps(2, 8, 4, 6), classes(2, 16, 24)
    for criterion in (weighed, Doubled()):
        with_model = replace(site((2, 8, 4, 6)), criterion=criterion)
        head = dense(CLASSES)(with_model)
        scores = F.interpolate(head.predict(features), size=(16, 24), mode="bilinear")
        assert torch.allclose(head(features, targets, torch.empty(0)), criterion(scores, targets))
        assert all(id(criterion) != id(module) for module in head.modules())  # it is the model's, not the head's
        own = dense(CLASSES, ignore_index=2)(with_model)
        plain = F.interpolate(own.predict(features), size=(16, 24), mode="bilinear")
        expected = F.cross_entropy(plain, targets, ignore_index=2)
        assert torch.allclose(own(features, targets, torch.empty(0)), expected)
    tokens = dense(CLASSES, shift=True)(replace(site((2, 6, 8), (2, 6), 2), criterion=Doubled()))
    ids = torch.tensor([[0, 1, 2, 3, 1, 0], [3, 3, 0, 1, 2, 2]])
    scores = tokens.predict(maps(2, 6, 8))
    expected = Doubled()(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(tokens(maps(2, 6, 8), ids, ids), expected)


def test_targets_of_several_labels_a_pixel_by_the_models_criterion() -> None:
    head = dense(CLASSES)(replace(site((2, 8, 4, 6)), criterion=nn.BCEWithLogitsLoss()))
    labels = torch.randint(0, 2, (2, CLASSES, 16, 24)).float()
    assert head(maps(2, 8, 4, 6), labels, torch.empty(0)).isfinite()
