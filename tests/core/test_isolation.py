"""Isolation by hooks: the weights of `local_step`, bit for bit, and what the object promises."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import localgrad
from helpers.cases import IMAGE, MODELS, MOMENTA, NUM_CLASSES, OBJECTIVES, batch
from localgrad import isolate, local_step, man, split
from localgrad.core.momentum import Momentum
from localgrad.core.site import Objective
from localgrad.models import cifar_resnet

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
DGL = localgrad.dgl(NUM_CLASSES)
# the modules after which the units of `MODELS` end; the class token joins after the patches, outside any module
CUTS = {
    "resnet": (["conv1", "layer1.0", "layer2.0"], ["relu", "layer1.0", "layer2.0"]),
    "transformer": (["layers.0", "layers.1"], ["layers.0", "layers.1"]),
}


def _rows() -> list[Any]:
    """Every model with every objective and every momentum; of the transformer's the default suite takes pairs."""
    rows = itertools.product(MODELS, OBJECTIVES, MOMENTA)
    usual = {*list(OBJECTIVES)[:2], *list(MOMENTA)[:3]}
    return [
        pytest.param(*row, marks=() if row[0] == "resnet" or usual & {*row[1:]} else pytest.mark.slow) for row in rows
    ]


@pytest.mark.parametrize(("model_name", "objective", "momentum"), _rows())
def test_five_steps_give_the_weights_of_local_step(model_name: str, objective: str, momentum: str) -> None:
    _compare(model_name, OBJECTIVES[objective], MOMENTA[momentum], one_optimizer=True)


@pytest.mark.parametrize("momentum", ["none", "man", "man fused"])
@pytest.mark.parametrize("model_name", MODELS)
def test_one_optimizer_a_block_gives_the_same(model_name: str, momentum: str) -> None:
    _compare(model_name, DGL, MOMENTA[momentum], one_optimizer=False)


@pytest.mark.parametrize("reach", [2, 3, 4])
@pytest.mark.parametrize("momentum", ["none", "man", "manpp"])
@pytest.mark.parametrize("model_name", MODELS)
def test_losses_of_further_reach_give_the_same(model_name: str, momentum: str, reach: int) -> None:
    _compare(model_name, DGL, MOMENTA[momentum], one_optimizer=True, reach=reach)


@pytest.mark.parametrize("momentum", ["none", "man"])
@pytest.mark.parametrize("model_name", MODELS)
def test_recomputed_blocks_give_the_same(model_name: str, momentum: str) -> None:
    _compare(model_name, DGL, MOMENTA[momentum], one_optimizer=True, recompute=True)


