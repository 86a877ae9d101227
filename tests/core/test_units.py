"""Units: composition is the model, parameters are the model's own, names are stable."""

import functools
import operator
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models as vision
from torch import nn

from localgrad import LocalGradError, units
from localgrad.core.composition import seeded
from localgrad.core.units import Unit
from localgrad.models import cifar_resnet

torch.set_num_threads(1)

WITH_64_PIXELS = [
    "resnet18",
    "densenet121",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "swin_t",
]
BOTTLENECKS: dict[str, dict[str, int]] = {
    "resnet": {},
    "resnext": {"groups": 32, "width_per_group": 4},
    "wide_resnet": {"width_per_group": 128},
}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24}
TIMM: dict[str, dict[str, Any]] = {  # whole architectures, where they allow it with fewer layers and smaller images
    "resnet50": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 3},
    "convnext_atto": {},
    "mixer_s16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": SWIN,
    "efficientnet_b0": {},
    "regnety_002": {},
}


def plain_chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)
    )


MODELS = {
    **{name: (functools.partial(vision.get_model, name, weights=None, num_classes=7), 64) for name in WITH_64_PIXELS},
    **{
        name: (functools.partial(vision.ResNet, vision.resnet.Bottleneck, [1, 2, 1, 1], 7, **options), 64)
        for name, options in BOTTLENECKS.items()
    },
    "vgg16_bn": (functools.partial(vision.vgg16_bn, num_classes=7, init_weights=False), 64),
    "vit": (functools.partial(vision.VisionTransformer, 32, 16, 3, 3, 48, 96), 32),
    "googlenet": (functools.partial(vision.googlenet, aux_logits=False, init_weights=False), 64),
    **{f"timm {name}": (functools.partial(timm.create_model, name, **options), 64) for name, options in TIMM.items()},
    "plain": (plain_chain, 16),
    "cifar_resnet8": (functools.partial(cifar_resnet, 8), 16),
    "cifar_resnet32": (functools.partial(cifar_resnet, 32), 16),
}


def composed(found: list[Unit], inputs: torch.Tensor) -> torch.Tensor:
    return functools.reduce(lambda features, unit: unit.module(features), found, inputs)


@pytest.mark.filterwarnings("ignore::localgrad.errors.DefaultsWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "vgg16_bn" else ()) for name in MODELS]
)
def test_the_units_are_the_model(name: str) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make()
    keys = list(model.state_dict())
    modes = [module.training for module in model.modules()]
    found = units(model, torch.empty(2, 3, size, size))
    assert list(model.state_dict()) == keys
    assert [module.training for module in model.modules()] == modes
    assert len({unit.name for unit in found}) == len(found) >= 3
    own = [id(parameter) for parameter in model.parameters()]
    assert sorted(own) == sorted(id(parameter) for unit in found for parameter in unit.module.parameters())

    inputs = torch.randn(2, 3, size, size)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    for training in (False, True):
        results, states = [], []
        for run in (model, functools.partial(composed, found)):
            for key, value in model.named_buffers():
                value.copy_(buffers[key])
            model.train(training)
            for unit in found:
                unit.module.train(training)
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(run(inputs.clone()))
            states.append([value.clone() for value in model.buffers()])
        assert torch.equal(*results)
        assert all(map(torch.equal, *states))
    features = inputs
    for unit in found:
        with torch.no_grad():
            features = unit.module.eval()(features)
        assert features.shape == unit.features


def test_the_names_of_a_cifar_resnet() -> None:
    found = units(cifar_resnet(32), torch.empty(2, 3, 32, 32))
    blocks = [f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(5)]
    assert [unit.name for unit in found] == ["conv1", *blocks, "fc"]
    assert [tuple(unit.features) for unit in found[4:7]] == [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16)]
    model = cifar_resnet(14)
    assert units(model, torch.empty(2, 3, 32, 32))[1].module is model.layer1[0]


def test_pooling_of_the_stem_stays_and_pooling_of_the_head_goes_with_the_head() -> None:
    found = units(vision.resnet18(), torch.empty(2, 3, 64, 64))
    assert found[0].features == (2, 64, 16, 16)
    assert found[-2].features == (2, 512, 2, 2)


def test_stages_are_cut_into_their_blocks() -> None:
    found = units(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), torch.empty(1, 3, 64, 64))
    assert "layers.2.blocks.5" in [unit.name for unit in found]


