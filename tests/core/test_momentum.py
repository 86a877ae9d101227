"""Momentum auxiliary networks: the average, its timing, the two branches, and what must stay untouched.

The oracles are the formulas in float64 on copies of the weights, and autograd on a network written out by hand.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import Block, LocalGradError, classifier, local_step, man, manpp, split, units
from localgrad.models import cifar_resnet

torch.set_num_threads(1)

CLASSES = 3
BATCH = 6


class Unit(nn.Module):
    """Convolution, batch norm, ReLU, and dropout where a test asks for chance."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(self.conv(x))))


class StartsInPlace(nn.Module):
    """A unit before the convolution of which the features are overwritten."""

    def __init__(self, activation: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.activation(x)))


class LastChannels(nn.Module):
    """A unit of maps with channels last, as in Swin."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Permute(nn.Module):
    """Patches of two pixels, with channels last, as a map or as tokens."""

    def __init__(self, channels: int, tokens: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 2, 2)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return x.flatten(1, 2) if self.tokens else x


class MeanHead(nn.Module):
    def __init__(self, channels: int, tokens: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1) if self.tokens else x.mean((1, 2)))


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def chain(dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Three blocks of maps, of different widths, and a head; no weight or statistic at a neutral value."""
    torch.manual_seed(seed)
    model = nn.Sequential(Unit(3, 4), Unit(4, 6, 2, dropout), Unit(6, 5, 1, dropout), head(5))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, 6, 6, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def blocks_of(model: nn.Module, momentum: Any, cuts: Sequence[str] = ("0", "1", "2")) -> list[Block]:
    return split(model, torch.empty(2, 3, 6, 6), cuts=cuts, objective=classifier(CLASSES), momentum=momentum)


def sgd(blocks: list[Block], lr: float = 0.5, **settings: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(block.trainable_parameters(), lr=lr, **settings) for block in blocks]


def aux(block: Block) -> Any:
    assert block.momentum is not None
    return block.momentum


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def source_values(model: nn.Sequential) -> list[list[Tensor]]:
    """What the EMA of block j follows: the parameters of child j + 1."""
    return [values(child) for child in list(model)[1:]]


def norm_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm by the formula, with the biased variance of the batch."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def unit_of(x: Tensor, parameters: Sequence[Tensor], stride: int = 2) -> Tensor:
    """`Unit` written out, on its parameters in order."""
    weight, bias, scale, shift = parameters
    return norm_of(F.conv2d(x, weight, bias, stride, 1), scale, shift).clamp(min=0)


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def built(factory: Callable[..., Any], **settings: Any) -> tuple[Any, nn.Module]:
    """A momentum module before the second unit of the chain, all three sets of weights different, and that unit."""
    model = chain()
    found = units(model, torch.empty(2, 3, 6, 6))
    torch.manual_seed(5)
    module = factory(**settings)(found[1:])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return module, model[1]


FACTORIES: dict[str, Callable[..., Any]] = {"man": man, "manpp": manpp, "fused": functools.partial(man, form="fused")}


# The average.


@pytest.mark.parametrize("factory", [man, manpp])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.995, 1.0])
def test_the_average_follows_the_weights_that_the_batch_began_with(decay: float, factory: Callable[..., Any]) -> None:
    model = chain()
    blocks = blocks_of(model, factory(decay, initial="random"))
    optimizers = sgd(blocks)
    for step in range(3):
        before, sources = [values(aux(block).ema) for block in blocks[:-1]], source_values(model)
        local_step(blocks, optimizers, *batch(step))
        for block, old, source, now in zip(blocks[:-1], before, sources, source_values(model), strict=True):
            found = values(aux(block).ema)
            assert any(not torch.equal(a, b) for a, b in zip(source, now, strict=True))  # the next block did move
            if decay == 0:
                assert all(torch.equal(a, b) for a, b in zip(found, source, strict=True))
            if decay == 1:
                assert all(torch.equal(a, b) for a, b in zip(found, old, strict=True))
            for e, s, a in zip(double(old), double(source), double(found), strict=True):
                torch.testing.assert_close(a, decay * e + (1 - decay) * s, rtol=1e-6, atol=1e-6)


