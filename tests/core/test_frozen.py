"""Frozen parameters: shared by the momentum's copies, never trained; blocks that train nothing; modes of the copies."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers.cases import IMAGE, MOMENTA, NUM_CLASSES, batch
from localgrad import LocalGradError, local_step, man, manpp, split
from localgrad.core.block import Block
from localgrad.core.costs import unit_costs
from localgrad.errors import CannotSitError, LocalGradWarning
from localgrad.models import cifar_resnet

torch.set_num_threads(1)
EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
DGL = localgrad.dgl(NUM_CLASSES)
FACTORIES = {name: factory for name, factory in MOMENTA.items() if factory is not None}


class LowRank(nn.Module):
    """A convolution whose weight is frozen, beside two small trained ones, as LoRA has them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, 3, conv.stride, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.base(features) + self.up(self.down(features))


def low_rank_resnet() -> nn.Module:
    """A ResNet of which only low-rank weights and the last layer are trained."""
    torch.manual_seed(0)
    model = cifar_resnet(14, NUM_CLASSES).requires_grad_(False)
    for name, module in list(model.named_modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and "layer" in name:
                setattr(module, child_name, LowRank(child))
    model.fc.requires_grad_(True)
    return model


def blocks_of(model: nn.Module, momentum: Any = None, cuts: tuple[str, ...] = ("layer1.0", "layer2.0")) -> list[Block]:
    return split(model, EXAMPLE, cuts=cuts, objective=DGL, momentum=momentum)


def optimizers_of(blocks: list[Block]) -> list[Any]:
    return [torch.optim.SGD(p, lr=0.1) if (p := block.trainable_parameters()) else None for block in blocks]


def sizes(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("name", FACTORIES)
def test_copies_train_what_the_unit_trains_and_share_the_rest(name: str) -> None:
    model = low_rank_resnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = blocks_of(model, FACTORIES[name])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # random draws too
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    for block, following in ((blocks[0], model.layer1[1]), (blocks[1], model.layer2[1])):
        momentum: Any = block.momentum
        for branch in (momentum.bias, momentum.ema):
            if isinstance(branch, nn.Module):
                copied = branch[0] if momentum.depth == 2 else branch
                for (key, found), (_, source) in zip(
                    copied.named_parameters(), following.named_parameters(), strict=True
                ):
                    assert (found is source) == (not source.requires_grad), key
                own = [p for p in copied.parameters() if id(p) not in frozen]
                assert sizes(own) == sizes(p for p in following.parameters() if p.requires_grad)
                trains = branch is momentum.bias or name == "man fused"
                assert all(p.requires_grad == trains for p in own)
        assert not {id(p) for p in block.trainable_parameters()} & frozen.keys()
    for seed in range(3):
        local_step(blocks, optimizers_of(blocks), *batch(seed))
    after = model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(before[key], value)}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in moved if key in dict(model.named_parameters())} == trained


@pytest.mark.parametrize("factory", [man, manpp])
def test_the_average_follows_what_is_trained(factory: Any) -> None:
    model = low_rank_resnet()
    blocks = blocks_of(model, factory(0.75))
    momentum: Any = blocks[0].momentum
    unit = model.layer1[1]
    with torch.no_grad():
        for parameter in momentum.averages():
            parameter.zero_()
    momentum.update()
    found, source = dict(momentum.ema.named_parameters()), dict(unit.named_parameters())
    for key, parameter in source.items():
        expected = 0.25 * parameter if parameter.requires_grad else parameter
        torch.testing.assert_close(found[key], expected)
    assert [id(p) for p in momentum.followed()] == [id(p) for p in unit.parameters() if p.requires_grad]


def test_shared_parameters_stay_out_of_the_auxiliary_state() -> None:
    blocks = blocks_of(low_rank_resnet(), man())
    state = blocks[0].auxiliary_state_dict()
    assert not [key for key in state if "base.weight" in key]
    assert [key for key in state if key.startswith("momentum.ema") and "down.weight" in key]
    other = blocks_of(low_rank_resnet(), man(initial="random"))
    other[0].load_auxiliary_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other[0].auxiliary_state_dict().items())


def test_copies_of_the_blocks_share_as_the_blocks_do() -> None:
    blocks = copy.deepcopy(blocks_of(low_rank_resnet(), man()))
    momentum: Any = blocks[0].momentum
    body = {id(p) for p in blocks[1].body.parameters()}
    assert [id(p) in body for p in momentum.bias.parameters()] == [
        not p.requires_grad for p in momentum.bias.parameters()
    ]
    assert all(id(p) in body for p in momentum.followed())


def test_a_unit_that_trains_nothing_cannot_be_followed() -> None:
    model = cifar_resnet(14, NUM_CLASSES)
    model.layer1[1].requires_grad_(False)
    with pytest.raises(CannotSitError, match=r"'layer1\.1' after a cut trains none .*momentum=None"):
        blocks_of(model, man())
    blocks_of(model)


# Blocks that train nothing