@pytest.mark.parametrize(
    ("make", "size", "dims"),
    [
        (lambda: vision.get_model("swin_t", weights=None), 96, {3}),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN), 64, {3}),
        (lambda: vision.get_model("convnext_tiny", weights=None), 96, {1}),
        (lambda: vision.get_model("mobilenet_v2", weights=None), 64, {1}),
    ],
)
def test_the_channel_dim_of_maps(make, size: int, dims: set[int]) -> None:
    found = units(make(), torch.empty(2, 3, size, size))
    assert {unit.channel_dim for unit in found if len(unit.features) == 4} == dims


def test_a_map_as_wide_as_its_channels_has_them_first_before_a_linear_layer() -> None:
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()
    for size, pool in ((8, 1), (16, 2)):
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(8 * pool**2, 5))
        found = units(model, torch.empty(2, 3, size, size))
        assert [(unit.name, unit.channel_dim) for unit in found] == [("0", 1), ("2", 1), ("6", 1)]
    assert {unit.channel_dim for unit in units(cifar_resnet(8), torch.empty(1, 3, 256, 256))} == {1}


def test_a_unit_that_writes_into_its_input_is_marked() -> None:
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*[_Leaf(block)]), nn.Flatten(), nn.Linear(64, 3))
    found = units(model, torch.empty(2, 3, 4, 4))
    assert [unit.writes_input for unit in found] == [False, True, False]


class _Leaf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.inner(features)


def test_auxiliary_outputs_are_left_out_with_a_warning() -> None:
    model = vision.googlenet(init_weights=False)
    with pytest.warns(UserWarning, match="returns 3 values while training"):
        found = units(model, torch.empty(2, 3, 64, 64))
    inputs = torch.randn(2, 3, 64, 64)
    model.eval()
    for unit in found:
        unit.module.eval()
    assert torch.equal(model(inputs), composed(found, inputs))


def test_a_module_that_reads_its_training_flag_is_right_in_both_modes() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.dropout(self.first(inputs), 0.5, self.training)
            return self.second(hidden)

    model = Noisy()
    found = units(model, torch.empty(2, 4))
    inputs = torch.randn(64, 4)
    for training in (True, False):
        model.train(training)
        for unit in found:
            unit.module.train(training)
        torch.manual_seed(0)
        expected = model(inputs)
        torch.manual_seed(0)
        assert torch.equal(composed(found, inputs), expected)
    assert not torch.equal(model.train()(inputs), model.eval()(inputs))


