"""Splitting: isolation of gradients, ownership of parameters, and what is refused."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import localgrad
from helpers.cases import IMAGE, MODELS, MOMENTA, NUM_CLASSES, OBJECTIVES, batch
from localgrad import LocalGradError, Site, local_step, split
from localgrad.core.recompute import recomputed
from localgrad.errors import LocalGradWarning
from localgrad.models import cifar_resnet
from localgrad.planning.step_peak import step_peak

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
DGL = localgrad.dgl(NUM_CLASSES)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_name", MODELS)
def test_a_loss_reaches_its_own_block_and_nothing_else(model_name: str, objective: str, momentum: str) -> None:
    torch.manual_seed(0)
    make, cuts = MODELS[model_name]
    model = make()
    keys = list(model.state_dict())
    blocks = split(model, EXAMPLE, cuts=cuts, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum])
    inputs, targets = batch()
    features = inputs
    for index, block in enumerate(blocks):
        for other in blocks:
            other.zero_grad()
        features, loss = block(features.detach(), targets, inputs)
        loss.backward()
        assert loss.isfinite()
        assert loss.dtype == torch.float32
        for other_index, other in enumerate(blocks):
            if other_index != index:
                assert all(parameter.grad is None for parameter in other.parameters())
        assert all(parameter.grad is not None for parameter in block.body.parameters())
        ema = None if block.momentum is None else block.momentum.ema
        if ema is not None and "fused" not in momentum:
            assert all(parameter.grad is None and not parameter.requires_grad for parameter in ema.parameters())
            assert not {*map(id, ema.parameters())} & {*map(id, block.trainable_parameters())}
        trained = [p for p in block.trainable_parameters() if p.grad is not None]
        assert len(trained) == len(block.trainable_parameters())
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("model_name", MODELS)
def test_the_ema_branch_passes_a_gradient_into_the_features(model_name: str) -> None:
    make, cuts = MODELS[model_name]
    blocks = split(make(), EXAMPLE, cuts=cuts, objective=DGL, momentum=localgrad.man(bias=False))
    inputs, targets = batch()
    features = blocks[0].body(inputs).detach().requires_grad_()
    loss = blocks[0].objective(blocks[0].momentum(features), targets, inputs)
    loss.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_the_bodies_are_the_models_modules() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=["layer1.0"], objective=DGL, momentum=localgrad.man())
    bodies = [parameter for block in blocks for parameter in block.body.parameters()]
    assert [id(p) for p in bodies] == [id(p) for p in model.parameters()]
    assert blocks[0].names == ("conv1", "layer1.0")
    assert blocks[1].names == ("layer2.0", "layer3.0", "fc")
    assert blocks[1].objective is None
    assert blocks[1].momentum is None
    inputs, targets = batch()
    features, _ = blocks[0](inputs, targets, inputs)
    logits, loss = blocks[1](features, targets, inputs)
    assert torch.equal(loss, nn.functional.cross_entropy(logits, targets))


def test_a_submodule_stands_for_its_last_unit() -> None:
    blocks = split(cifar_resnet(20), EXAMPLE, cuts=["layer1", "layer2"], objective=localgrad.dgl(10))
    assert [block.names[-1] for block in blocks] == ["layer1.2", "layer2.2", "fc"]


@pytest.mark.parametrize("balance", ["memory", "compute", "count"])
def test_a_number_of_blocks_is_met(balance: str) -> None:
    for count in (1, 2, 3, 6):
        blocks = split(cifar_resnet(14), EXAMPLE, num_blocks=count, balance=balance, objective=localgrad.dgl(10))
        assert len(blocks) == count
        assert blocks[0].names[0] == "conv1"


def test_memory_and_compute_balance_differently() -> None:
    """Early units of a ResNet keep more bytes; all units of a stage cost the same operations."""
    by_memory = split(cifar_resnet(32), EXAMPLE, num_blocks=2, balance="memory", objective=localgrad.classifier(10))
    by_compute = split(cifar_resnet(32), EXAMPLE, num_blocks=2, balance="compute", objective=localgrad.classifier(10))
    assert len(by_memory[0].names) < len(by_compute[0].names)


def test_auxiliary_networks_follow_dtype_and_mode_of_the_model() -> None:
    model = cifar_resnet(8).double().eval()
    blocks = split(model, EXAMPLE.double(), cuts=["layer1"], objective=localgrad.dgl(10), momentum=localgrad.man())
    assert {parameter.dtype for block in blocks for parameter in block.parameters()} == {torch.float64}
    assert not any(module.training for block in blocks for module in block.modules())


def test_the_auxiliary_state_is_what_the_model_has_not() -> None:
    def make() -> tuple[nn.Module, list[localgrad.Block]]:
        model = cifar_resnet(8)
        return model, split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(10), momentum=localgrad.man())

    (_, first), (_, second) = make(), make()
    state = copy.deepcopy(first[0].auxiliary_state_dict())
    assert {key.split(".")[0] for key in state} == {"momentum", "objective"}
    assert first[1].auxiliary_state_dict() == {}
    second[0].load_auxiliary_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in second[0].auxiliary_state_dict().items())
    state.pop("objective.classifier.1.weight", None)
    with pytest.raises(LocalGradError, match=r"auxiliary state of the block conv1\.\.layer1\.0 does not fit"):
        second[0].load_auxiliary_state_dict({key: value[:1] for key, value in state.items() if value.ndim})


def test_local_heads_give_class_scores_where_they_have_any() -> None:
    contrast = OBJECTIVES["infopro contrast"]
    for objective, has_scores in ((DGL, True), (contrast, False)):
        blocks = split(cifar_resnet(8, NUM_CLASSES), EXAMPLE, cuts=["layer1"], objective=objective)
        features = blocks[0].body(batch()[0])
        with pytest.raises(LocalGradError, match=r"training mode.*block\.eval\(\)"):
            blocks[0].local_logits(features)
        scores = blocks[0].eval().local_logits(features)
        assert (scores is not None) == has_scores
        assert scores is None or scores.shape == (6, NUM_CLASSES)
        logits = blocks[1].body(features)
        assert blocks[1].local_logits(logits) is logits


def test_an_objective_of_ones_own_is_a_function_of_the_site() -> None:
    sites: list[Site] = []

    class MeanSquare(nn.Module):
        def forward(self, features: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            return features.square().mean()

    def mean_square(site: Site) -> nn.Module:
        sites.append(site)
        return MeanSquare()

    blocks = split(cifar_resnet(8), EXAMPLE, cuts=["conv1", "layer2"], objective=mean_square, momentum=localgrad.man())
    assert [(site.index, site.num_blocks, tuple(site.features), site.channel_dim) for site in sites] == [
        (0, 3, (2, 16, IMAGE, IMAGE), 1),
        (1, 3, (2, 64, IMAGE // 4, IMAGE // 4), 1),
    ]
    assert sites[0].inputs == EXAMPLE.shape
    assert blocks[0].local_logits(blocks[0].body(batch()[0])) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"cuts is None and num_blocks is None: give one"),
        ({"cuts": ["layer1"], "num_blocks": 2}, r"cuts is \['layer1'\] and num_blocks is 2: give one"),
        ({"cuts": "layer1"}, "cuts is 'layer1'"),
        ({"cuts": ["layer9.0"]}, r"cut 'layer9.0' is not a unit: the units are conv1, layer1.0"),
        ({"cuts": ["layer2", "layer1"]}, r"cuts are layer2, layer1: .*in the model's order, layer1.0, layer2.0"),
        ({"cuts": ["layer1", "layer1"]}, r"must be different units"),
        ({"cuts": ["fc"]}, r"cut 'fc' is at the end of the model"),
        ({"num_blocks": 6}, "num_blocks is 6"),
        ({"num_blocks": 0}, r"num_blocks is 0"),
        ({"num_blocks": 2, "balance": "luck"}, r"balance is 'luck': it is 'memory', 'compute' or 'count'"),
        ({"cuts": ["layer1"], "objective": None}, r"objective is None with 2 blocks"),
        ({"cuts": ["layer1"], "objective": nn.CrossEntropyLoss()}, r"objective is CrossEntropyLoss.*must be a factory"),
        ({"cuts": ["layer1"], "momentum": 0.995}, r"momentum is 0.995: it must be a factory, such as localgrad.man"),
        ({"cuts": ["layer1"], "objective": lambda site: None}, r"objective gave NoneType for block 0"),
    ],
)
def test_a_wrong_split_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        split(cifar_resnet(8), EXAMPLE, **{"objective": localgrad.dgl(10), **arguments})


def test_a_parameter_of_two_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    with pytest.raises(LocalGradError, match=r"parameter '0.weight' is shared by blocks 0 and 1"):
        split(model, torch.empty(2, 4), num_blocks=3, balance="count", objective=localgrad.classifier(3))


def test_an_objective_that_cannot_sit_at_a_cut_says_so() -> None:
    infopro = OBJECTIVES["infopro"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * IMAGE**2, 8), nn.Linear(8, NUM_CLASSES))
    with pytest.raises(LocalGradError, match=r"infopro cannot sit on features \(2, 8\).*dgl or classifier"):
        split(model, EXAMPLE, cuts=["2"], objective=infopro)
    blocks = split(model, EXAMPLE, num_blocks=2, objective=infopro)
    assert [block.names for block in blocks] == [("0",), ("2", "3")]


def test_a_model_that_starts_in_place_leaves_the_batch_as_it_is() -> None:
    model = nn.Sequential(_Wrapped(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 4, 1), nn.Flatten())
    model.append(nn.Linear(4 * IMAGE**2, NUM_CLASSES))
    blocks = split(model, EXAMPLE, cuts=["0"], objective=OBJECTIVES["infopro"])
    inputs, targets = batch()
    before = inputs.clone()
    blocks[0](inputs, targets, inputs)
    assert torch.equal(inputs, before)


class _Wrapped(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def test_an_objective_that_writes_into_its_features_is_refused() -> None:
    class InPlace(nn.Module):
        def forward(self, features: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            return features.relu_().square().mean()

    blocks = split(cifar_resnet(8), EXAMPLE, cuts=["layer1"], objective=lambda site: InPlace())
    inputs, targets = batch()
    with pytest.raises(LocalGradError, match=r"objective of block conv1\.\.layer1\.0 changes its features in place"):
        blocks[0](inputs, targets, inputs)


def test_of_equal_memory_the_smaller_auxiliary_networks_are_chosen() -> None:
    """In ResNet-18 the stem sets the largest block; copies of layer4 would outweigh what cutting saves."""
    model, objective, momentum = torchvision.models.resnet18(num_classes=10), localgrad.dgl(10), localgrad.man()
    blocks = split(model, torch.empty(2, 3, 64, 64), num_blocks=4, objective=objective, momentum=momentum)
    example = torch.empty(32, 3, 64, 64, device="meta")
    cuts = [block.names[-1] for block in blocks[:-1]]
    assert step_peak(model.to("meta"), example, cuts, objective, momentum) < 0.9 * step_peak(
        model.to("meta"), example, [], None, None
    )


def sequence_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


@pytest.mark.parametrize("objective", [localgrad.classifier(5), localgrad.dgl(5), localgrad.predsim(5)])
def test_a_network_of_sequences_learns_in_every_block(objective) -> None:
    momentum = localgrad.man(form="fused")
    blocks = split(sequence_model(), torch.empty(2, 4, 12), cuts=["0", "3"], objective=objective, momentum=momentum)
    assert blocks[0].momentum.bias.shape == (16, 1)
    features = inputs = torch.randn(8, 4, 12)
    targets = torch.arange(8) % 5
    for block in blocks:
        features, loss = block(features.detach(), targets, inputs)
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in block.body.parameters() if parameter.ndim > 1)


class PreActivation(nn.Module):
    """A unit that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.conv(self.relu(features))


