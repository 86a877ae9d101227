"""Barlow Twins as a local loss: against float64 loops, two views, noise, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from localgrad import LocalGradError, Site
from localgrad.objectives.barlow import barlow, barlow_loss

FEATURES = (8, 6, 4, 4)


def site(features: tuple[int, ...] = FEATURES) -> Site:
    return Site(torch.Size(features), 1, torch.Size((8, 3, 16, 16)), index=0, num_blocks=4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(first: np.ndarray, second: np.ndarray, redundancy: float) -> float:
    """Equation 1 of the paper, in loops, with batch norm's 1e-5."""
    one, two = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-5) for v in (first, second))
    samples, size = first.shape
    total = 0.0
    for i in range(size):
        for j in range(size):
            correlation = sum(one[n, i] * two[n, j] for n in range(samples)) / samples
            total += (1 - correlation) ** 2 if i == j else redundancy * correlation**2
    return total


def test_the_loss_is_the_formula() -> None:
    first, second = normal(7, 5).double(), normal(7, 5, seed=1).double()
    expected = naive(first.numpy(), second.numpy(), 0.0051)
    assert float(barlow_loss(first, second)) == pytest.approx(expected, rel=1e-12)
    assert float(barlow_loss(first.float(), second.float())) == pytest.approx(expected, rel=1e-5)
    assert float(barlow_loss(first, first, 0.0)) == pytest.approx(0, abs=1e-8)


def test_the_halves_of_the_batch_are_the_views() -> None:
    module = barlow(12, (10, 7), redundancy=0.1, scale=0.5)(site())
    features = normal(*FEATURES)
    loss = module(features, torch.zeros(8), features)
    first, second = (module.projector(module.pooled(view)).detach().double().numpy() for view in features.chunk(2))
    assert first.shape == (4, 7)
    assert float(loss.detach()) == pytest.approx(0.5 * naive(first, second, 0.1), rel=1e-4)


def test_gradients_are_right() -> None:
    first, second = (normal(5, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: barlow_loss(a, b, 0.1), (first, second))


def test_labels_are_not_read() -> None:
    module = barlow(12, (7,))(site()).eval()
    features = normal(*FEATURES)
    assert torch.equal(module(features, None, None), module(features, torch.arange(8), features))
    assert not hasattr(module, "predict")


def test_noise_is_a_share_of_the_deviation_and_only_in_training() -> None:
    module = barlow(12, (7,), noise=0.25)(site((400, 6, 4, 4)))
    seen: list[Tensor] = []
    module.pooled[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features = 3 * normal(400, 6, 4, 4)
    module(features, None, None)
    noise = torch.cat(seen) - features
    assert float(noise.std() / features.std()) == pytest.approx(0.25, rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    seen.clear()
    module.eval()(features, None, None)
    assert torch.equal(torch.cat(seen), features)


def test_under_autocast_the_correlation_is_float32() -> None:
    module = barlow(12, (7,))(site())
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(normal(*FEATURES), None, None)
    assert loss.dtype == torch.float32


def test_an_odd_batch_is_refused() -> None:
    module = barlow(12, (7,))(site())
    with pytest.raises(LocalGradError, match="stack two views"):
        module(normal(7, 6, 4, 4), None, None)
    with pytest.raises(LocalGradError):
        module(normal(2, 6, 4, 4), None, None)


@pytest.mark.parametrize(
    "options",
    [{"width": 0}, {"projector": ()}, {"projector": (0,)}, {"noise": -1.0}, {"scale": 0.0}, {"redundancy": -1.0}],
)
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LocalGradError):
        barlow(**options)
