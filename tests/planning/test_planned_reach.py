"""Plans of losses that reach further: peaks of real steps, with cuts nearly as good as brute force finds."""

import itertools
from typing import Any

import pytest
import torch

import localgrad
from localgrad import LocalGradError, isolate, man, plan, units
from localgrad.models import cifar_resnet
from localgrad.planning.isolated import plan_isolated
from localgrad.planning.measure import measure_peak
from localgrad.planning.step_peak import step_cost

EXAMPLE = torch.empty(8, 3, 16, 16, device="meta")
DGL = localgrad.dgl(10)


@pytest.mark.parametrize("momentum", [None, man()], ids=["plain", "man"])
def test_a_plan_with_reach_is_the_step_s(momentum: Any) -> None:
    model = cifar_resnet(14).to("meta")
    near = {row.num_blocks: row for row in plan(model, EXAMPLE, objective=DGL, momentum=momentum, num_blocks=[1, 3])}
    rows = plan(model, EXAMPLE, objective=DGL, momentum=momentum, num_blocks=[1, 3], reach=2)
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        options = {"recompute": row.recompute, "parts": row.parts, "reach": 2}
        peak, operations = step_cost(model, EXAMPLE, row.cuts, DGL, momentum, **options)
        assert row.peak == pytest.approx(peak, rel=1e-3)
        if row.num_blocks == 3:
            assert row.peak > near[3].peak or row.recompute or row.parts > 1
            whole = step_cost(model, EXAMPLE, [], None, None)[1]
            assert row.operations == pytest.approx(operations / whole)


@pytest.mark.parametrize("reach", [2, 3])
def test_cuts_for_a_reach_are_nearly_the_best(reach: int) -> None:
    model = cifar_resnet(8).to("meta")
    names = [unit.name for unit in units(model, EXAMPLE)][:-1]
    peaks = [step_cost(model, EXAMPLE, cuts, DGL, None, reach=reach)[0] for cuts in itertools.combinations(names, 2)]
    found = plan(model, EXAMPLE, objective=DGL, num_blocks=[3], parts=[1], reach=reach)[0]
    assert found.peak <= 1.03 * min(peaks)


def test_a_reach_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(LocalGradError, match="reach is 0"):
        plan(cifar_resnet(8), EXAMPLE, objective=DGL, reach=0)
    with pytest.raises(LocalGradError, match=r"reach is 2 with precision 'bf16-mixed'.*give precision='32-true'"):
        plan(cifar_resnet(8), EXAMPLE, objective=DGL, reach=2, precision="bf16-mixed")


def test_the_plan_of_an_isolated_model_with_reach() -> None:
    model = cifar_resnet(8).to("meta")
    given = {"objective": DGL, "num_blocks": [3], "targets": torch.zeros(8, dtype=torch.long)}
    one, two = (plan_isolated(model, EXAMPLE, reach=reach, **given)[0] for reach in (1, 2))
    assert one.cuts == two.cuts and one.peak < two.peak and one.operations < two.operations
    torch.manual_seed(0)
    real = cifar_resnet(8)
    isolation = isolate(real, list(two.cuts), objective=DGL, example=torch.zeros(2, 3, 16, 16), reach=2)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.01, 0.9)

    def step() -> None:
        isolation.targets = torch.zeros(8, dtype=torch.long)
        real(torch.zeros(8, 3, 16, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    _, peak = measure_peak(step)
    kept = [*real.parameters(), *real.buffers(), *isolation.parameters(), *isolation.buffers()]
    kept += [state["momentum_buffer"] for state in optimizer.state.values()]
    lasting = sum(tensor.nbytes for tensor in kept)
    assert two.peak == pytest.approx(peak + lasting, rel=0.03)
