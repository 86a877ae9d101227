"""The forms that are fast on a processor: equal to their definitions, values and gradients."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import infopro, predsim
from localgrad.core.site import Site
from localgrad.objectives import fast
from localgrad.objectives.decoder import DirectDecoder
from localgrad.objectives.predsim import similarity_matrix

torch.set_num_threads(1)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Any, parts: list[Tensor], atol: float = 2e-4) -> None:
    """Values and gradients of two computations of the same."""
    slope = noise(*found.shape, seed=2).to(found)
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)
    for given, wanted in zip(
        torch.autograd.grad(found, parts, slope), torch.autograd.grad(expected, parts, slope), strict=True
    ):
        torch.testing.assert_close(given, wanted, atol=atol, rtol=1e-4)


def graph(result: Tensor) -> set[str]:
    """Names of the operations that a tensor was computed by."""
    left, found = [result.grad_fn], set[str]()
    while left:
        node = left.pop()
        if node is not None:
            found.add(node.name())
            left += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_after_upsampling_is_the_same_before_it(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for size, output, is_worthwhile in (((3, 2), (12, 16), True), ((1, 3), (8, 8), True), ((8, 8), (8, 9), False)):
        conv = nn.Conv2d(40, 5, 3, padding=1)
        convolved = fast.UpsampledConv(conv, size, output)
        assert convolved.is_worthwhile == is_worthwhile
        assert not list(convolved.parameters())
        features = noise(2, 40, *size).requires_grad_()
        plain = conv(F.interpolate(features, size=output, mode="bilinear", align_corners=True))
        close(convolved(features.contiguous(memory_format=layout)), plain, [features, *conv.parameters()])


def test_a_convolution_at_the_same_size_is_not_done_twice() -> None:
    assert not fast.UpsampledConv(nn.Conv2d(64, 5, 3, padding=1), (8, 8), (8, 8)).is_worthwhile


def test_the_decoder_has_one_value_in_every_layout() -> None:
    """Gradients too, though the norm works map by map where channels are last."""
    decoder = DirectDecoder(16, (8, 8), (16, 16), 3)
    features, slope = noise(4, 16, 8, 8).requires_grad_(), noise(4, 3, 16, 16)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = decoder(features.contiguous(memory_format=layout))
        found.append([logits, *torch.autograd.grad(logits, [features, *decoder.parameters()], slope)])
    for planes, last in zip(*found, strict=True):
        torch.testing.assert_close(planes, last, atol=1e-4, rtol=1e-4)


def test_entropy_of_logits_and_its_gradient_hold_at_the_extremes() -> None:
    logits = torch.tensor([0.0, 1e-3, -4.0, 20.0, -20.0, 120.0, -120.0], dtype=torch.float32).requires_grad_()
    for pixel in (0.0, 0.25, 1.0):
        pixels = torch.full_like(logits, pixel)
        exact = logits.detach().double()
        terms = [max(x, 0) - x * pixel + math.log1p(math.exp(-abs(x))) for x in exact.tolist()]
        loss = fast.binary_cross_entropy(logits, pixels)
        assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        (slope,) = torch.autograd.grad(3 * loss, logits)
        expected = 3 * (torch.sigmoid(exact) - pixel) / len(terms)
        torch.testing.assert_close(slope.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_deviation_over_space_is_the_unbiased_one() -> None:
    maps = noise(3, 5, 4, 6).requires_grad_()
    close(fast.channel_deviation(maps), maps.flatten(2).std(2), [maps], atol=1e-5)


@pytest.mark.parametrize("name", ["predsim", "infopro", "infopro of a small map"])
def test_an_objective_is_its_definition_where_no_fast_form_is_chosen(name: str) -> None:
    """As on an accelerator: the same loss and gradients."""
    size = 4 if name.endswith("map") else 16
    site = Site(torch.Size((6, 48, size, size)), 1, torch.Size((6, 3, 16, 16)), 0, 3)
    torch.manual_seed(0)
    objective = predsim(5)(site) if name == "predsim" else infopro(5, (0.5,) * 3, (0.25,) * 3)(site)
    features, inputs = noise(6, 48, size, size).requires_grad_(), torch.rand(6, 3, 16, 16)
    targets = torch.arange(6) % 5
    parts = [features, *(p for p in objective.parameters() if p.requires_grad)]
    found = objective(features, targets, inputs)
    with fast.simulated_device("cuda"):
        expected = objective(features, targets, inputs)
    close(found, expected, parts, atol=1e-5)


def test_what_stands_for_a_gpu_takes_the_formulas() -> None:
    tensor = torch.zeros(1)
    features = noise(4, 6, 3, 3).requires_grad_()
    with fast.simulated_device("cuda"):
        formula = graph(similarity_matrix(features))
    assert "StdBackward0" in formula and "StdBackward0" not in graph(similarity_matrix(features))
    assert fast.is_on_cpu(tensor)
    with fast.simulated_device("cuda"):
        assert not fast.is_on_cpu(tensor)
    assert fast.is_on_cpu(tensor)
