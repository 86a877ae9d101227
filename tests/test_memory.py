"""Memory: the counter is exact where the answer is known, costs add up, and the plan is that of the real step."""

import pytest
import torch
from cases import MOMENTA, NUM_CLASSES, OBJECTIVES
from torch import nn

import localgrad
from localgrad import local_step, split, units
from localgrad.memory import PeakMemory, measure_peak, step_peak, unit_costs
from localgrad.models import cifar_resnet

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
    arguments = {"objective": OBJECTIVES[objective], "momentum": MOMENTA[momentum]}
    predicted = step_peak(cifar_resnet(14, NUM_CLASSES).to("meta"), EXAMPLE.to("meta"), cuts, **arguments)

    model = cifar_resnet(14, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=cuts, **arguments)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1, momentum=0.9) for block in blocks]
    inputs, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    local_step(blocks, optimizers, inputs, targets)
    _, step = measure_peak(lambda: local_step(blocks, optimizers, inputs, targets))
    lasting = [*(t for b in blocks for t in (*b.parameters(), *b.buffers())), inputs, targets]
    lasting += [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    measured = step + sum(tensor.nbytes for tensor in {id(t): t for t in lasting if t is not None}.values())
    assert predicted == pytest.approx(measured, rel=0.05)
