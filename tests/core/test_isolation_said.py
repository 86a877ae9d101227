"""What a training loop or a model does so that some weights would not be trained as meant: it works, or it is said."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import localgrad
from localgrad import LocalGradError, isolate, man
from localgrad.errors import LocalGradWarning

HEAD = localgrad.classifier(5)
INPUTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(6) % 5


class Net(nn.Module):
    """Four layers and a head; `call(layer, index, features)` is how forward calls a layer."""

    def __init__(self, call: Callable[[nn.Module, int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head, self.call = nn.Linear(8, 5), call

    def forward(self, inputs: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            inputs = layer(inputs) if self.call is None else self.call(layer, index, inputs)
        return self.head(inputs)


def isolated(model: nn.Module, **options: Any) -> localgrad.Isolation:
    return isolate(model, ["layers.0", "layers.2"], objective=HEAD, **{"example": INPUTS} | options)


def loss_of(model: nn.Module, isolation: localgrad.Isolation, inputs: Tensor = INPUTS) -> Tensor:
    isolation.targets = TARGETS
    return F.cross_entropy(model(inputs), TARGETS)


def gradients_of(model: nn.Module, isolation: localgrad.Isolation, inputs: Tensor = INPUTS) -> list[Tensor]:
    loss_of(model, isolation, inputs).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


class WritesData(torch.optim.Optimizer):
    """Writes to `parameter.data`, whose changes PyTorch does not count, as older optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad


UNCOUNTED = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, fused=True),
    "of data": WritesData,
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_the_average_follows_weights_whose_changes_pytorch_does_not_count(name: str) -> None:
    model = Net()
    isolation = isolated(model, momentum=man(0.5))
    optimizer = UNCOUNTED[name](isolation.trainable_parameters())
    average, source = isolation.momenta[0].ema.weight, model.layers[1][0].weight
    for _ in range(3):
        expected = 0.5 * average + 0.5 * source.detach()
        loss_of(model, isolation).backward()
        assert torch.allclose(average, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(average, source, atol=1e-4)


@pytest.mark.parametrize("name", UNCOUNTED)
def test_gradients_of_heads_are_zeroed_under_such_optimizers_too(name: str) -> None:
    model = Net()
    isolation = isolated(model)
    optimizer = UNCOUNTED[name](isolation.trainable_parameters())
    for _ in range(2):
        loss_of(model, isolation).backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)
    loss_of(model, isolation).backward()
    found = [parameter.grad.clone() for parameter in isolation.parameters()]
    isolation.zero_grad()
    model.zero_grad()
    loss_of(model, isolation).backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, isolation.parameters(), strict=True))


@pytest.mark.parametrize("zeroed", ["before", "after"])
def test_heads_that_no_optimizer_has_are_said(zeroed: str) -> None:
    model = Net()
    isolation = isolated(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        if zeroed == "before":
            optimizer.zero_grad()
        loss_of(model, isolation).backward()
        optimizer.step()
        if zeroed == "after":
            optimizer.zero_grad()

    for _ in range(3):
        step()
    with pytest.warns(LocalGradWarning, match=r"give the optimizer isolation.trainable_parameters\(\)"):
        step()
    step()  # once


def test_heads_with_an_optimizer_and_steps_of_the_model_alone_in_between_are_right() -> None:
    model = Net()
    isolation = isolated(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss_of(model, isolation).backward()
        with torch.no_grad():  # SAM
            for parameter in model.parameters():
                parameter += 0.01 * parameter.grad
        optimizer.zero_grad()
        loss_of(model, isolation).backward()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_local_losses_that_a_scaler_does_not_scale_are_said(fused: bool) -> None:
    model = Net()
    isolation = isolated(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, isolation)).backward()
    with pytest.warns(LocalGradWarning, match=r"isolation.backward = lambda loss: scaler.scale\(loss\).backward\(\)"):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    isolation.backward = lambda loss: scaler.scale(loss).backward()
    scaler.scale(loss_of(model, isolation)).backward()
    scaler.step(optimizer)
    isolation.backward = None
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, isolation)).backward()
    scaler.step(optimizer)