class Branching(nn.Module):
    """Its forward pass depends on a value: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.body(self.stem(inputs))
        if features.sum() > 1e9:
            features = features * 2
        return self.head(features)


def test_what_cannot_be_traced_takes_names() -> None:
    model, example = Branching(), torch.empty(2, 4)
    with pytest.raises(LocalGradError, match=r"Branching cannot be traced.*names="):
        units(model, example)
    found = units(model, example, names=["stem", "body", "head"])
    assert [unit.module for unit in found] == [model.stem, model.body, model.head]
    with pytest.raises(LocalGradError, match=r"stem, head, applied in order, do not give what Branching gives"):
        units(model, example, names=["stem", "head"])
    with pytest.raises(LocalGradError, match=r"names \['neck'\] are no submodules of Branching.*stem, body, head"):
        units(model, example, names=["stem", "neck"])
    with pytest.raises(LocalGradError, match=r"head, body do not run one after another.*\(2, 4\)"):
        units(model, example, names=["head", "body"])


def test_a_submodule_that_cannot_be_traced_stays_one_unit() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.head = nn.Linear(4, 4), Branching(), nn.Linear(3, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(self.stem(inputs)))

    assert [unit.name for unit in units(Model(), torch.empty(2, 4))] == ["stem", "middle", "head"]


def test_a_skip_over_two_layers_keeps_them_in_one_unit() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.a(inputs)
            return self.c(operator.add(self.b(hidden), hidden))

    found = units(Skip(), torch.empty(2, 4))
    assert [unit.name for unit in found] == ["a", "b", "c"]
    assert [unit.features for unit in found] == [(2, 4), (2, 4), (2, 3)]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 3)),
            torch.zeros(2, 4, dtype=torch.long),
            r"does not run on the example of shape \(2, 4\) and torch.int64",
        ),
        (nn.Sequential(nn.Linear(4, 3)), torch.empty(4), r"example is \(4,\)"),
        (nn.Sequential(nn.Linear(4, 3)), "images", r"example is a str"),
        (
            nn.Sequential(nn.Linear(4, 3)),
            (torch.empty(2, 4), None),
            r"example is a tuple: .* goes to localgrad.isolate",
        ),
        (nn.Sequential(nn.Linear(4, 3)), torch.empty(2, 5), r"does not run on the example of shape \(2, 5\)"),
    ],
)
def test_a_wrong_example_is_refused(model: nn.Module, example, message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        units(model, example)


def test_outputs_and_arguments_that_are_not_one_tensor_are_refused() -> None:
    class Returns(nn.Module):
        def __init__(self, pack) -> None:
            super().__init__()
            self.layer, self.pack = nn.Linear(4, 3), pack

        def forward(self, inputs: torch.Tensor):
            return self.pack(self.layer(inputs))

    with pytest.raises(LocalGradError, match=r"returns a dict: it must return one tensor"):
        units(Returns(lambda x: {"logits": x}), torch.empty(2, 4))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs) * mask

    with pytest.raises(LocalGradError, match="uses more than one argument"):
        units(Two(), torch.empty(2, 4))


def test_a_model_with_other_layers_in_training_is_refused() -> None:
    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(inputs) if self.training else self.b(inputs))

    with pytest.raises(LocalGradError, match="runs different modules in training and in evaluation"):
        units(Switching(), torch.empty(2, 4))


def test_tracing_leaves_no_warning_and_no_change_behind() -> None:
    model = vision.get_model("swin_t", weights=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units(model, torch.empty(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Stochastic(nn.Module):
    """A forward pass with an operation that only training has, `what(features)`."""

    def __init__(self, what) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.register_buffer("seen", torch.zeros(()))
        self.what = what

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.a(inputs)
        if self.training:
            features = self.what(self, features)
        return self.fc(torch.relu(self.b(features)).mean((2, 3)))


def test_an_operation_that_only_training_has_is_kept() -> None:
    model = Stochastic(lambda self, features: features + 0.1 * torch.randn_like(features))
    found = units(model, torch.empty(4, 3, 16, 16))
    assert [unit.name for unit in found] == ["a", "b", "fc"]
    for unit in found:
        unit.module.train()
    inputs = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    expected = model.train()(inputs)
    torch.manual_seed(0)
    assert torch.equal(composed(found, inputs), expected)


def _count(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    model.seen += 1
    return features


@pytest.mark.parametrize("what", [_count, lambda self, features: features + torch.randn(1)], ids=["counter", "noise"])
def test_what_tracing_would_freeze_is_refused_and_nothing_is_changed(what) -> None:
    model = Stochastic(what)
    with pytest.raises(LocalGradError, match=r"^Stochastic"):
        units(model, torch.empty(4, 3, 16, 16))
    assert model.seen == 0


class Unassigned(nn.Module):
    """An activation that changes its input in place, and whose result is not assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.a(inputs)
        self.relu(features)
        features = self.b(features)
        nn.functional.relu(features, inplace=True)
        return features.mean((2, 3))


def test_an_activation_in_place_counts_though_its_result_is_not_assigned() -> None:
    model, inputs = Unassigned().eval(), torch.randn(2, 3, 8, 8)
    found = units(model, inputs)
    assert [unit.name for unit in found] == ["a", "b"]
    assert torch.equal(composed(found, inputs), model(inputs))


def sequence_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Conv1d(6, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def test_the_channels_of_a_sequence_of_convolutions_come_first() -> None:
    found = units(sequence_model(), torch.empty(2, 4, 16))
    assert [(unit.name, tuple(unit.features), unit.channel_dim) for unit in found] == [
        ("0", (2, 6, 16), 1),
        ("3", (2, 16, 16), 1),  # as many positions as channels
        ("8", (2, 5), 1),
    ]


def test_wrappers_are_in_the_mode_of_the_model() -> None:
    model = Stochastic(lambda self, features: features + 0.1 * torch.randn_like(features))
    for training in (True, False):
        found = units(model.train(training), torch.empty(4, 3, 16, 16))
        assert [unit.module.training for unit in found] == [training] * len(found)


def test_named_units_need_no_data() -> None:
    model = cifar_resnet(8).to("meta")
    names = ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool"]
    wanted = "CifarResNet"
    with pytest.raises(LocalGradError, match=wanted):
        units(model, torch.empty(2, 3, 16, 16, device="meta"), names=names)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).to("meta")
    found = units(chain, torch.empty(2, 3, 8, 8, device="meta"), names=["0", "1", "2", "3"])
    assert [tuple(unit.features) for unit in found] == [(2, 4, 6, 6), (2, 4, 6, 6), (2, 144), (2, 5)]


