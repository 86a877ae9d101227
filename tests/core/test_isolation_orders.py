"""Where a loop zeroes gradients, leaves a batch out or adds batches up: isolation trains as the bare blocks would.

The oracle is a loop over the three blocks by hand, without hooks, whose gradients come where a backward pass stands.
"""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from localgrad import isolate
from localgrad.errors import LocalGradWarning

CLASSES = 5
HEAD = localgrad.classifier(CLASSES)
INPUTS = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).double()
TARGETS = torch.randint(0, CLASSES, (4, 6), generator=torch.Generator().manual_seed(2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES)).double()


def isolated(**options: Any) -> tuple[nn.Sequential, localgrad.Isolation, torch.optim.Optimizer]:
    model = network()
    isolation = isolate(model, ["0", "1"], objective=HEAD, example=INPUTS[0], **options)
    return model, isolation, torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)


def by_hand(weights: list[list[float]], heads: nn.ModuleList) -> list[Tensor]:
    """Weights after a step for each list, in which each batch's losses count so much."""
    model, heads = network(), copy.deepcopy(heads)
    optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], 0.1, 0.9)
    for step in weights:
        for number, weight in enumerate(step):
            features = INPUTS[number]
            for index, head in enumerate(heads):
                features = model[index](features)
                loss = head(features, TARGETS[number], INPUTS[number])
                (weight * loss).backward()
                features = features.detach()
            (weight * F.cross_entropy(model[3](model[2](features)), TARGETS[number])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters(), *heads.parameters()]


def forward(model: nn.Sequential, isolation: localgrad.Isolation, number: int = 0) -> Tensor:
    isolation.targets = TARGETS[number]
    return F.cross_entropy(model(INPUTS[number]), TARGETS[number])


def assert_trained(model: nn.Module, isolation: localgrad.Isolation, expected: list[Tensor]) -> None:
    found = [*model.parameters(), *isolation.parameters()]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("place", ["before forward", "between forward and backward", "after the step"])
@pytest.mark.parametrize("of", ["optimizer", "model"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_zeroed_anywhere(place: str, of: str, set_to_none: bool) -> None:
    model, isolation, optimizer = isolated()
    expected = by_hand([[1.0]] * 4, isolation.objectives)

    def zero(where: str) -> None:
        if where == place:
            (optimizer if of == "optimizer" else model).zero_grad(set_to_none=set_to_none)

    for _ in range(4):
        zero("before forward")
        loss = forward(model, isolation)
        zero("between forward and backward")
        loss.backward()
        optimizer.step()
        zero("after the step")
    assert_trained(model, isolation, expected)


@pytest.mark.parametrize("place", ["before forward", "between forward and backward", "after the step"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_add_up_wherever_gradients_are_zeroed(place: str, set_to_none: bool) -> None:
    model, isolation, optimizer = isolated(backward=lambda loss: (loss / 3).backward())
    expected = by_hand([[1 / 3] * 3] * 3, isolation.objectives)
    for _ in range(3):
        for number in range(3):
            if place == "before forward" and number == 0:
                optimizer.zero_grad(set_to_none)
            loss = forward(model, isolation, number)
            if place.startswith("between") and number == 0:
                optimizer.zero_grad(set_to_none)
            (loss / 3).backward()
        optimizer.step()
        if place == "after the step":
            optimizer.zero_grad(set_to_none)
    assert_trained(model, isolation, expected)


def test_a_batch_that_is_left_out_trains_no_block() -> None:
    model, isolation, optimizer = isolated()
    expected = by_hand([[1.0], [1.0]], isolation.objectives)
    for left_out in (False, True, True, False):
        loss = forward(model, isolation)
        if left_out:  # as loops do where a loss is not finite
            continue
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_trained(model, isolation, expected)


def test_a_batch_that_fails_trains_no_block() -> None:
    model, isolation, optimizer = isolated(backward=lambda loss: (loss / 2).backward())
    expected = by_hand([[0.5, 0.5]], isolation.objectives)

    def fail(*args: Any) -> None:
        raise RuntimeError("out of luck")

    (forward(model, isolation, 0) / 2).backward()
    handle = model[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        forward(model, isolation, 1)
    handle.remove()
    (forward(model, isolation, 1) / 2).backward()
    optimizer.step()
    assert_trained(model, isolation, expected)


def test_several_forward_passes_before_one_backward_pass() -> None:
    model, isolation, optimizer = isolated(backward=lambda loss: (loss / 2).backward())
    expected = by_hand([[0.5, 0.5]] * 2, isolation.objectives)
    for _ in range(2):
        losses = [forward(model, isolation, number) for number in range(2)]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_trained(model, isolation, expected)


def test_two_backward_passes_through_one_forward_pass_count_local_losses_once() -> None:
    model, isolation, optimizer = isolated()
    expected = by_hand([[1.0]], isolation.objectives)
    loss = forward(model, isolation) / 2
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_trained(model, isolation, expected)


@pytest.mark.parametrize("reach", [2, 3])
@pytest.mark.parametrize("place", ["between", "after"])
def test_losses_that_reach_further_too(reach: int, place: str) -> None:
    states = []
    for order in ("after", place):
        model, isolation, optimizer = isolated(reach=reach)
        for _ in range(3):
            loss = forward(model, isolation)
            if order == "between":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if order == "after":
                optimizer.zero_grad()
        states.append([*model.parameters(), *isolation.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


class Kept(nn.Module):
    """Its output is in an object that PyTorch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Any:
        return Output(self.net(inputs))


class Output:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


def test_an_output_that_is_an_object_trains_too() -> None:
    model = Kept()
    isolation = isolate(model, ["net.0", "net.1"], objective=HEAD, example=INPUTS[0])
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    expected = by_hand([[1.0]] * 2, isolation.objectives)
    for _ in range(2):
        isolation.targets = TARGETS[0]
        loss = F.cross_entropy(model(INPUTS[0]).scores, TARGETS[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_trained(model.net, isolation, expected)


def test_a_loss_of_something_else_than_the_output_is_said() -> None:
    model, isolation, optimizer = isolated()
    kept: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, output: kept.append(output))
    for step in range(2):
        isolation.targets = TARGETS[0]
        with pytest.warns(LocalGradWarning, match="no gradient came to what the model returned") if step else quiet():
            model(INPUTS[0])
        kept.pop().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def quiet() -> Any:
    return warnings.catch_warnings()


def test_a_model_whose_last_block_is_frozen_trains_the_others() -> None:
    model = network()
    model[2].requires_grad_(False)
    model[3].requires_grad_(False)
    isolation = isolate(model, ["0", "1"], objective=HEAD, example=INPUTS[0])
    isolation.targets = TARGETS[0]
    assert not model(INPUTS[0]).requires_grad
    assert all(parameter.grad is not None for parameter in isolation.trainable_parameters())


@pytest.mark.parametrize("combination", list(itertools.product([True, False], repeat=2)))
def test_gradients_that_somebody_holds_stay_the_same_tensors(combination: tuple[bool, bool]) -> None:
    zeroed, between = combination
    model, isolation, _ = isolated(backward=torch.Tensor.backward)
    held = [torch.zeros_like(parameter) for parameter in isolation.trainable_parameters()]
    for parameter, gradient in zip(isolation.trainable_parameters(), held, strict=True):
        parameter.grad = gradient
    for _ in range(2):
        loss = forward(model, isolation)
        if zeroed and between:
            model.zero_grad(set_to_none=False)
        loss.backward()
    for parameter, gradient in zip(isolation.trainable_parameters(), held, strict=True):
        assert parameter.grad is gradient and gradient.any()
