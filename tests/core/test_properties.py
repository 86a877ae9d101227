"""What holds for any chain of layers, any cuts, any objective and any momentum."""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.runs import few
from localgrad import Block, LocalGradError, classifier, dgl, infopro, local_step, man, manpp, predsim, split, units

torch.set_num_threads(1)

CLASSES, BATCH, SIZE = 3, 4, 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@dataclass
class Case:
    """A description that Hypothesis can shrink and print; `model()` builds it anew with the same weights."""

    layers: list[tuple[int, bool, str, bool]]  # width, batch norm, activation, pooling
    hidden: list[int]  # widths of linear layers before the last
    nested: bool  # each group of layers in a Sequential of its own, or all in one row
    seed: int

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        groups: list[list[nn.Module]] = []
        width, size = 3, SIZE
        for out, norm, activation, pool in self.layers:
            group: list[nn.Module] = [nn.Conv2d(width, out, 3, padding=1, bias=not norm)]
            if norm:
                group.append(nn.BatchNorm2d(out))
            if activation != "none":
                group.append({"relu": nn.ReLU(), "in place": nn.ReLU(inplace=True), "tanh": nn.Tanh()}[activation])
            if pool and size > 2:
                group.append(nn.MaxPool2d(2))
                size //= 2
            groups.append(group)
            width = out
        groups.append([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        for out in self.hidden:
            groups[-1] += [nn.Linear(width, out), nn.ReLU(inplace=True)]
            groups.append([])
            width = out
        groups[-1].append(nn.Linear(width, CLASSES))
        if self.nested:
            return nn.Sequential(*(nn.Sequential(*group) for group in groups))
        return nn.Sequential(*functools.reduce(operator.add, groups))

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        pixels = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (pixels - mean) / std, torch.randint(CLASSES, (BATCH,), generator=generator)


cases = st.builds(
    Case,
    st.lists(
        st.tuples(
            st.integers(1, 6), st.booleans(), st.sampled_from(["none", "relu", "in place", "tanh"]), st.booleans()
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.integers(1, 6), max_size=2),
    st.booleans(),
    st.integers(0, 1000),
)
OBJECTIVES: dict[str, Any] = {
    "classifier": classifier(CLASSES),
    "predsim": predsim(CLASSES, max_features=16),
    "dgl original": dgl(CLASSES, "original"),
    "dgl compact": dgl(CLASSES, "compact"),
    "dgl wide": dgl(CLASSES, "wide"),
    "infopro": infopro(CLASSES, MEAN, STD, reconstruction=(5.0, 1.0), feature_dim=8),
    "infopro contrast": infopro(CLASSES, MEAN, STD, (5.0, 0.0), (0.5, 1.0), "contrast", "2c2f", feature_dim=8),
}
MOMENTA: dict[str, Any] = {
    "none": None,
    "man": man(0.9),
    "man from random": man(0.9, initial="random"),
    "man recomputed": man(0.9, recompute=True),
    "man of depth 2": man(0.9, depth=2),
    "fused": man(0.9, form="fused"),
    "fused without bias": man(0.9, form="fused", bias=False),
    "EMA only": man(0.9, bias=False),
    "bias only": man(ema=False),
    "direct": man(0.0),
    "manpp": manpp(0.9),
}
objectives, momenta = st.sampled_from(sorted(OBJECTIVES)), st.sampled_from(sorted(MOMENTA))


def cut(case: Case, data: st.DataObject, objective: str, momentum: str) -> tuple[nn.Sequential, list[Block]]:
    """Blocks at random cuts; where the objective cannot sit at all of them, at those between maps."""
    model, example = case.model(), torch.empty(BATCH, 3, SIZE, SIZE)
    found = units(model, example)
    cuts = [unit.name for unit in found[:-1] if data.draw(st.booleans(), label=f"cut after {unit.name}")]
    make = functools.partial(split, model, example, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum])
    try:
        blocks = make(cuts=cuts)
    except LocalGradError as error:
        event("refused")
        assert "infopro" in objective  # it needs maps; all others sit on whatever a chain gives
        assert "infopro" in str(error)
        auxiliary = MOMENTA[momentum] is not None  # then the features are those of the next unit
        after = [*found[1:], found[-1]] if auxiliary else found
        maps = {unit.name for unit, reached in zip(found, after, strict=True) if len(reached.features) == 4}
        cuts = [name for name in cuts if name in maps] if "depth" not in momentum else []
        blocks = make(cuts=cuts)
    assert len(blocks) == len(cuts) + 1
    event(f"{len(blocks)} blocks")
    return model, blocks


def ema_parameters(block: Block) -> list[nn.Parameter]:
    """What only the average moves: frozen, unlike the fused form's single copy."""
    ema: Any = getattr(block.momentum, "ema", None)
    return [] if ema is None else [parameter for parameter in ema.parameters() if not parameter.requires_grad]


@few
@given(cases)
def test_units_compose_to_the_model_bit_for_bit(case: Case) -> None:
    model, (inputs, _) = case.model(), case.batch()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = units(model, torch.empty(BATCH, 3, SIZE, SIZE))
    assert {name: value.tolist() for name, value in kept.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    for mode in (True, False):
        model.train(mode)
        composed = functools.reduce(lambda x, unit: unit.module(x), found, inputs.clone())
        assert torch.equal(composed, model(inputs.clone()))
    assert [id(p) for unit in found for p in unit.module.parameters()] == [id(p) for p in model.parameters()]


@few
@given(cases, st.data(), st.sampled_from(["memory", "compute", "count"]), objectives, momenta)
def test_any_number_of_blocks_works_or_is_refused(
    case: Case, data: st.DataObject, balance: Any, objective: str, momentum: str
) -> None:
    model, example = case.model(), torch.empty(BATCH, 3, SIZE, SIZE)
    names = [unit.name for unit in units(model, example)]
    num_blocks = data.draw(st.integers(0, len(names) + 1), label="num_blocks")
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    make = functools.partial(split, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum], balance=balance)
    try:
        blocks = make(model, example, num_blocks=num_blocks)
    except LocalGradError as error:
        event("refused")
        if 1 <= num_blocks <= len(names):
            assert "infopro" in objective
            assert "infopro" in str(error)
        else:
            assert f"num_blocks is {num_blocks}" in str(error)
        return
    event(f"{num_blocks} of {len(names)} units")
    assert 1 <= num_blocks <= len(names)
    assert len(blocks) == num_blocks
    assert [name for block in blocks for name in block.names] == names
    assert all(block.names for block in blocks)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    losses = local_step(blocks, [torch.optim.SGD(b.trainable_parameters(), lr=0.01) for b in blocks], *case.batch())
    assert len(losses) == num_blocks
    assert all(math.isfinite(loss.item()) for loss in losses)


@few
@given(cases, st.data(), objectives, momenta)
def test_a_loss_leaves_no_gradient_outside_its_block(
    case: Case, data: st.DataObject, objective: str, momentum: str
) -> None:
    _, blocks = cut(case, data, objective, momentum)
    inputs, targets = case.batch()
    features, kept = inputs, inputs.clone()
    for block in blocks:
        for other in blocks:
            other.zero_grad(set_to_none=True)
        features, loss = block(features.detach(), targets, inputs)
        assert loss.shape == ()
        assert loss.isfinite()
        loss.backward()
        for other in blocks:
            if other is not block:
                assert all(parameter.grad is None for parameter in other.parameters())
            assert all(parameter.grad is None for parameter in ema_parameters(other))
        own = [parameter.grad for parameter in block.body.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in own)
    assert torch.equal(inputs, kept)
    twin = case.model()
    assert torch.equal(features, twin(inputs))


@few
@given(cases, st.data(), objectives, momenta)
def test_a_step_moves_every_trainable_parameter_by_its_gradient(
    case: Case, data: st.DataObject, objective: str, momentum: str
) -> None:
    lr = 0.25
    model, blocks = cut(case, data, objective, momentum)
    inputs, targets = case.batch()
    keys = list(model.state_dict())
    for block in blocks[:-1]:
        with torch.no_grad():
            for parameter in ema_parameters(block):
                parameter.add_(0.1)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=lr) for block in blocks]
    before = {id(p): p.detach().clone() for block in blocks for p in block.parameters()}
    gradients: dict[int, Tensor] = {}

    def remember(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            assert id(parameter) not in gradients  # stepped once a batch
            zero = torch.zeros_like(parameter)
            gradients[id(parameter)] = zero if parameter.grad is None else parameter.grad.clone()

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(remember)
    losses = local_step(blocks, optimizers, inputs, targets)
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
    covered = set(gradients)
    for block in blocks:
        pulled: dict[int, Tensor] = {}
        module: Any = block.momentum
        if module is not None and module.ema is not None:
            following = blocks[blocks.index(block) + 1]
            source = list(following.body.parameters())
            for parameter, target in zip(module.ema.parameters(), source, strict=False):
                pulled[id(parameter)] = before[id(target)]
        for parameter in block.parameters():
            key = id(parameter)
            expected = before[key].double()
            if key in gradients:
                assert gradients[key].isfinite().all()
                expected = expected - lr * gradients[key].double()
            if key in pulled:
                expected = module.decay * expected + (1 - module.decay) * pulled[key].double()
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
            if parameter.requires_grad:
                assert key in covered
            if key in gradients and key not in pulled and lr * gradients[key].abs().max() > 1e-4:
                assert not torch.equal(parameter, before[key])
    assert list(model.state_dict()) == keys
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@few
@given(cases, st.data(), objectives, momenta)
def test_three_steps_stay_finite_and_keep_the_model_whole(
    case: Case, data: st.DataObject, objective: str, momentum: str
) -> None:
    model, blocks = cut(case, data, objective, momentum)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    handed = [id(parameter) for block in blocks for parameter in block.trainable_parameters()]
    assert len(set(handed)) == len(handed)
    assert set(parameters) <= set(handed)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.01, momentum=0.9) for block in blocks]
    for _ in range(3):
        losses = local_step(blocks, optimizers, *case.batch())
        assert len(losses) == len(blocks)
        assert all(math.isfinite(loss.item()) for loss in losses)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        if name.endswith("num_batches_tracked"):
            assert value.item() == 3, name
    assert case.model().load_state_dict(model.state_dict()).missing_keys == []