# What tracing cannot see


class Root(nn.Module):
    """Three convolutions and a head, with something in between that is in no layer."""

    def __init__(self, between: Callable[["Root", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(3, 5)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self, x).mean((2, 3)))


def _first_without_gradient(model: Root, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = model.layers[0](x)
    return model.layers[2](model.layers[1](x))


def test_a_part_without_gradients_is_refused() -> None:
    model = Root(_first_without_gradient)
    with pytest.raises(LocalGradError, match=r"would train other parameters than it did \(layers.0.weight, layers.0.b"):
        units(model, torch.empty(2, 3, 8, 8))
    assert model.training and model.layers[0].weight.grad is None


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("names", [None, ["0", "1", "2", "3", "4", "5"]])
def test_examples_of_any_number_of_samples(number: int, names: list[str] | None) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5)
    )
    found = units(model, torch.empty(number, 3, 8, 8), names)
    assert found[-1].features == (number, 5)
    assert model[3].num_batches_tracked == 0


def _sometimes(model: Root, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        if not (model.training and random.random() < 0.001):
            x = layer(x)
    return x


def _sometimes_by_torch(model: Root, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        if not (model.training and bool(torch.rand([]) < 0.001)):
            x = layer(x)
    return x


@pytest.mark.parametrize("between", [_sometimes, _sometimes_by_torch])
def test_a_branch_on_chance_is_refused_whatever_came_out(between: Any) -> None:
    with pytest.raises(LocalGradError, match="does not compute what it did in training: its forward pass draws random"):
        units(Root(between), torch.empty(2, 3, 8, 8))


def test_named_units_are_compared_in_training_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(48, 5))

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(nn.functional.dropout(self.a(x), 0.5, self.training)))

    with pytest.raises(LocalGradError, match=r"^Dropped"):
        units(Dropped(), torch.empty(2, 3, 4, 4), names=["a", "b", "c"])


def test_the_generator_of_metal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: calls.append("kept") or "state")
    monkeypatch.setattr(torch.mps, "set_rng_state", calls.append)
    with pytest.raises(KeyError), seeded(torch.device("mps")):
        raise KeyError
    assert calls == ["kept", "state"]


def test_every_generator_is_left_as_it_was() -> None:
    model = cifar_resnet(8)
    states = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    units(model, torch.empty(2, 3, 16, 16))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == [random.getstate(), repr(np.random.get_state())]


class Pair(nn.Module):
    """A layer that returns what it gives in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.conv(x), None


def test_layers_that_return_tuples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([Pair() for _ in range(3)]), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)[0]
            return self.head(x.mean((2, 3)))

    model = Model()
    found = units(model, torch.empty(2, 3, 8, 8))
    assert [unit.name for unit in found] == ["layers.0", "layers.1", "layers.2", "head"]
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(composed(found, inputs), model(inputs))


def test_channels_of_volumes_and_before_a_convolution_of_sequences_come_first() -> None:
    volumes = nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(6, 7, 1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(7, 5),
    )
    found = units(volumes, torch.empty(2, 3, 4, 6, 8))
    assert [unit.channel_dim for unit in found if len(unit.features) == 5] == [1] * (len(found) - 1)
    mixed = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Conv1d(6, 8, 1), nn.Flatten(), nn.Linear(96, 5))
    assert [unit.channel_dim for unit in units(mixed, torch.empty(2, 6, 10))][:2] == [1, 1]


def test_a_forward_that_was_replaced_on_the_model_is_named() -> None:
    model = plain_chain()
    own = model.forward
    model.forward = lambda inputs: own(inputs).half().float()  # as Accelerate's prepare does
    with pytest.raises(LocalGradError, match=r"Sequential.forward was replaced .* split the model first"):
        units(model, torch.randn(2, 3, 16, 16))
