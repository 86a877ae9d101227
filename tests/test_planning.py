"""The planner: additive peaks are those of the simulated step, and its cuts are the best there are."""

import itertools
import random

import pytest
import torch
from cases import MODELS, MOMENTA, NUM_CLASSES, OBJECTIVES
from torch import nn

import localgrad
from localgrad import LocalGradError, plan, units
from localgrad.memory import step_peak
from localgrad.models import cifar_resnet
from localgrad.profiles import EndProfile, Profile, UnitProfile, profile

EXAMPLE = torch.empty(16, 3, 16, 16, device="meta")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("momentum", ["none", "man", "man recomputed"])
@pytest.mark.parametrize("objective", ["classifier", "dgl compact", "infopro"])
@pytest.mark.parametrize("model_name", MODELS)
def test_the_peak_is_that_of_the_step(model_name: str, objective: str, momentum: str, recompute: bool) -> None:
    make, cuts = MODELS[model_name]
    model = make().to("meta")
    found = units(model, EXAMPLE)
    names = [unit.name for unit in found]
    objective_, momentum_ = OBJECTIVES[objective], MOMENTA[momentum]
    profiled = profile(found, EXAMPLE, objective_, momentum_, recompute=recompute)
    for chosen in ([], cuts[:1], cuts):
        simulated = step_peak(model, EXAMPLE, chosen, objective_, momentum_, recompute=recompute)
        predicted = profiled.peak([names.index(cut) for cut in chosen])
        assert predicted == pytest.approx(simulated, rel=0.05), chosen


def test_all_candidates_come_in_the_right_order() -> None:
    model = cifar_resnet(8).to("meta")
    found = units(model, EXAMPLE)
    objective, momentum = localgrad.dgl(10), localgrad.man()
    profiled = profile(found, EXAMPLE, objective, momentum)
    choices = [cuts for count in range(len(found)) for cuts in itertools.combinations(range(len(found) - 1), count)]
    predicted = [profiled.peak(cuts) for cuts in choices]
    simulated = [step_peak(model, EXAMPLE, [found[c].name for c in cuts], objective, momentum) for cuts in choices]
    for (p, s), (q, t) in itertools.combinations(zip(predicted, simulated, strict=True), 2):
        assert (p < q) == (s < t) or abs(s - t) < 0.02 * s


def test_the_best_cuts_are_those_that_brute_force_finds() -> None:
    draw = random.Random(0)
    for _ in range(60):
        length = draw.randint(2, 7)
        chain = tuple(
            UnitProfile(
                lasting=draw.randint(0, 30),
                gradients=draw.randint(0, 30),
                output=draw.randint(1, 20),
                kept=draw.randint(0, 50),
                keeps_input=draw.random() < 0.5,
                keeps_output=draw.random() < 0.5,
                casts=draw.randint(0, 9),
                forward=draw.randint(0, 60),
                backward=draw.randint(20, 90),
                backward_first=draw.randint(20, 90),
                backward_last=draw.randint(20, 90),
                backward_alone=draw.randint(20, 90),
            )
            for _ in range(length)
        )
        ends = [tuple(EndProfile(*(draw.randint(0, 30) for _ in range(4))) for _ in range(length)) for _ in range(3)]
        profiled = Profile(chain, (ends[0], ends[1], ends[2]), batch=5)
        for count in range(1, length + 1):
            found = profiled.best_cuts(count)
            assert len(found) == count - 1
            best = min(profiled.peak(cuts) for cuts in itertools.combinations(range(length - 1), count - 1))
            assert profiled.peak(found) == best


def test_more_blocks_take_less_memory_and_the_model_stays_as_it_is() -> None:
    model = cifar_resnet(14)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = torch.empty(64, 3, 32, 32, device="meta")
    rows = plan(model, example, objective=localgrad.dgl(10), num_blocks=[1, 2, 4])
    assert [(row.num_blocks, row.recompute) for row in rows] == list(itertools.product([1, 2, 4], [False, True]))
    assert [len(row.cuts) for row in rows] == [0, 0, 1, 1, 3, 3]
    assert rows[0].peak > rows[2].peak > rows[4].peak
    assert rows[0].peak > 2 * rows[1].peak
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    budget = (rows[2].peak + rows[4].peak) // 2
    small = plan(model, example, objective=localgrad.dgl(10), num_blocks=[1, 2, 4], budget=budget)
    assert [row.fits for row in small] == [row.peak <= budget for row in rows]
    assert not small[2].fits
    assert small[4].fits


def test_powers_of_two_are_tried_up_to_the_most_that_there_can_be() -> None:
    rows = plan(cifar_resnet(8), EXAMPLE, objective=localgrad.classifier(10))
    assert [row.num_blocks for row in rows if not row.recompute] == [1, 2, 4, 5]
    rows = plan(cifar_resnet(8, NUM_CLASSES), EXAMPLE, objective=OBJECTIVES["infopro"], momentum=localgrad.man())
    assert rows[-1].num_blocks == 4  # after the last residual unit there is only `fc` to copy, which gives a vector


def test_what_is_impossible_is_refused_with_what_would_fit() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    dgl = localgrad.dgl(NUM_CLASSES)
    with pytest.raises(LocalGradError, match="budget is 0 bytes: give more than 0"):
        plan(model, EXAMPLE, objective=dgl, budget=0)
    with pytest.raises(LocalGradError, match=r"budget is 0.0 MiB.*the unit 'layer1.0' alone needs.*a smaller batch"):
        plan(model, EXAMPLE, objective=dgl, budget=1000)
    with pytest.raises(LocalGradError, match="num_blocks is 9: the model has 5 units"):
        plan(model, EXAMPLE, objective=dgl, num_blocks=[9])
    with pytest.raises(LocalGradError, match="num_blocks is 5: the objective cannot sit after 4 of the 5 units"):
        plan(model, EXAMPLE, objective=OBJECTIVES["infopro"], momentum=localgrad.man(), num_blocks=[5])
    with pytest.raises(LocalGradError, match="cannot be traced"):
        plan(_Branching(), torch.empty(2, 4), objective=localgrad.classifier(3))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else self.layer(-inputs)
