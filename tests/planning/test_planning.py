"""The planner: added peaks are those of the real step, and its cuts are the best there are."""

import copy
import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

import localgrad
from helpers.cases import MODELS, MOMENTA, NUM_CLASSES, OBJECTIVES
from localgrad import LocalGradError, plan, units
from localgrad.core.costs import unit_costs
from localgrad.core.units import Unit
from localgrad.models import cifar_resnet
from localgrad.planning.measure import PeakMemory
from localgrad.planning.peaks import EndProfile, Pass, Profile, UnitProfile
from localgrad.planning.profile import profile
from localgrad.planning.simulation import Simulation
from localgrad.planning.step_peak import step_peak

EXAMPLE = torch.zeros(16, 3, 16, 16)
REAL = torch.zeros(4, 3, 32, 32)


def _vgg() -> nn.Module:
    layers = torchvision.models.vgg.make_layers([8, "M", 16, 16, "M", 32, "M"], batch_norm=True)
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(32 * 16, NUM_CLASSES))


def _densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, bn_size=2, num_classes=NUM_CLASSES)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=NUM_CLASSES)


def _convnext() -> nn.Module:
    stages = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return torchvision.models.ConvNeXt(stages, num_classes=NUM_CLASSES)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "cifar resnet": lambda: cifar_resnet(8, NUM_CLASSES),
    "mobilenet": lambda: torchvision.models.MobileNetV2(NUM_CLASSES, 0.1, [[1, 16, 1, 1], [6, 24, 2, 2]]),
    "densenet": _densenet,
    "vgg": _vgg,
    "vit": _vit,
    "convnext": _convnext,
}


OPTIONS = (
    {},
    {"precision": "bf16-mixed"},
    {"recompute": True},
    {"recompute": True, "precision": "bf16-mixed", "step_each_block": True},
)


@cache
def _family(name: str) -> tuple[nn.Module, list[Unit]]:
    model = FAMILIES[name]()
    return model, units(model, REAL)


@cache
def _known(name: str) -> dict[Any, Any]:
    """Profiles of a family's parts, which the tests share."""
    return {}


@pytest.mark.parametrize("momentum", ["none", "manpp"])
@pytest.mark.parametrize("model_name", MODELS)
def test_the_peak_of_any_cuts_is_that_of_the_real_step(model_name: str, momentum: str) -> None:
    make, cuts = MODELS[model_name]
    model = make()
    found = units(model, EXAMPLE)
    names, known = [unit.name for unit in found], {}
    objective_, momentum_ = OBJECTIVES["classifier"], MOMENTA[momentum]
    for recompute in (False, True):
        profiled = profile(found, EXAMPLE, objective_, momentum_, recompute=recompute, known=known)
        for chosen in ([], cuts[:1], cuts):
            measured = step_peak(model, EXAMPLE, chosen, objective_, momentum_, recompute=recompute)
            predicted = profiled.peak([names.index(cut) for cut in chosen])
            assert predicted == pytest.approx(measured, rel=0.005), chosen


