"""Reach: every block's gradient against one autograd graph of the whole network, in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localgrad import LocalGradError, auglocal, classifier, dgl, local_step, man, split
from localgrad.core.step import local_gradients
from localgrad.models import cifar_resnet

torch.set_num_threads(1)

CUTS = ["conv1", "layer1.0", "layer2.0"]  # four blocks, the last with two units


def blocks_of(reach_model: nn.Module | None = None, momentum: Any = None, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    model = (reach_model or cifar_resnet(8)).double()
    objective = options.pop("objective", dgl(10))
    return split(model, inputs()[:2], cuts=options.pop("cuts", CUTS), objective=objective, momentum=momentum, **options)


def inputs(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def targets(samples: int = 6) -> Tensor:
    return torch.arange(samples) % 10


def expected(blocks: list[Any], reach: int) -> list[dict[str, Tensor]]:
    """`sum of dL_i / dtheta_j` over the losses that reach block j, from one graph that nothing cuts."""
    features, losses = inputs(), []
    for block in blocks:
        features = block.body(features)
        if block.objective is None:
            losses.append(block.criterion(features, targets()))
        else:
            seen = features if block.momentum is None else block.momentum(features)
            losses.append(block.objective(seen, targets(), inputs()))
    found = []
    for place, block in enumerate(blocks):
        named = {name: p for name, p in block.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(p) for name, p in named.items()}
        for loss in losses[place : place + reach]:
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                sums[name] += 0 if gradient is None else gradient
        found.append(sums)
    return found


class InPlace(nn.Module):
    """Changes what it is given, like a pre-activation unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.inplace = True

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(nn.functional.relu(features, inplace=self.inplace))


def gradients_of(blocks: list[Any]) -> list[dict[str, Tensor]]:
    return [{name: p.grad for name, p in block.named_parameters() if p.grad is not None} for block in blocks]


def assert_same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], tolerance: float = 1e-10) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [None, man(0.9), man(0.9, bias=False), man(0.9, form="fused")])
@pytest.mark.parametrize("reach", [1, 2, 3, 4, 9])
def test_a_block_gets_the_gradients_of_the_losses_that_reach_it(reach: int, momentum: Any) -> None:
    blocks = blocks_of(momentum=momentum)
    wanted = expected(copy.deepcopy(blocks), reach)
    local_gradients(blocks, inputs(), targets(), reach=reach)
    assert_same(gradients_of(blocks), wanted)


def test_a_reach_of_all_blocks_is_end_to_end_training_with_deep_supervision() -> None:
    blocks = blocks_of()
    twin = copy.deepcopy(blocks)
    features, total = inputs(), torch.zeros((), dtype=torch.float64)
    for block in twin:
        features = block.body(features)
        last = block.objective is None
        total = total + (block.criterion(features, targets()) if last else block.objective(features, targets(), None))
    total.backward()
    local_gradients(blocks, inputs(), targets(), reach=len(blocks))
    assert_same(gradients_of(blocks), gradients_of(twin))


@pytest.mark.parametrize("reach", [2, 3])
def test_recomputed_blocks_get_the_same_gradients_and_count_a_batch_once(reach: int) -> None:
    plain, recomputed = blocks_of(momentum=man(0.9)), blocks_of(momentum=man(0.9, recompute=True), recompute=True)
    for blocks in (plain, recomputed):
        local_gradients(blocks, inputs(), targets(), reach=reach)
    assert_same(gradients_of(recomputed), gradients_of(plain))
    for mine, theirs in zip(recomputed, plain, strict=True):
        for (name, buffer), (_, other) in zip(mine.named_buffers(), theirs.named_buffers(), strict=True):
            torch.testing.assert_close(buffer, other, msg=name)


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
def test_stepping_each_block_gives_the_same_weights_and_comes_in_order(reach: int) -> None:
    done: list[int] = []
    local_gradients(blocks_of(), inputs(), targets(), reach=reach, after_block=lambda place, loss: done.append(place))
    assert done == [0, 1, 2, 3]
    weights = []
    for at_once in (False, True):
        blocks = blocks_of(momentum=man(0.9))
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1, momentum=0.9) for block in blocks]
        for _ in range(2):
            local_step(blocks, optimizers, inputs(), targets(), reach=reach, step_each_block=at_once)
        weights.append([tensor for block in blocks for tensor in block.state_dict().values()])
    for mine, theirs in zip(*weights, strict=True):
        assert torch.equal(mine, theirs)


def test_parts_of_a_batch_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 10)).double()
    whole = split(model, torch.randn(2, 5).double(), cuts=["0", "2"], objective=classifier(10))
    parts = copy.deepcopy(whole)
    batch = torch.randn(8, 5, dtype=torch.float64)
    local_gradients(whole, batch, targets(8), reach=2)
    for half in (slice(0, 4), slice(4, 8)):
        local_gradients(parts, batch[half], targets(8)[half], scale=0.5, reach=2)
    assert_same(gradients_of(parts), gradients_of(whole))


def test_a_block_that_starts_in_place_does_not_spoil_the_graph_that_waits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), InPlace(), InPlace(), InPlace(), nn.Flatten(), nn.Linear(400, 10))
    blocks = blocks_of(model, cuts=["0", "1", "2"], objective=classifier(10))
    assert blocks[1].body[0] in blocks[1]._in_place
    copies = copy.deepcopy(blocks)
    for block in copies:
        for module in block.modules():
            if isinstance(module, InPlace):
                module.inplace = False
    local_gradients(blocks, inputs(), targets(), reach=2)
    assert_same(gradients_of(blocks), expected(copies, 2))


def test_a_frozen_block_passes_gradients_on_and_gets_none() -> None:
    blocks = blocks_of()
    blocks[1].body.requires_grad_(False)
    wanted = expected(copy.deepcopy(blocks), 3)
    local_gradients(blocks, inputs(), targets(), reach=3)
    assert_same(gradients_of(blocks), wanted)
    assert not any(name.startswith("body.") for name in gradients_of(blocks)[1])


def test_auglocal_heads_reach_too() -> None:
    blocks = blocks_of(objective=auglocal(10, 2), momentum=man(0.9, bias=False))
    wanted = expected(copy.deepcopy(blocks), 2)
    local_gradients(blocks, inputs(), targets(), reach=2)
    assert_same(gradients_of(blocks), wanted)


@pytest.mark.parametrize("reach", [0, -1, 1.5, True, "2"])
def test_a_reach_that_no_loss_can_have_is_refused(reach: Any) -> None:
    blocks = blocks_of()
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    with pytest.raises(LocalGradError, match="reach is"):
        local_step(blocks, optimizers, inputs(), targets(), reach=reach)


def test_one_pass_for_the_input_and_one_for_the_weights_and_no_more() -> None:
    counted: dict[int, int] = {}
    for reach in (1, 2, 4):
        blocks = blocks_of()
        calls = 0

        class Counted(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, features: Tensor) -> Tensor:
                return features.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
                nonlocal calls
                calls += 1
                return gradient

        for block in blocks:
            block.body[0].register_forward_hook(lambda module, given, output, f=Counted: f.apply(output))
        local_gradients(blocks, inputs(), targets(), reach=reach)
        counted[reach] = calls
    assert counted == {1: 4, 2: 4 + 2, 4: 4}  # blocks 2 and 3 twice; the last, and all with reach 4, at once