def test_the_average_of_a_frozen_source_converges_at_rate_m_to_the_t() -> None:
    decay, steps = 0.8, 12
    module, source = built(man, decay=decay)
    start = [e - s for e, s in zip(double(values(module.ema)), double(values(source)), strict=True)]
    for step in range(1, steps + 1):
        module.update()
        for e, s, gap in zip(double(values(module.ema)), double(values(source)), start, strict=True):
            torch.testing.assert_close(e - s, decay**step * gap, rtol=0, atol=1e-6)


def test_updating_changes_neither_the_source_nor_the_trained_branch() -> None:
    module, source = built(manpp, decay=0.5)
    kept = values(source), values(module.bias), module.scale.item()
    module.update()
    assert all(torch.equal(a, b) for a, b in zip(kept[0], values(source), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[1], values(module.bias), strict=True))
    assert module.scale.item() == kept[2]


def test_the_average_is_one_step_behind_at_decay_0() -> None:
    model = chain()
    blocks = blocks_of(model, man(0.0))
    optimizers = sgd(blocks)
    for step in range(2):
        local_step(blocks, optimizers, *batch(step))
        for block, source in zip(blocks[:-1], source_values(model), strict=True):
            assert not torch.equal(next(aux(block).ema.parameters()), source[0])


def test_the_default_decay_is_that_of_the_paper() -> None:
    assert built(man)[0].decay == 0.995
    assert built(manpp)[0].decay == 0.995


def test_the_source_is_followed_after_its_weights_were_loaded() -> None:
    model = chain()
    blocks = blocks_of(model, man(0.0))
    model.load_state_dict(chain(seed=7).state_dict())
    blocks[0].update_momentum()
    assert all(torch.equal(a, b) for a, b in zip(values(aux(blocks[0]).ema), values(model[1]), strict=True))


# The branches.


def test_man_sums_the_two_branches() -> None:
    module, source = built(man)
    h = torch.randn(BATCH, 4, 6, 6)
    expected = unit_of(h.double(), double(values(module.bias))) + unit_of(h.double(), double(values(module.ema)))
    torch.testing.assert_close(module(h).double(), expected, rtol=0, atol=5e-6)
    assert not torch.allclose(expected, 2 * unit_of(h.double(), double(values(source))), atol=1e-3)
    assert module.scale is None


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_manpp_weighs_them_by_s_and_2_minus_s(scale: float) -> None:
    module, _ = built(manpp)
    h = torch.randn(BATCH, 4, 6, 6)
    with torch.no_grad():
        module.scale.fill_(scale)
    trained, averaged = (unit_of(h.double(), double(values(branch))) for branch in (module.bias, module.ema))
    torch.testing.assert_close(module(h).double(), scale * trained + (2 - scale) * averaged, rtol=0, atol=1e-5)
    weights = torch.randn(BATCH, 6, 3, 3)
    (module(h) * weights).sum().backward()
    expected = (weights.double() * (trained - averaged)).sum()  # dy/ds = bias(h) - ema(h)
    assert module.scale.grad.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_manpp_starts_at_scale_1_and_so_at_the_sum() -> None:
    found = units(chain(), torch.empty(2, 3, 6, 6))
    first, second = manpp()(found[1:]), man()(found[1:])
    assert first.scale.numel() == 1
    assert first.scale.item() == 1.0
    h = torch.randn(BATCH, 4, 6, 6)
    torch.testing.assert_close(first(h), second(h), rtol=0, atol=1e-5)


def test_scale_is_trained_and_weight_decayed() -> None:
    blocks = blocks_of(chain(), manpp(initial="random"))
    scale, lr, weight_decay = aux(blocks[0]).scale, 0.25, 0.1
    assert any(scale is parameter for parameter in blocks[0].trainable_parameters())
    inputs, targets = batch()
    blocks[0](inputs, targets, inputs)[1].backward()
    gradient = scale.grad.item()
    blocks[0].zero_grad()
    assert gradient != 0
    local_step(blocks, sgd(blocks, lr, weight_decay=weight_decay), inputs, targets)
    assert scale.item() == pytest.approx(1 - lr * (gradient + weight_decay), rel=1e-5)