@pytest.mark.parametrize("momentum", ["none", "man"])
@pytest.mark.parametrize("objective", ["predsim", "dgl compact", "infopro"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planned_peak_is_that_of_the_real_step(family: str, objective: str, momentum: str) -> None:
    """Each family in float32 and under bf16 autocast, checkpointed and not: counted while it really runs."""
    model, found = _family(family)
    arguments = OBJECTIVES[objective], MOMENTA[momentum]
    number = list(FAMILIES).index(family) + ["predsim", "dgl compact", "infopro"].index(objective) + (momentum == "man")
    options: dict[str, Any] = OPTIONS[number % len(OPTIONS)]
    profiled = profile(found, REAL, *arguments, **options, known=_known(family))
    cuts = profiled.best_cuts(3)
    measured = step_peak(model, REAL, [found[cut].name for cut in cuts], *arguments, **options)
    assert profiled.peak(cuts) == pytest.approx(measured, rel=0.01)


@pytest.mark.filterwarnings("ignore:block . .* trains nothing")
@pytest.mark.parametrize("options", OPTIONS[:3], ids=["float32", "bf16", "recompute"])
@pytest.mark.parametrize(
    "frozen", ["first units", "all but norms and head", "all but the last unit", "every other unit"]
)
def test_frozen_layers_keep_what_they_really_keep(frozen: str, options: dict[str, Any]) -> None:
    momentum = localgrad.man(bias=False) if "unit" in frozen else localgrad.manpp()
    model = cifar_resnet(14, NUM_CLASSES)
    trained: dict[str, Callable[[str], bool]] = {
        "first units": lambda name: name.startswith(("layer2.1", "layer3", "fc")),
        "all but norms and head": lambda name: ".bn" in name or "fc" in name,
        "all but the last unit": lambda name: name.startswith("fc"),
        "every other unit": lambda name: name.startswith(("layer1.0", "layer2.0", "layer3.0", "fc")),
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[frozen](name))
    found = units(model, REAL)
    arguments = localgrad.dgl(NUM_CLASSES), momentum
    profiled = profile(found, REAL, *arguments, **options)
    for cuts in ([], [1], [2], [4], [1, 3], [0, 1, 2, 3, 4, 5]):
        if profiled.peak(cuts) == float("inf"):  # nothing for the momentum to follow
            continue
        measured = step_peak(model, REAL, [found[cut].name for cut in cuts], *arguments, **options)
        assert profiled.peak(cuts) == pytest.approx(measured, rel=0.01), cuts


@pytest.mark.filterwarnings("ignore:block . .* trains nothing")
@pytest.mark.parametrize("frozen", [(), (0, 1), (0, 1, 3, 4)])
def test_units_whose_output_is_their_input(frozen: tuple[int, ...]) -> None:
    """A map that is changed in place, or looked at otherwise, is there once."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(8 * 16 * 16, NUM_CLASSES)),
    )
    for index in frozen:
        model[index].requires_grad_(False)
    names = [name for name, _ in model.named_children()]
    found = units(model, EXAMPLE, names)
    arguments = localgrad.classifier(NUM_CLASSES), None
    profiled = profile(found, EXAMPLE, *arguments)
    for cuts in ([], [2], [3], [2, 4], [5]):
        measured = step_peak(model, EXAMPLE, [names[cut] for cut in cuts], *arguments, names)
        assert profiled.peak(cuts) == pytest.approx(measured, rel=0.01), cuts


@pytest.mark.parametrize("family", ["cifar resnet", "convnext", "vgg"])
def test_the_autocast_that_is_meant_for_cuda_keeps_what_cudas_does(family: str) -> None:
    """A fake tensor runs forward on CUDA where there is none; what its graph keeps is compared."""
    model, _ = _family(family)
    kept = []
    for device, rules in (("cuda", "none"), ("cpu", "cuda"), ("cpu", "cpu")):
        simulation = Simulation("bf16-mixed", rules)
        simulation.device = torch.device(device)
        module = copy.deepcopy(model).train()
        with simulation.running(), PeakMemory() as counter, autocast_on(device):
            module = simulation.to_fake(module)
            before = counter.current
            output = module(torch.empty(2, 3, 32, 32, device=device))
            kept.append(counter.current - before)
        del output
    assert kept[1] == pytest.approx(kept[0], rel=0.01)
    assert (kept[2] < 0.97 * kept[0]) == (family == "convnext")


@contextmanager
def autocast_on(device: str) -> Iterator[None]:
    """`torch.autocast` without its check that the device is there."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(device, False)


def test_all_candidates_come_in_the_right_order() -> None:
    model = cifar_resnet(8)
    found = units(model, EXAMPLE)
    objective, momentum = localgrad.dgl(10), localgrad.man()
    profiled = profile(found, EXAMPLE, objective, momentum)
    choices = [cuts for count in range(len(found)) for cuts in itertools.combinations(range(len(found) - 1), count)]
    predicted = [profiled.peak(cuts) for cuts in choices]
    measured = [step_peak(model, EXAMPLE, [found[c].name for c in cuts], objective, momentum) for cuts in choices]
    for (p, s), (q, t) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        assert (p < q) == (s < t) or abs(s - t) < 0.001 * s


def _any_pass(draw: random.Random) -> Pass:
    return Pass(
        kept=draw.randint(0, 50),
        keeps_input=draw.random() < 0.5,
        keeps_output=draw.random() < 0.5,
        casts=draw.randint(0, 9),
        forward=draw.randint(0, 60),
        backward=draw.randint(20, 90),
        backward_last=draw.randint(20, 90),
    )


def test_the_best_cuts_are_those_that_brute_force_finds() -> None:
    draw = random.Random(0)
    for _ in range(60):
        length = draw.randint(2, 7)
        chain = tuple(
            UnitProfile(
                lasting=draw.randint(0, 30),
                gradients=max(0, draw.randint(-10, 30)),  # some are frozen
                output=draw.randint(1, 20),
                inner=_any_pass(draw),
                first=_any_pass(draw),
            )
            for _ in range(length)
        )
        ends = [tuple(EndProfile(*(draw.randint(0, 30) for _ in range(6))) for _ in range(length)) for _ in range(3)]
        profiled = Profile(chain, (ends[0], ends[1], ends[2]), batch=5, step_each_block=draw.random() < 0.5)
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
    ways = [(row.num_blocks, row.parts, row.recompute) for row in rows]
    assert ways == list(itertools.product([1, 2, 4], [1, 4], [False, True]))
    rows = [row for row in rows if row.parts == 1]
    assert [len(row.cuts) for row in rows] == [0, 0, 1, 1, 3, 3]
    assert rows[0].peak > rows[2].peak > rows[4].peak
    assert rows[0].peak > 2 * rows[1].peak
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    budget = (rows[2].peak + rows[4].peak) // 2
    small = plan(model, example, objective=localgrad.dgl(10), num_blocks=[1, 2, 4], parts=[1], budget=budget)
    assert [row.fits for row in small] == [row.peak <= budget for row in rows]
    assert not small[2].fits
    assert small[4].fits


def test_powers_of_two_are_tried_up_to_the_most_that_there_can_be() -> None:
    rows = plan(cifar_resnet(8), EXAMPLE, objective=localgrad.classifier(10), parts=[1])
    assert [row.num_blocks for row in rows if not row.recompute] == [1, 2, 4, 5]
    model, infopro = cifar_resnet(8, NUM_CLASSES), OBJECTIVES["infopro"]
    rows = plan(model, EXAMPLE, objective=infopro, momentum=localgrad.man(), parts=[1])
    assert rows[-1].num_blocks == 4  # after the last residual unit there is only `fc` to copy, which gives a vector


def test_the_smallest_number_of_blocks_that_fits_is_among_the_rows() -> None:
    model, example = cifar_resnet(20), torch.empty(64, 3, 32, 32, device="meta")
    dgl = localgrad.dgl(10)
    every = plan(model, example, objective=dgl, num_blocks=range(1, 6), parts=[1])
    budget = next(row.peak for row in every if row.num_blocks == 3 and not row.recompute)
    rows = plan(model, example, objective=dgl, budget=budget, parts=[1])
    assert min(row.num_blocks for row in rows if row.fits and not row.recompute) == 3
    assert min(row.num_blocks for row in rows if row.fits) == min(row.num_blocks for row in every if row.peak <= budget)


def test_what_is_impossible_is_refused_with_what_would_fit() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    dgl, example = localgrad.dgl(NUM_CLASSES), EXAMPLE[:4]  # too few for rows in parts, which would double the time
    with pytest.raises(LocalGradError, match="budget is 0: give a whole number of bytes more than 0"):
        plan(model, example, objective=dgl, budget=0)
    with pytest.raises(LocalGradError, match=r"budget is 0.01 MiB.*the unit 'layer1.0' alone needs.*") as refused:
        plan(model, example, objective=dgl, budget=1000)
    enough = re.search(r"give (\d+\.\d\d) MiB or a smaller batch", str(refused.value))
    assert enough
    assert any(row.fits for row in plan(model, example, objective=dgl, budget=round(float(enough[1]) * 2**20)))
    with pytest.raises(LocalGradError, match="num_blocks is 9"):
        plan(model, example, objective=dgl, num_blocks=[2, 9])
    message = (
        r"num_blocks is 5: momentum and objective cannot sit after layer3\.0, which leaves 1 to 4 blocks; .* \(infopro "
    )
    with pytest.raises(LocalGradError, match=message):
        plan(model, example, objective=OBJECTIVES["infopro"], momentum=localgrad.man(), num_blocks=[5])
    with pytest.raises(LocalGradError, match="precision is 'bf16': it is one of '32-true', 'bf16-mixed'"):
        plan(model, example, objective=dgl, precision="bf16")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LocalGradError, match=r"_Branching .*without data"):
        plan(_Branching(), torch.empty(2, 4), objective=localgrad.classifier(3))
    for precision in ("32-true", "bf16-mixed"):
        with pytest.raises(LocalGradError, match="the objective after 'conv1' cannot be profiled without data"):
            plan(model, example, objective=lambda site: _ReadsValues(), precision=precision)


class _ReadsValues(nn.Module):
    def forward(self, features: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return features.mean() * targets.max().item()


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else self.layer(-inputs)


@pytest.mark.parametrize("momentum", [None, localgrad.man()], ids=["plain", "man"])
def test_heads_that_differ_from_block_to_block_are_planned_where_they_sit(momentum: Any) -> None:
    model = cifar_resnet(14, NUM_CLASSES).to("meta")
    example = torch.empty(4, 3, 32, 32, device="meta")
    auglocal = localgrad.auglocal(NUM_CLASSES, depth=4, pyramid=0.9)
    for row in plan(model, example, objective=auglocal, momentum=momentum, num_blocks=[3, 5], parts=[1]):
        real = step_peak(model, example, row.cuts, auglocal, momentum, recompute=row.recompute)
        assert row.peak == pytest.approx(real, abs=64)


class LowRank(nn.Module):
    """A frozen linear layer beside a trained product of two narrow ones, as LoRA adds it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.base(features) + self.up(self.down(features)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("momentum", [None, localgrad.man(), localgrad.man(bias=False)], ids=["plain", "man", "ema"])
def test_frozen_weights_of_low_rank_adapters_are_there_once_and_take_no_state(momentum: Any, recompute: bool) -> None:
    model = nn.Sequential(*(LowRank(32, 2) for _ in range(5)), nn.Linear(32, NUM_CLASSES))
    example = torch.zeros(3, 32)
    objective = localgrad.classifier(NUM_CLASSES)
    found = units(model, example)
    profiled = profile(found, example, objective, momentum, recompute=recompute)
    trained, frozen = 2 * 2 * 32, 33 * 32
    assert [unit.lasting for unit in profiled.units[:-1]] == [4 * (frozen + 2 * trained)] * 5  # with the optimizer's
    assert [unit.gradients for unit in profiled.units[:-1]] == [4 * trained] * 5
    head = 33 * NUM_CLASSES
    copies = {None: 0, "man": 3 * trained, "ema": trained}[None if momentum is None else _kind(momentum, found)]
    expected = 4 * (copies + 2 * head)
    assert [end.lasting for end in profiled.ends[1][:4]] == [expected] * 4
    costs = unit_costs(found, example, objective, momentum)
    branches = {0: 0, 3 * trained: 2 * trained, trained: trained}[copies]
    assert [cost.end_parameters for cost in costs[:4]] == [branches + head] * 4
    measured = step_peak(model, example, ["1", "3"], objective, momentum, recompute=recompute)
    assert profiled.peak([1, 3]) == pytest.approx(measured, abs=64)


def _kind(momentum: Any, found: list[Unit]) -> str:
    return "ema" if momentum(found[1:2]).bias is None else "man"