def pre_activation_model() -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *(PreActivation() for _ in range(3)), *head)


@pytest.mark.parametrize("balance", ["memory", "compute"])
def test_units_that_write_their_input_have_a_cost(balance) -> None:
    example = torch.empty(2, 3, 8, 8)
    blocks = split(pre_activation_model(), example, num_blocks=3, balance=balance, objective=localgrad.dgl(5))
    assert sum(len(block.names) for block in blocks) == 5
    rows = localgrad.plan(pre_activation_model(), example, objective=localgrad.dgl(5), num_blocks=[1, 2])
    assert {row.num_blocks for row in rows} == {1, 2}


def test_synchronised_norms_are_recomputed() -> None:
    """PyTorch's own, which insists on its counter of batches."""
    torch.manual_seed(0)
    norm, features = nn.SyncBatchNorm(4), torch.randn(6, 4, 3, 3)
    plain = copy.deepcopy(norm)
    for module, result in ((norm, recomputed(norm, features, norm)), (plain, plain(features))):
        result.square().sum().backward()
        assert module.num_batches_tracked == 1
    for (name, value), expected in zip(norm.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert norm.weight.grad is not None
    assert torch.equal(norm.weight.grad, plain.weight.grad)


def test_units_that_write_their_input_are_recomputed_from_what_it_was() -> None:
    states = []
    for recompute in (False, True):
        momentum = localgrad.man(recompute=recompute)
        blocks = split(
            pre_activation_model(),
            torch.empty(2, 3, 8, 8),
            cuts=["1"],
            objective=localgrad.dgl(5),
            momentum=momentum,
            recompute=recompute,
        )
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
        torch.manual_seed(1)
        for _ in range(3):
            localgrad.local_step(blocks, optimizers, torch.randn(4, 3, 8, 8), torch.arange(4))
        states.append([value for block in blocks for value in block.state_dict().values()])
    assert all(map(torch.equal, *states))


def test_frozen_norms_stay_frozen() -> None:
    model = cifar_resnet(8)
    model.bn1.eval()
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=DGL)
    assert not model.bn1.training
    assert model.layer1[0].bn1.training
    assert blocks[0].training
    assert all(module.training for module in blocks[0].objective.modules())