def test_the_trained_branch_takes_plain_gradient_steps() -> None:
    blocks = blocks_of(chain(), man(0.5, initial="random"))
    inputs, targets = batch()
    branch = aux(blocks[0]).bias
    before = values(branch)
    twin = copy.deepcopy(blocks[0])
    twin(inputs, targets, inputs)[1].backward()
    gradients = [parameter.grad.clone() for parameter in aux(twin).bias.parameters()]
    local_step(blocks, sgd(blocks, 0.5), inputs, targets)
    for now, old, gradient in zip(values(branch), before, gradients, strict=True):
        torch.testing.assert_close(now, old - 0.5 * gradient, rtol=0, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


# The fused form.


def test_fused_adds_a_bias_a_channel_initially_0_to_the_copied_unit() -> None:
    found = units(chain(), torch.empty(2, 3, 6, 6))
    module: Any = man(form="fused")(found[1:])
    assert isinstance(module.bias, nn.Parameter)
    assert module.bias.numel() == 6
    assert module.bias.abs().max() == 0
    h, offsets = torch.randn(BATCH, 4, 6, 6), torch.arange(6.0) - 2
    with torch.no_grad():
        module.bias.copy_(offsets.view_as(module.bias))
        for norm in (module.ema.norm, found[1].module.norm):  # training reads the batch's statistics, not these
            norm.running_mean.fill_(3.0)
            norm.running_var.fill_(4.0)
    expected = unit_of(h.double(), double(values(module.ema))) + offsets.double().view(1, 6, 1, 1)
    torch.testing.assert_close(module(h).double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("outputs", [5, 3])  # 3 is also the height and width: only the layout tells which is which
def test_fused_bias_goes_along_the_last_dimension_where_channels_are_last(outputs: int, tokens: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Permute(4, tokens), LastChannels(4, outputs), LastChannels(outputs, 4), MeanHead(4, tokens))
    found = units(model, torch.empty(2, 3, 6, 6))
    assert [unit.name for unit in found] == ["0", "1", "2", "3"]
    module: Any = man(form="fused")(found[1:])
    assert module.bias.numel() == outputs
    h = torch.randn((2, 9, 4) if tokens else (2, 3, 3, 4))
    plain, offsets = module(h), torch.arange(1.0, outputs + 1)
    with torch.no_grad():
        module.bias.copy_(offsets.view_as(module.bias))
    added = module(h) - plain
    for channel in range(outputs):
        torch.testing.assert_close(added[..., channel], torch.full_like(added[..., channel], channel + 1.0))
    blocks = split(
        model, torch.empty(2, 3, 6, 6), cuts=["0", "1"], objective=classifier(CLASSES), momentum=man(form="fused")
    )
    assert all(loss.isfinite() for loss in local_step(blocks, sgd(blocks), *batch()))


def test_fused_takes_the_gradient_step_and_is_then_pulled() -> None:
    decay, lr = 0.7, 0.5
    model = chain()
    blocks = blocks_of(model, man(decay, form="fused"))
    with torch.no_grad():
        for parameter in aux(blocks[0]).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    inputs, targets = batch()
    twin = copy.deepcopy(blocks[0])
    twin(inputs, targets, inputs)[1].backward()
    gradients = [parameter.grad.clone() for parameter in aux(twin).ema.parameters()]
    before, source, offset = values(aux(blocks[0]).ema), values(model[1]), aux(blocks[0]).bias.detach().clone()
    local_step(blocks, sgd(blocks, lr), inputs, targets)
    for now, old, gradient, s in zip(
        double(values(aux(blocks[0]).ema)), double(before), double(gradients), double(source), strict=True
    ):
        torch.testing.assert_close(now, decay * (old - lr * gradient) + (1 - decay) * s, rtol=0, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    moved = aux(blocks[0]).bias.detach()  # no average pulls the bias
    torch.testing.assert_close(moved, offset - lr * aux(twin).bias.grad, rtol=0, atol=1e-5)
    assert not torch.equal(moved, offset)


def test_fused_trains_all_its_parts_with_the_block() -> None:
    blocks = blocks_of(chain(), man(form="fused"))
    handed = {id(parameter) for parameter in blocks[0].trainable_parameters()}
    assert {id(parameter) for parameter in aux(blocks[0]).parameters()} <= handed
    assert blocks_of(chain(), man(form="fused", bias=False))[0].momentum is not None


def test_fused_without_bias_is_the_copied_unit() -> None:
    module, _ = built(man, form="fused", bias=False)
    h = torch.randn(BATCH, 4, 6, 6)
    assert module.bias is None
    torch.testing.assert_close(module(h).double(), unit_of(h.double(), double(values(module.ema))), rtol=0, atol=5e-6)
    assert all(parameter.requires_grad for parameter in module.ema.parameters())


# The rows of the ablation.


def test_bias_only_is_one_trained_unit_that_nothing_pulls() -> None:
    model = chain()
    blocks = blocks_of(model, man(0.0, ema=False, initial="random"))
    module = aux(blocks[0])
    h = torch.randn(BATCH, 4, 6, 6)
    assert module.ema is None
    torch.testing.assert_close(module(h).double(), unit_of(h.double(), double(values(module.bias))), rtol=0, atol=5e-6)
    before = values(module.bias)
    blocks[0].update_momentum()
    assert all(torch.equal(a, b) for a, b in zip(before, values(module.bias), strict=True))
    local_step(blocks, sgd(blocks), *batch())
    assert not any(torch.equal(a, b) for a, b in zip(before, values(module.bias), strict=True) if a.dim() > 1)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_ema_only_trains_nothing_of_its_own() -> None:
    blocks = blocks_of(chain(), man(0.9, bias=False, initial="random"))
    module = aux(blocks[0])
    h = torch.randn(BATCH, 4, 6, 6)
    assert module.bias is None
    torch.testing.assert_close(module(h).double(), unit_of(h.double(), double(values(module.ema))), rtol=0, atol=5e-6)
    handed = {id(parameter) for parameter in blocks[0].trainable_parameters()}
    assert not handed & {id(parameter) for parameter in module.parameters()}
    assert handed == {id(p) for p in itertools.chain(blocks[0].body.parameters(), blocks[0].objective.parameters())}


def test_the_last_block_and_one_block_alone_have_no_momentum() -> None:
    assert blocks_of(chain(), man())[-1].momentum is None
    assert [block.momentum for block in blocks_of(chain(), man(), cuts=())] == [None]
    assert all(block.momentum is None for block in blocks_of(chain(), None))


# Initial values.


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_copies_start_from_the_next_unit_in_memory_of_their_own(factory: Callable[..., Any]) -> None:
    model = chain()
    for child, block in zip(list(model)[1:], blocks_of(model, factory()), strict=False):
        module = aux(block)
        branches = [branch for branch in (module.bias, module.ema) if isinstance(branch, nn.Module)]
        assert branches
        for branch in branches:
            for parameter, source in zip(branch.parameters(), child.parameters(), strict=True):
                assert torch.equal(parameter, source)
        own = [parameter.data_ptr() for parameter in module.parameters()]
        assert len(set(own)) == len(own)
        assert not set(own) & {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_random_initial_values_are_independent_draws(factory: Callable[..., Any]) -> None:
    model = chain()
    kept = copy.deepcopy(model.state_dict())
    for child, block in zip(list(model)[1:], blocks_of(model, factory(initial="random")), strict=False):
        module = aux(block)
        branches = [child, *(branch for branch in (module.bias, module.ema) if isinstance(branch, nn.Module))]
        for first, second in itertools.combinations(branches, 2):
            pairs = zip(first.parameters(), second.parameters(), strict=True)
            assert not any(torch.equal(a, b) for a, b in pairs if a.dim() > 1)
        for branch in branches[1:]:
            for norm in branch.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    assert (norm.weight == 1).all()
                    assert (norm.bias == 0).all()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


class Attention(nn.Module):
    """Patches or tokens to tokens; its attention has a weight that no linear layer holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def test_random_initial_values_reach_the_weights_of_attention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Permute(4, True), Attention(4), MeanHead(4, True))
    module = aux(blocks_of(model, man(initial="random"), cuts=["0"])[0])
    for first, second in itertools.combinations((model[1], module.bias, module.ema), 2):
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
            assert a.dim() == 1 or not torch.equal(a, b), name


def test_random_initial_values_come_from_the_global_generator() -> None:
    def drawn() -> list[Tensor]:
        model = chain()
        torch.manual_seed(11)
        return values(aux(blocks_of(model, man(initial="random"))[0]))

    assert all(torch.equal(a, b) for a, b in zip(drawn(), drawn(), strict=True))


def test_copies_have_the_dtype_of_the_next_unit() -> None:
    model = chain().double()
    example = torch.empty(2, 3, 6, 6, dtype=torch.float64)
    blocks = split(model, example, cuts=["0", "1"], objective=classifier(CLASSES), momentum=manpp())
    assert {parameter.dtype for block in blocks for parameter in block.parameters()} == {torch.float64}
    inputs, targets = batch()
    local_step(blocks, sgd(blocks), inputs.double(), targets)


# Buffers.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_norms_of_branches_and_next_unit_keep_statistics_of_their_own(
    factory: Callable[..., Any], recompute: bool
) -> None:
    model = chain()
    blocks = blocks_of(model, factory(0.5, initial="random", recompute=recompute))
    optimizers, steps = sgd(blocks, 0.05), 3
    module = aux(blocks[0])
    branches = [branch for branch in (module.bias, module.ema, model[1]) if isinstance(branch, nn.Module)]
    expected = [(branch.norm.running_mean.double(), branch.norm.running_var.double()) for branch in branches]
    counts = [branch.norm.num_batches_tracked.item() for branch in branches]
    for step in range(steps):
        inputs, targets = batch(step)
        with torch.no_grad():
            h = unit_of(inputs.double(), double(values(model[0])), 1)
        for index, branch in enumerate(branches):
            y = F.conv2d(h, *double(values(branch)[:2]), 2, 1)
            n = y.numel() / y.shape[1]
            mean, variance = expected[index]
            variance = 0.9 * variance + 0.1 * y.var((0, 2, 3), correction=0) * n / (n - 1)
            expected[index] = 0.9 * mean + 0.1 * y.mean((0, 2, 3)), variance
        local_step(blocks, optimizers, inputs, targets)
    for branch, (mean, variance), start in zip(branches, expected, counts, strict=True):
        torch.testing.assert_close(branch.norm.running_mean.double(), mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(branch.norm.running_var.double(), variance, rtol=0, atol=1e-5)
        assert branch.norm.num_batches_tracked.item() == start + steps
    for first, second in itertools.combinations(branches, 2):
        assert not torch.allclose(first.norm.running_mean, second.norm.running_mean, atol=1e-4)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_updating_leaves_buffers_alone(decay: float, factory: Callable[..., Any]) -> None:
    module, source = built(factory, decay=decay)
    with torch.no_grad():
        source.norm.running_mean.fill_(3.0)
        source.norm.running_var.fill_(4.0)
        source.norm.num_batches_tracked.fill_(17)
    kept = {name: value.clone() for name, value in module.named_buffers()}
    module.update()
    assert kept
    assert all(torch.equal(kept[name], value) for name, value in module.named_buffers())


# Recomputation.


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_recomputing_gives_the_same_bits(factory: Callable[..., Any]) -> None:
    results = []
    for recompute in (False, True):
        model = chain(dropout=0.4)
        blocks = blocks_of(model, factory(0.5, recompute=recompute))
        optimizers = sgd(blocks, 0.1, momentum=0.9)
        torch.manual_seed(3)
        losses = [local_step(blocks, optimizers, *batch(step)) for step in range(3)]
        state = [value.clone() for block in blocks for value in block.state_dict().values()]
        results.append(([loss for step in losses for loss in step], state, torch.rand(1)))
    for first, second in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(results[0][2], results[1][2])  # the same chance was used up


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_recomputing_runs_the_branches_again_in_the_backward_pass(factory: Callable[..., Any], recompute: bool) -> None:
    module, _ = built(factory, recompute=recompute)
    calls: list[int] = []
    module.ema.register_forward_pre_hook(lambda *_: calls.append(1))
    h = torch.randn(BATCH, 4, 6, 6, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(h)
    assert len(calls) == 1
    kept = sum(saved)
    y.square().sum().backward()
    assert len(calls) == 1 + recompute
    assert h.grad is not None
    if recompute:
        module.recompute = False
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(h)
        assert kept < sum(saved) * (0.5 if module.scale is None else 1)  # the scale needs what both branches gave


# Gradients.


def test_gradient_flows_through_the_average_into_the_features_but_not_into_its_weights() -> None:
    module, source = built(man, bias=False)
    h, weights = torch.randn(BATCH, 4, 6, 6, requires_grad=True), torch.randn(BATCH, 6, 3, 3)
    (module(h) * weights).sum().backward()
    twin = h.detach().double().requires_grad_()
    (unit_of(twin, double(values(module.ema))) * weights).sum().backward()
    assert h.grad is not None
    assert twin.grad is not None
    assert twin.grad.abs().max() > 0.1
    torch.testing.assert_close(h.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.ema.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in source.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_man_are_those_of_the_sum(recompute: bool) -> None:
    module, source = built(manpp, recompute=recompute)
    h, weights = torch.randn(BATCH, 4, 6, 6, requires_grad=True), torch.randn(BATCH, 6, 3, 3)
    (module(h) * weights).sum().backward()
    twin = h.detach().double().requires_grad_()
    trained = [parameter.requires_grad_() for parameter in double(values(module.bias))]
    scale = module.scale.detach().double()
    y = scale * unit_of(twin, trained) + (2 - scale) * unit_of(twin, double(values(module.ema)))
    (y * weights).sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)
    for parameter, expected in zip(module.bias.parameters(), trained, strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=2e-4)
    assert all(parameter.grad is None for parameter in module.ema.parameters())
    assert all(parameter.grad is None for parameter in source.parameters())


def test_a_local_loss_leaves_the_next_block_without_gradient() -> None:
    blocks = blocks_of(chain(), man())
    inputs, targets = batch()
    features, loss = blocks[0](inputs, targets, inputs)
    loss.backward()
    assert all(parameter.grad is None for block in blocks[1:] for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in aux(blocks[0]).ema.parameters())
    assert torch.equal(features, chain()[0](inputs))


def test_weight_decay_does_not_reach_the_average() -> None:
    blocks = blocks_of(chain(), man(1.0))
    before = values(aux(blocks[0]).ema)
    local_step(blocks, sgd(blocks, 0.5, weight_decay=0.5, momentum=0.9), *batch())
    assert all(torch.equal(a, b) for a, b in zip(before, values(aux(blocks[0]).ema), strict=True))


# Ownership.


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_the_next_unit_is_no_part_of_the_momentum_module(factory: Callable[..., Any]) -> None:
    model = chain()
    blocks = blocks_of(model, factory())
    for index, block in enumerate(blocks[:-1]):
        foreign = {id(parameter) for other in blocks[index + 1 :] for parameter in other.body.parameters()}
        assert not foreign & {id(parameter) for parameter in block.parameters()}
        assert not foreign & {id(parameter) for parameter in block.trainable_parameters()}
        own = {value.data_ptr() for value in aux(block).state_dict().values()}
        assert not own & {value.data_ptr() for value in model.state_dict().values()}
        assert {name.split(".")[0] for name in aux(block).state_dict()} <= {"bias", "ema", "scale"}
    assert set(model.state_dict()) == set(chain().state_dict())


# Depth.


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_depth_2_copies_two_units(factory: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Unit(3, 4), Unit(4, 6, 2), Unit(6, 5), Unit(5, 5), head(5))
    blocks = blocks_of(model, factory(0.25, depth=2, initial="random"), cuts=["0"])
    module = aux(blocks[0])
    h = torch.randn(BATCH, 4, 6, 6)
    branches = [branch for branch in (module.bias, module.ema) if isinstance(branch, nn.Module)]
    expected = torch.zeros(BATCH, 5, 3, 3, dtype=torch.float64)
    for branch in branches:
        parameters = double(values(branch))
        assert len(parameters) == 8
        expected = expected + unit_of(unit_of(h.double(), parameters[:4]), parameters[4:], 1)
    torch.testing.assert_close(module(h).double(), expected, rtol=0, atol=2e-5)
    before, source = values(module.ema), [*values(model[1]), *values(model[2])]
    blocks[0].update_momentum()
    for e, s, now in zip(double(before), double(source), double(values(module.ema)), strict=True):
        torch.testing.assert_close(now, 0.25 * e + 0.75 * s, rtol=1e-6, atol=1e-6)
    assert all(loss.isfinite() for loss in local_step(blocks, sgd(blocks, 0.05), *batch()))


def test_depth_stops_at_the_end_of_the_next_block_and_before_the_head() -> None:
    model = chain()
    blocks = blocks_of(model, man(depth=9), cuts=["0", "1"])
    assert len(values(aux(blocks[0]).bias)) == len(values(model[1]))
    assert len(values(aux(blocks[1]).bias)) == len(values(model[2]))
    alone = blocks_of(model, man(depth=9))[2]  # nothing but the head follows
    assert len(values(aux(alone).bias)) == len(values(model[3]))


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_next_unit_without_parameters_works_or_is_refused(factory: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), head(4))
    make = functools.partial(split, model, torch.empty(2, 3, 6, 6), names=["0", "1", "2", "3"], cuts=["0"])
    try:
        blocks = make(objective=classifier(CLASSES), momentum=factory())
        losses = local_step(blocks, sgd(blocks), *batch())
    except LocalGradError as error:
        assert "1" in str(error)
    else:
        assert all(loss.isfinite() for loss in losses)


# Units that write to their input.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("activation", [nn.ReLU, functools.partial(nn.Dropout, 0.5)], ids=["relu", "dropout"])
def test_a_unit_that_starts_in_place_does_not_spoil_the_features(
    activation: Callable[[bool], nn.Module], factory: Callable[..., Any], recompute: bool
) -> None:
    def model_of(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        second, third = (StartsInPlace(activation(inplace), *widths) for widths in ((4, 6), (6, 5)))
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), second, third, head(5))

    results = []
    for inplace in (True, False):
        model = model_of(inplace)
        blocks = blocks_of(model, factory(0.5, recompute=recompute))
        inputs, targets = batch()
        expected = model[0](inputs).detach()
        assert (expected < 0).any()
        torch.manual_seed(4)
        features, loss = blocks[0](inputs, targets, inputs)
        assert torch.equal(features.detach(), expected)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in blocks[0].body.parameters()]
        h = torch.randn(BATCH, 4, 6, 6)
        kept = h.clone()
        assert aux(blocks[0])(h).shape == (BATCH, 6, 3, 3)
        assert torch.equal(h, kept)
        blocks[0].zero_grad()
        losses = local_step(blocks, sgd(blocks, 0.1), inputs, targets)
        results.append([features.detach(), loss.detach(), *gradients, *losses, *values(model)])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factory", [man, manpp])
def test_both_branches_see_the_features_before_an_activation_in_place(factory: Callable[..., Any]) -> None:
    """ELU applied twice is not ELU: a second branch that reads what the first one wrote is off."""
    torch.manual_seed(0)
    second = StartsInPlace(nn.ELU(inplace=True), 4, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), second, head(6))
    module = aux(blocks_of(model, factory(initial="random"), cuts=["0"])[0])
    h = torch.randn(BATCH, 4, 6, 6) - 1
    expected = torch.zeros(BATCH, 6, 3, 3)
    for branch in (module.bias, module.ema):
        weight, bias, scale, shift = values(branch)
        expected = expected + norm_of(F.conv2d(F.elu(h), weight, bias, 2, 1), scale, shift)
    torch.testing.assert_close(module(h.clone()), expected, rtol=0, atol=1e-5)


# Sizes.

R32_K8 = ["1.0", "1.2", "1.4", "2.1", "2.3", "3.0", "3.2"]
R32_K16 = [f"{stage}.{unit}" for stage in (1, 2, 3) for unit in range(5)][:-1]
R110_ALL = [f"{stage}.{unit}" for stage in (1, 2, 3) for unit in range(18)][:-1]
ELEVEN = (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)
R110_K32 = [
    *(f"{stage}.{unit}" for stage in (1, 2) for unit in ELEVEN),
    *(f"3.{unit}" for unit in (1, 3, 4, 6, 7, 9, 11, 13, 15)),
]


@pytest.mark.parametrize(
    ("depth", "cuts", "blocks", "expected"),
    [
        (32, R32_K8, 8, 208_960),
        (32, R32_K16, 15, 461_120),
        (110, R110_K32, 32, 970_432),
        (110, R110_ALL, 54, 1_724_928),
    ],
)
def test_copies_have_the_published_number_of_parameters(
    depth: int, cuts: list[str], blocks: int, expected: int
) -> None:
    found = split(
        cifar_resnet(depth),
        torch.empty(1, 3, 8, 8),
        cuts=[f"layer{cut}" for cut in cuts],
        objective=classifier(10),
        momentum=man(),
    )
    assert len(found) == blocks
    for part in ("bias", "ema"):
        modules = [getattr(block.momentum, part) for block in found[:-1]]
        assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == expected


# Arguments.

ERRORS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "man below 0": (lambda: man(-0.1), ["decay", "-0.1"]),
    "man above 1": (lambda: man(1.01), ["decay", "1.01"]),
    "man no number": (lambda: man(math.nan), ["decay", "nan"]),
    "manpp below 0": (lambda: manpp(-0.1), ["decay", "-0.1"]),
    "manpp above 1": (lambda: manpp(2), ["decay", "2"]),
    "man initial": (lambda: man(initial="zeros"), ["initial", "'zeros'", "'copy'", "'random'"]),  # pyright: ignore
    "manpp initial": (lambda: manpp(initial="zeros"), ["initial", "'zeros'", "'copy'"]),  # pyright: ignore
    "man depth": (lambda: man(depth=0), ["depth", "0"]),
    "manpp depth": (lambda: manpp(depth=-1), ["depth", "-1"]),
    "form": (lambda: man(form="product"), ["form", "'product'", "'sum'", "'fused'"]),  # pyright: ignore
    "nothing left": (lambda: man(bias=False, ema=False), ["bias", "ema", "False"]),
    "residual of one part": (lambda: man(form="residual", ema=False), ["form", "'residual'", "'sum'"]),
    "fused without average": (lambda: man(form="fused", ema=False), ["form", "'fused'", "ema", "False"]),
}


def test_the_residual_form_counts_the_residual_path_once() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(4, CLASSES))
    module = man(form="residual", depth=2)(units(model, torch.empty(2, 4))[1:])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x = torch.randn(5, 4)

    def branch(copied: nn.Module, h: Tensor) -> Tensor:
        for linear in (m for m in copied.modules() if isinstance(m, nn.Linear)):
            h = h + torch.tanh(h @ linear.weight.double().T + linear.bias.double())
        return h

    assert module.bias is not None and module.ema is not None
    expected = branch(module.bias, x.double()) + branch(module.ema, x.double()) - x.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in module.ema.parameters())


def test_the_residual_form_is_refused_where_the_unit_changes_the_shape() -> None:
    with pytest.raises(LocalGradError, match="residual path is not its input"):
        blocks_of(chain(), man(form="residual"))


@pytest.mark.parametrize("name", ERRORS)
def test_arguments_that_cannot_be_used_are_named(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(LocalGradError) as raised:
        call()
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_sixteen_bits_is_refused(dtype: torch.dtype) -> None:
    """A step of 0.005 of the way is less than the type can tell."""
    model, example = cifar_resnet(8, CLASSES).to(dtype), torch.empty(2, 3, 16, 16, dtype=dtype)
    settings = {"cuts": ["layer1"], "objective": classifier(CLASSES)}
    for momentum in (man(), man(form="fused"), manpp()):
        with pytest.raises(
            LocalGradError, match=r"weights after a cut are torch.\w+, in which an average .* stands still"
        ):
            split(model, example, momentum=momentum, **settings)
    for momentum in (man(ema=False), man(decay=0.0), man(decay=1.0)):
        assert len(split(model, example, momentum=momentum, **settings)) == 2
