"""The learning rate against values that the released training scripts print."""

import math

import pytest

from localgrad.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("epochs", "peak", "epoch", "expected"),
    [
        (400, 0.8, 1, 0.01),
        (400, 0.8, 2, 0.088995),
        (400, 0.8, 5, 0.325877),
        (400, 0.8, 10, 0.719890),
        (400, 0.8, 11, 0.798508),
        (400, 0.8, 200, 0.4),
        (400, 0.8, 400, 0.0),
        (400, 0.1, 10, 0.090861),
        (400, 0.1, 11, 0.099814),
        (160, 0.8, 10, 0.714083),
        (160, 0.8, 11, 0.790706),
    ],
)
def test_values_of_the_papers_recipes(epochs: int, peak: float, epoch: int, expected: float) -> None:
    assert learning_rate(epoch, epochs=epochs, peak=peak) == pytest.approx(expected, abs=5e-7)


def test_warm_up_keeps_its_ten_epochs_in_a_short_run() -> None:
    by_hand = 0.5 * 0.8 * (1 + math.cos(math.pi * 3 / 5)) * 2 / 10 + 0.01 * 8 / 10
    assert learning_rate(3, epochs=5, peak=0.8) == pytest.approx(by_hand, rel=1e-12)


def test_warm_up_of_two_epochs_and_of_none() -> None:
    assert learning_rate(1, epochs=20, peak=0.5, warmup_epochs=2) == pytest.approx(0.01)
    assert learning_rate(3, epochs=20, peak=0.5, warmup_epochs=2) == pytest.approx(
        0.25 * (1 + math.cos(math.pi * 3 / 20))
    )
    assert learning_rate(1, epochs=2, peak=0.5, warmup_epochs=0) == pytest.approx(0.25)


def test_imagenet_counts_from_zero() -> None:
    rates = [learning_rate(epoch, epochs=90, peak=0.4, warmup_epochs=0, first_epoch=0) for epoch in (1, 46, 90)]
    assert rates == pytest.approx([0.4, 0.2, 0.2 * (1 + math.cos(math.pi * 89 / 90))])


def test_a_small_peak_is_not_overshot() -> None:
    assert max(learning_rate(epoch, epochs=100, peak=0.001) for epoch in range(1, 101)) <= 0.001