@few
@given(cases, st.text(max_size=6), momenta)
def test_an_unknown_cut_is_refused_by_name(case: Case, name: str, momentum: str) -> None:
    model, example = case.model(), torch.empty(BATCH, 3, SIZE, SIZE)
    known = {unit.name for unit in units(model, example)} | {name for name, _ in model.named_modules()}
    if name in known:
        return
    with pytest.raises(LocalGradError) as raised:
        split(model, example, cuts=[name], objective=classifier(CLASSES), momentum=MOMENTA[momentum])
    assert repr(name) in str(raised.value)


@few
@given(
    cases,
    st.data(),
    objectives,
    momenta,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]),
)
def test_any_dtype_and_batch_size_trains_or_is_refused(
    case: Case,
    data: st.DataObject,
    objective: str,
    momentum: str,
    dtype: torch.dtype,
    size: int,
    given_dtype: torch.dtype,
) -> None:
    model = case.model().to(dtype)
    cuts = [unit.name for unit in units(model, torch.empty(BATCH, 3, SIZE, SIZE, dtype=dtype))[:-1]]
    cuts = [name for name in cuts if data.draw(st.booleans(), label=f"cut after {name}")]
    example = torch.empty(2, 3, SIZE, SIZE, dtype=dtype)
    make = functools.partial(split, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum], cuts=cuts)
    pixels, targets = case.batch()
    inputs = pixels.repeat(2, 1, 1, 1)[:size].to(given_dtype)
    try:
        blocks = make(model, example)
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.01) for block in blocks]
        losses = local_step(blocks, optimizers, inputs, targets.repeat(2)[:size])
    except LocalGradError as error:
        event("refused")
        assert "\n" not in str(error)
        averaged = MOMENTA[momentum] is not None and momentum not in ("bias only", "direct")
        assert given_dtype != dtype or size == 1 or "infopro" in objective or (averaged and dtype == torch.bfloat16)
        return
    event(f"{dtype}, {size}")
    assert given_dtype == dtype
    assert len(losses) == len(blocks)
    assert {parameter.dtype for block in blocks for parameter in block.parameters()} == {dtype}
    if size > 1 or not any(norm for _, norm, _, _ in case.layers):
        assert all(math.isfinite(loss.item()) for loss in losses)