def test_a_block_that_trains_nothing_has_no_head_and_no_graph() -> None:
    """The blocks after it train as they would on its features, computed by hand."""
    torch.manual_seed(0)
    model = cifar_resnet(14, NUM_CLASSES)
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    with pytest.warns(LocalGradWarning, match=r"block 0 \(conv1 to layer1\.1\) trains nothing: .* None"):
        blocks = blocks_of(model, man(), cuts=("layer1", "layer2"))
    assert blocks[0].objective is blocks[0].momentum is blocks[0].criterion is None
    assert blocks[1].objective is not None
    assert blocks[1].momentum is not None
    assert blocks[0].trainable_parameters() == []
    twins = copy.deepcopy(blocks)
    optimizers = optimizers_of(blocks)
    assert optimizers[0] is None
    optimizers[0] = []
    inputs, targets = batch()
    seen: list[bool] = []
    blocks[0].body[-1].register_forward_hook(lambda module, arguments, output: seen.append(output.requires_grad))
    losses = local_step(blocks, optimizers, inputs, targets)
    assert seen == [False]
    assert losses[0] == 0
    features = twins[0].body(inputs)
    expected = local_step(twins[1:], optimizers_of(twins[1:]), features, targets)
    assert losses[1:] == expected
    assert all(map(torch.equal, blocks[2].parameters(), twins[2].parameters()))
    assert blocks[0].eval().local_logits(features) is None


def test_a_last_block_that_trains_nothing_gives_its_loss_alone() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    model.layer3.requires_grad_(False)
    model.fc.requires_grad_(False)
    blocks = split(model, EXAMPLE, cuts=["layer2"], objective=DGL)
    optimizers = optimizers_of(blocks)
    assert optimizers[1] is None
    before = model.conv1.weight.clone()
    losses = local_step(blocks, optimizers, *batch())
    assert losses[1] > 0
    assert not torch.equal(before, model.conv1.weight)


# Dtypes


class FrozenFirst(nn.Module):
    """Storage of another type before the float weights, as a quantised layer with an adapter has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)
        self.linear = nn.Linear(16, 16)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.linear(features).relu()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["none", *FACTORIES])
def test_heads_have_the_type_of_the_features(dtype: torch.dtype, name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), FrozenFirst(dtype), FrozenFirst(dtype), nn.Linear(16, 5))
    inputs, targets = torch.randn(4, 8), torch.arange(4)
    blocks = split(model, inputs, cuts=["1"], objective=localgrad.classifier(5), momentum=MOMENTA[name])
    assert {p.dtype for p in blocks[0].objective.parameters()} == {torch.float32}
    losses = local_step(blocks, optimizers_of(blocks), inputs, targets)
    assert all(loss.isfinite() for loss in losses)
    assert not model[2].stored.any()


# Modes, and tensors that modules keep


def test_norms_that_are_kept_frozen_are_frozen_in_the_copies_too() -> None:
    model = cifar_resnet(14, NUM_CLASSES)
    norm = model.layer1[1].bn1.eval()
    blocks = blocks_of(model, man())
    copies: Any = blocks[0].momentum
    assert not copies.bias.bn1.training
    assert not copies.ema.bn1.training
    assert copies.bias.bn2.training
    for block in blocks:
        block.train()
    norm.eval()  # after a round of evaluation, as before it
    statistics = copies.ema.bn1.running_mean.clone()
    local_step(blocks, optimizers_of(blocks), *batch())
    assert torch.equal(copies.ema.bn1.running_mean, statistics)
    assert not torch.equal(copies.ema.bn2.running_mean, torch.zeros_like(copies.ema.bn2.running_mean))
    norm.train()
    local_step(blocks, optimizers_of(blocks), *batch())
    assert not torch.equal(copies.ema.bn1.running_mean, statistics)


class Keeps(nn.Module):
    """Keeps a tensor of its training forward pass on itself, in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.balance: Any = None
        self.maps: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        gates = self.linear(features)
        if self.training:
            self.balance, self.maps = gates.mean(), [gates]
        return features + gates.relu()


@pytest.mark.parametrize("arguments", [{"cuts": ["1"]}, {"num_blocks": 2}])
def test_copies_are_made_without_the_graphs_that_modules_keep(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), Keeps(), Keeps(), nn.Linear(16, 5))
    inputs, targets = torch.randn(8, 8), torch.arange(8) % 5
    model(inputs)
    assert model[2].balance.requires_grad
    blocks = split(model, inputs, objective=localgrad.classifier(5), momentum=man(), **arguments)
    copies = [module for module in blocks[0].momentum.modules() if isinstance(module, Keeps)]
    assert copies
    for kept in copies:
        assert kept.balance is None or not kept.balance.requires_grad
        assert not any(tensor.requires_grad for tensor in kept.maps)
    local_step(blocks, optimizers_of(blocks), inputs, targets)


def test_costs_leave_out_cuts_where_nothing_can_be_followed_and_say_other_errors() -> None:
    model = cifar_resnet(14, NUM_CLASSES)
    model.layer1[1].requires_grad_(False)
    found = localgrad.units(model, EXAMPLE)
    costs = {cost.name: cost.end_activations for cost in unit_costs(found, EXAMPLE, DGL, man())}
    assert costs["layer1.0"] == float("inf")
    assert costs["layer2.0"] < float("inf")

    def broken(site: Any) -> nn.Module:
        raise LocalGradError("not at all")

    with pytest.raises(LocalGradError, match="not at all"):
        unit_costs(found, EXAMPLE, broken)