def test_a_block_without_weights_is_trained_by_its_head_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6, 5))
    names = ["0", "1", "2", "3", "4"]
    blocks = split(model, torch.empty(2, 3, 8, 8), names=names, cuts=["0", "1", "2"], objective=localgrad.classifier(5))
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    losses = localgrad.local_step(blocks, optimizers, torch.randn(4, 3, 8, 8), torch.arange(4))
    assert all(loss.isfinite() for loss in losses)


def test_a_batch_of_one_is_enough_to_choose_cuts() -> None:
    blocks = split(cifar_resnet(8), torch.empty(1, 3, 16, 16), num_blocks=2, objective=localgrad.dgl(10))
    assert len(blocks) == 2
    with pytest.raises(LocalGradError, match="a batch of one leaves one value a channel: give two samples or more"):
        localgrad.plan(cifar_resnet(8), torch.empty(1, 3, 16, 16), objective=localgrad.dgl(10))


class Measured(nn.Module):
    """A forward pass that reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.conv(features / features.abs().max().item())


def test_a_model_that_needs_values_takes_cuts_by_name_or_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Measured(), nn.Flatten(), nn.Linear(6 * 36, 5))
    example = torch.ones(2, 3, 8, 8)
    options = {"names": ["0", "1", "2", "3"], "num_blocks": 2, "objective": localgrad.classifier(5)}
    with pytest.warns(LocalGradWarning, match=r"the unit '1' does not run on tensors without data"):
        blocks = split(model, example, **options)
    assert [block.names for block in blocks] == [
        block.names for block in split(model, example, balance="count", **options)
    ]


class Counting(nn.Module):
    """A norm by an average of its own, which it moves in place before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("level", torch.ones(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.conv(features)
        if self.training:
            self.level.mul_(0.9).add_(0.1 * features.detach().square().mean())
        return features / self.level.clone()


@pytest.mark.parametrize("wrapped", [lambda: Counting(), lambda: spectral_norm(nn.Conv2d(4, 4, 3, padding=1))])
def test_any_state_is_recomputed_from_what_it_was(wrapped: Any) -> None:
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.Sequential(wrapped(), nn.ReLU()), nn.Sequential(wrapped(), nn.ReLU())
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        blocks = split(model, torch.empty(2, 3, 8, 8), cuts=[], recompute=recompute)
        optimizer = torch.optim.SGD(blocks[0].trainable_parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            inputs = torch.randn(4, 3, 8, 8, generator=generator)
            local_step(blocks, [optimizer], inputs, torch.tensor([0, 1, 2, 3]))
        states.append(model.state_dict())
    assert all(map(torch.equal, *(state.values() for state in states)))


@pytest.mark.slow
def test_compiled_blocks_recompute_and_count_a_batch_once() -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        momentum = localgrad.man(recompute=True)
        blocks = split(
            cifar_resnet(8, NUM_CLASSES), EXAMPLE, cuts=["layer1"], objective=DGL, momentum=momentum, recompute=True
        )
        for block in blocks if compiled else ():
            block.compile(backend="aot_eager")
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
        for seed in range(2):
            local_step(blocks, optimizers, *batch(seed))
        found.append([tensor for block in blocks for tensor in block.state_dict().values()])
    for plain, compiled_tensor in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled_tensor)