def test_a_change_in_place_before_the_unit_that_momentum_copies_is_explained() -> None:
    model = Net(lambda layer, i, x: layer(F.relu_(x) if i == 1 else x))
    isolation = isolated(model, momentum=man())
    with pytest.raises(RuntimeError, match="in-place") as caught:
        loss_of(model, isolation)
    assert "between the cut 'layers.0' and 'layers.1.0', which momentum copies" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="at least 1D") as other:
        model(torch.zeros(()))
    assert not hasattr(other.value, "__notes__")


def test_training_in_evaluation_mode_is_said() -> None:
    model = Net().eval()  # as from_pretrained returns it
    isolation = isolated(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    loss_of(model, isolation).backward()
    optimizer.step()
    with pytest.warns(LocalGradWarning, match=r"evaluation mode.*call model.train\(\) first"):
        loss_of(model, isolation)


def test_evaluations_between_steps_and_after_loading_are_right() -> None:
    model = Net()
    isolation = isolated(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    for _ in range(2):
        loss_of(model.train(), isolation).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()(INPUTS)
    model.load_state_dict(Net().state_dict())
    model(INPUTS)


def test_an_input_that_a_local_loss_trains_is_said() -> None:
    model, before = Net(), nn.Linear(8, 8)
    isolation = isolated(model)
    with pytest.warns(LocalGradWarning, match=r"an input of the isolated model requires a gradient.*Detach the input"):
        loss_of(model, isolation, before(INPUTS)).backward()
    model.zero_grad()
    loss_of(model, isolation, before(INPUTS).detach()).backward()


def test_an_input_that_only_the_last_block_reads_gets_its_gradient_as_usual() -> None:
    class Conditioned(Net):
        def forward(self, inputs: Tensor, shift: Tensor | None = None) -> Tensor:
            features = super().forward(inputs)
            return features if shift is None else features + shift

    model, shift = Conditioned(), torch.zeros(5, requires_grad=True)
    isolation = isolated(model)
    isolation.targets = TARGETS
    F.cross_entropy(model(INPUTS, shift), TARGETS).backward()
    assert torch.allclose(shift.grad, model.head.bias.grad)


class Pair(nn.Module):
    """Returns features and a second tensor, which carries a sum along."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.first(given[0]) + given[1])
        return features, given[1] + self.second(features)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Pair() for _ in range(4)), nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        given = inputs, torch.zeros_like(inputs)
        for layer in self.layers:
            given = layer(given)
        return self.head(given[0] + given[1])


def test_weights_that_no_local_loss_reaches_are_named() -> None:
    with pytest.warns(LocalGradWarning) as said:
        isolation = isolated(Pairs())
    named = [str(each.message).split(",")[0] for each in said]
    assert named == [f"no local loss reaches layers.{i}.second.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    frozen = Pairs()
    for index in (0, 2):
        frozen.layers[index].second.requires_grad_(False)
    assert isolated(frozen).cuts == isolation.cuts  # nothing to say


def add_layer(model: Net) -> None:
    model.layers.append(nn.Linear(8, 8))


def add_dropout(model: Net) -> None:
    model.layers.append(nn.Dropout(0.0))


def add_parameter(model: Net) -> None:
    model.layers[1].register_parameter("scale", nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize(("change", "name"), [(add_layer, "layers.4"), (add_parameter, "layers.1.scale")])
def test_what_is_added_afterwards_is_refused(change: Callable[[Net], None], name: str) -> None:
    model = Net()
    isolation = isolated(model)
    change(model)
    with pytest.raises(LocalGradError, match=f"'{name}' was added after isolate"):
        loss_of(model, isolation)


def test_a_layer_without_parameters_may_be_added() -> None:
    model = Net()
    isolation = isolated(model)
    add_dropout(model)
    loss_of(model, isolation).backward()


def test_a_model_around_an_isolated_one_is_refused() -> None:
    model = Net()
    isolation = isolated(model)
    whole = nn.Sequential(model, nn.Linear(5, 5))
    with pytest.raises(LocalGradError, match=r"the Net inside the model .*remove\(\)"):
        isolate(whole, ["0"], objective=HEAD, example=INPUTS)
    isolation.remove()
    isolate(whole, ["0"], objective=HEAD, example=INPUTS)


def test_reentrant_checkpointing_is_refused() -> None:
    """It would train nothing: the input of a block requires no gradient."""
    model = Net(lambda layer, i, x: checkpoint(layer, x, use_reentrant=True) if i % 2 else layer(x))
    with pytest.raises(LocalGradError, match=r"use_reentrant=False, or isolate\(..., recompute=True\)"):
        isolated(model)


def test_checkpointing_of_the_unit_that_momentum_copies_is_refused() -> None:
    def call(layer: nn.Module, index: int, features: Tensor) -> Tensor:
        return checkpoint(layer, features, use_reentrant=False) if index % 2 else layer(features)

    with pytest.raises(LocalGradError, match=r"cut 'layers\.0' .*momentum=None"):
        isolated(Net(call), momentum=man())
    model, plain = Net(call), Net()
    isolation = isolated(model)
    other = isolated(plain)
    other.load_state_dict(isolation.state_dict())
    found, expected = gradients_of(model, isolation), gradients_of(plain, other)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_layer_that_the_example_skipped_is_trained_by_its_own_block() -> None:
    skipped = {1}
    model, plain = Net(lambda layer, i, x: x if i in skipped else layer(x)), Net()
    isolation, other = isolated(model), isolated(plain)
    other.load_state_dict(isolation.state_dict())
    skipped.clear()
    for block in range(3):
        found, expected = isolation.trainable_parameters(block), other.trainable_parameters(block)
        assert [p.shape for p in found] == [p.shape for p in expected]
    loss = loss_of(model, isolation)
    model.zero_grad()  # drops no gradient of this batch
    loss.backward()
    expected = gradients_of(plain, other)
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), expected, strict=True))


def test_a_layer_that_runs_in_another_block_than_in_the_example_keeps_its_gradient() -> None:
    order = [0, 1, 2, 3]
    model = Net()
    model.call = lambda _, index, features: model.layers[order[index]](features)
    isolation = isolated(model)
    order[1], order[3] = 3, 1
    loss = loss_of(model, isolation)
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["vmap", "detach"])
def test_features_without_a_gradient_are_refused(kind: str) -> None:
    model = Net()
    isolation = isolate(model, ["layers.0.1", "layers.2.1"], objective=HEAD, example=INPUTS)
    run = torch.func.vmap(model) if kind == "vmap" else model
    if kind == "detach":
        model.layers[0][0].register_forward_hook(lambda module, args, output: output.detach())
    isolation.targets = TARGETS
    with pytest.raises(LocalGradError, match=r"features of block 1 \(to layers.0.1\) require no gradient, but"):
        run(INPUTS[:, None] if kind == "vmap" else INPUTS)


def test_an_isolated_model_may_be_pickled() -> None:
    model = Net()
    isolation = isolated(model, momentum=man())
    again, other = pickle.loads(pickle.dumps((model, isolation)))
    found, expected = gradients_of(again, other), gradients_of(model, isolation)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(LocalGradError, match="block is 7: there are 3 blocks, 0 to 2"):
        isolated(Net()).trainable_parameters(7)


def test_a_buffer_with_a_graph_is_named() -> None:
    class Centred(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("centre", torch.zeros(8))

        def forward(self, inputs: Tensor) -> Tensor:
            output = super().forward(inputs)
            self.centre = 0.9 * self.centre + 0.1 * output.mean(0)
            return output - self.centre

    model = Net()
    model.layers[0] = Centred()
    isolation = isolated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(model, isolation).backward()
        with pytest.raises(LocalGradError, match=r"'layers\.0\.centre'"):
            loss_of(model, isolation)