def _compare(
    model_name: str,
    objective: Objective,
    momentum: Momentum | None,
    one_optimizer: bool,
    reach: int = 1,
    recompute: bool = False,
) -> None:
    make, (units, modules) = MODELS[model_name][0], CUTS[model_name]
    torch.manual_seed(0)
    model = make()
    blocks = split(model, EXAMPLE, cuts=units, objective=objective, momentum=momentum)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), 0.05, 0.9) for block in blocks]
    torch.manual_seed(0)
    other = make()
    options = {"reach": reach, "recompute": recompute, "example": EXAMPLE}
    isolation = isolate(other, modules, objective=objective, momentum=momentum, **options)
    groups = [isolation.trainable_parameters(block) for block in range(len(blocks))]
    groups = [[parameter for group in groups for parameter in group]] if one_optimizer else groups
    others = [torch.optim.SGD(group, 0.05, 0.9) for group in groups]
    for step in range(5):
        inputs, targets = batch(step)
        losses = local_step(blocks, optimizers, inputs, targets, reach=reach)
        isolation.targets = targets
        loss = nn.functional.cross_entropy(other(inputs), targets)
        loss.backward()
        for optimizer in others:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(torch.stack(losses), torch.stack([*isolation.losses, loss.detach()]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    isolation.state_dict()
    for block, momentum_network, head in zip(blocks, isolation.momenta, isolation.objectives, strict=False):
        _assert_equal(block.objective, head)
        _assert_equal(block.momentum, momentum_network)


def _assert_equal(one: nn.Module | None, other: nn.Module | None) -> None:
    if one is None or other is None:
        assert one is other
    else:
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def _isolated(**options: Any) -> tuple[nn.Module, localgrad.Isolation]:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    given = {"cuts": ["layer1.0", "layer2.0"], "objective": DGL, "example": EXAMPLE} | options
    return model, isolate(model, given.pop("cuts"), **given)


def _loss(model: nn.Module, isolation: localgrad.Isolation, seed: int = 0) -> torch.Tensor:
    inputs, isolation.targets = batch(seed)
    return nn.functional.cross_entropy(model(inputs), batch(seed)[1])


def test_without_cuts_it_is_the_loop_alone() -> None:
    torch.manual_seed(0)
    bare = cifar_resnet(8, NUM_CLASSES)
    model, isolation = _isolated(cuts=[], objective=None)
    optimizer = torch.optim.SGD(bare.parameters(), 0.1, 0.9)
    other = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    for step in range(5):
        inputs, targets = batch(step)
        nn.functional.cross_entropy(bare(inputs), targets).backward()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert isolation.losses == []
    _assert_equal(bare, model)


def test_a_loss_reaches_its_own_block_and_nothing_else() -> None:
    model, isolation = _isolated(momentum=man())
    blocks = [set(isolation.trainable_parameters(block)) for block in range(3)]
    output = _loss(model, isolation)
    assert all(parameter.grad is None for block in blocks for parameter in block)  # they come in the backward pass
    output.backward()
    assert all(parameter.grad is not None for block in blocks for parameter in block)
    local = {p: p.grad.clone() for block in blocks[:2] for p in block}
    model.zero_grad()
    (0 * _loss(model, isolation)).backward()  # the last loss counts nothing; the others are the same
    assert not any(parameter.grad.any() for parameter in blocks[2])
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in local.items())
    assert all(p.grad is None for momentum in isolation.momenta for p in momentum.ema.parameters())
    assert not blocks[0] & blocks[1] and not blocks[1] & blocks[2]


def test_nothing_happens_in_evaluation_mode_and_under_no_grad() -> None:
    model, isolation = _isolated(momentum=man())
    inputs, _ = batch()
    with torch.no_grad():
        model(inputs)
    model.eval()
    model(inputs).sum().backward()
    assert isolation.losses == []
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_average_moves_once_an_optimizer_step() -> None:
    model, isolation = _isolated(momentum=man(0.5))
    isolation.backward = lambda loss: (loss / 2).backward()
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    weight = dict(isolation.momenta[0].ema.named_parameters())["conv1.weight"]
    source = model.layer2[0].conv1.weight
    for step in range(3):
        expected = 0.5 * weight + 0.5 * source.detach()
        for part in range(2):
            (_loss(model, isolation, 2 * step + part) / 2).backward()
        assert torch.allclose(weight, expected)
        optimizer.step()
        optimizer.zero_grad()


def test_accumulation_without_a_weight_of_the_local_losses_is_said() -> None:
    model, isolation = _isolated()
    _loss(model, isolation).backward()
    with pytest.warns(UserWarning, match="divide these losses"):
        _loss(model, isolation, 1).backward()
    _loss(model, isolation, 2).backward()  # once


def test_its_state_is_that_of_the_auxiliary_networks() -> None:
    model, isolation = _isolated(momentum=man())
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    keys = list(cifar_resnet(8, NUM_CLASSES).state_dict())
    _loss(model, isolation).backward()
    optimizer.step()
    assert list(model.state_dict()) == keys
    written = io.BytesIO()
    torch.save((model.state_dict(), isolation.state_dict()), written)
    torch.manual_seed(1)
    again, other = _isolated(momentum=man())
    with torch.no_grad():
        for parameter in (*again.parameters(), *other.parameters()):
            parameter.zero_()
    weights, auxiliary = torch.load(io.BytesIO(written.getvalue()))
    assert not any(key.startswith("layer") for key in auxiliary)
    again.load_state_dict(weights)
    other.load_state_dict(auxiliary)
    losses = [_loss(*pair).item() for pair in ((model, isolation), (again, other))]
    assert losses[0] == losses[1]
    assert torch.equal(torch.stack(isolation.losses), torch.stack(other.losses))


@pytest.mark.parametrize("recompute", [True, False])
def test_removed_it_leaves_the_model_as_it_was(recompute: bool) -> None:
    torch.manual_seed(0)
    bare = cifar_resnet(8, NUM_CLASSES)
    attributes = {name: set(vars(module)) for name, module in bare.named_modules()}
    model, isolation = _isolated(momentum=man(), recompute=recompute)
    with isolation:
        pass
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    inputs, _ = batch()
    assert torch.equal(bare(inputs), model(inputs))
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Recorder(nn.Module):
    """Keeps what it sees in a list, counts in a buffer that it replaces, and notes its last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen: list[int] = [0]
        self.register_buffer("count", torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(features))
        self.count.add_(1)
        self.count = self.count + 1
        self.last = features
        return self.layer(features)


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_the_model_leaves_nothing_on_it(training: bool) -> None:
    model = nn.Sequential(Recorder(), nn.Linear(4, 2)).train(training)
    model[0].layer.eval().requires_grad_(False)
    recorder, count = model[0], model[0].count
    isolate(model, ["0"], objective=localgrad.classifier(2), example=torch.randn(3, 4))
    assert recorder.seen == [0] and recorder.count is count and count == 0 and not hasattr(recorder, "last")
    assert [module.training for module in (model, recorder, recorder.layer)] == [training, training, False]
    assert not any(parameter.requires_grad for parameter in recorder.parameters())


@pytest.mark.parametrize("recompute", [True, False])
def test_a_copy_of_the_model_trains_as_its_own_isolation_does(recompute: bool) -> None:
    model, isolation = _isolated(momentum=man(), recompute=recompute)
    copied, its_own = copy.deepcopy((model, isolation))
    losses = []
    for pair in ((model, isolation), (copied, its_own)):
        optimizer = torch.optim.SGD(pair[1].trainable_parameters(), 0.1)
        for step in range(2):
            _loss(*pair, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(torch.stack(pair[1].losses))
    assert torch.equal(*losses)
    _assert_equal(model, copied)
    assert not {*map(id, model.parameters())} & {*map(id, its_own.trainable_parameters())}


def test_the_example_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    model.layer1.eval()
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    drawn = torch.get_rng_state()
    isolate(model, ["layer1"], objective=lambda site: nn.Identity(), example=EXAMPLE)
    assert torch.equal(drawn, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_an_example_the_first_batch_serves() -> None:
    model, isolation = _isolated(example=None)
    assert "first batch" in repr(isolation)
    with pytest.raises(localgrad.LocalGradError, match="example=batch"):
        isolation.trainable_parameters()
    _loss(model, isolation).backward()
    assert len(isolation.losses) == 2
    assert {id(p) for p in model.parameters()} <= {id(p) for p in isolation.trainable_parameters()}


def test_printed_it_shows_blocks_parameters_and_heads() -> None:
    _, isolation = _isolated(momentum=man())
    shown = str(isolation)
    assert "CifarResNet in 3 blocks" in shown
    assert "1  to layer1.0: trains 5,136 parameters; " in shown
    assert "DGL" in shown
    assert "MomentumAuxiliary" in shown
    assert sum(p.numel() for p in isolation.trainable_parameters(0)) > 5136


def test_a_frozen_block_gets_no_head_and_no_loss() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    for module in (model.conv1, model.bn1, model.layer1):
        module.requires_grad_(False)
    isolation = isolate(model, ["layer1", "layer2"], objective=DGL, momentum=man(), example=EXAMPLE)
    assert isolation.objectives[0] is isolation.momenta[0] is None
    _loss(model, isolation).backward()
    assert len(isolation.losses) == 1
    assert all(
        (parameter.grad is None) == name.startswith(("conv1", "bn1", "layer1"))
        for name, parameter in model.named_parameters()
    )


def test_num_blocks_parts_the_chain_of_residual_units() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(14, NUM_CLASSES)
    isolation = isolate(model, num_blocks=3, objective=DGL, example=EXAMPLE)
    assert isolation.cuts == ("layer1.1", "layer2.1")


def test_zeroing_the_models_gradients_zeroes_those_of_the_auxiliary_networks() -> None:
    states = []
    for whole in (True, False):
        model, isolation = _isolated(momentum=man())
        optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
        for step in range(3):
            _loss(model, isolation, step).backward()
            optimizer.step()
            optimizer.zero_grad() if whole else model.zero_grad()
        states.append(isolation.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
