"""Memory: the counter is exact where the answer is known, costs add up, and the plan is that of the real step."""

import pytest
import torch
from torch import nn

import localgrad
from helpers.cases import MOMENTA, NUM_CLASSES, OBJECTIVES
from localgrad import units
from localgrad.core.costs import unit_costs
from localgrad.models import cifar_resnet
from localgrad.planning.measure import PeakMemory, measure_peak
from localgrad.planning.step_peak import step_peak

EXAMPLE = torch.empty(4, 3, 16, 16)


def test_the_counter_counts_what_is_alive_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        view = third[:10]
        view.add_(1)
        return view

    result, peak = measure_peak(work)
    assert result.shape == (10,)
    assert peak == 8000


def test_what_was_there_before_is_not_counted() -> None:
    kept = torch.zeros(1000)
    _, peak = measure_peak(lambda: kept.add_(1).view(10, 100))
    assert peak == 0


def test_a_linear_layer_keeps_what_the_formula_says() -> None:
    layer, inputs = nn.Linear(100, 50), torch.randn(8, 100)
    counter = PeakMemory()
    with counter:
        output = layer(inputs)
        loss = output.square().sum()
        assert counter.current == 4 * (8 * 50 * 2 + 1) - 4 * 8 * 50  # the squares are gone, output and loss are not
        loss.backward()
        del output, loss
    assert counter.current == 4 * (100 * 50 + 50)


def test_the_cost_of_a_unit_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 5))
    found = units(model, EXAMPLE)
    first, last = unit_costs(found, EXAMPLE)
    assert (first.name, first.parameters) == ("0", 8 * 27 + 8)
    assert first.flops == 2 * 4 * 256 * 8 * 27
    assert first.activations == 4 * (4 * 8 * 256)  # ReLU keeps its output, which is the unit's
    assert last.flops == 2 * 4 * 8 * 256 * 5
    assert first.end_activations == 0


def test_ending_a_block_costs_its_head_and_its_branches() -> None:
    found = units(cifar_resnet(14), EXAMPLE)
    plain, head, branches, recomputed = (
        unit_costs(found, EXAMPLE, objective, momentum)
        for objective, momentum in (
            (None, None),
            (localgrad.dgl(10), None),
            (localgrad.dgl(10), localgrad.man()),
            (localgrad.dgl(10), localgrad.man(recompute=True)),
        )
    )
    for index in range(len(found) - 2):
        assert plain[index].end_activations == 0 < head[index].end_activations
        assert branches[index].end_activations > head[index].end_activations + plain[index + 1].activations
        assert recomputed[index].end_activations < branches[index].end_activations
        assert branches[index].end_flops == pytest.approx(
            2 * plain[index + 1].flops + (head[index + 1].end_flops if index + 2 < len(found) - 1 else 0), rel=0.35
        )
    assert head[-1].end_activations == float("inf")


@pytest.mark.parametrize("momentum", ["none", "man", "man recomputed", "manpp"])
@pytest.mark.parametrize("objective", ["dgl compact", "predsim", "infopro"])
def test_the_peak_on_meta_is_that_of_the_real_step(objective: str, momentum: str) -> None:
    cuts = ["layer1.0", "layer2.1"]
    arguments = {"cuts": cuts, "objective": OBJECTIVES[objective], "momentum": MOMENTA[momentum]}
    model = cifar_resnet(14, NUM_CLASSES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    real = step_peak(model, EXAMPLE, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert step_peak(model.to("meta"), EXAMPLE.to("meta"), **arguments) == pytest.approx(real, rel=0.01)


def test_what_a_step_leaves_is_counted_too() -> None:
    """One linear layer: weight, gradient and momentum of 100 x 5 each, the batch, and less than it in between."""
    model, example = nn.Sequential(nn.Linear(100, 5, bias=False)), torch.empty(4, 100)
    lasting = 4 * (2 * 100 * 5 + 4 * 100) + 8 * 4
    step = 4 * 100 * 5
    assert lasting + step <= step_peak(model, example, [], None, None) <= lasting + step + 4 * 4 * 5 * 4
