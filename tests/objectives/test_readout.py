"""The model's own output layer, read: the loss against float64 loops and autograd, memory, refusals."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import LocalGradError, Site
from localgrad.objectives.readout import linear_cross_entropy, readout

WIDTH, VOCABULARY, LENGTH, BATCH = 6, 11, 5, 3


class Model(nn.Module):
    """Names alone: an embedding, two units, a norm and an output layer."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)


def site(model: nn.Module | None, features: tuple[int, ...] = (BATCH, LENGTH, WIDTH), **options: Any) -> Site:
    layers = getattr(model, "layers", ())
    following = [
        SimpleNamespace(name=f"layers.{i}", module=layer, features=torch.Size(features))
        for i, layer in enumerate(layers)
    ]
    fields: dict[str, Any] = {
        "features": torch.Size(features),
        "channel_dim": len(features) - 1,
        "inputs": torch.Size(features[:-1]),
        "index": 0,
        "num_blocks": 3,
        "model": model,
        "following": following,
    }
    return Site(**fields | options)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, tokens and next tokens."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return features, tokens[:, :-1], tokens[:, 1:]


def naive(scores: np.ndarray, targets: np.ndarray, ignore_index: int) -> float:
    """Mean cross-entropy of the rows that count, in loops."""
    losses = []
    for row, target in zip(scores, targets, strict=True):
        if target != ignore_index:
            losses.append(math.log(sum(math.exp(z) for z in row)) - row[target])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "norm"])
def test_the_loss_is_the_formula(bias: bool, norm: str | None) -> None:
    torch.manual_seed(0)
    model = Model(bias)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
    module = readout("head", norm, shift=False)(site(model))
    with torch.no_grad():
        module.scale.fill_(1.7)
    features, tokens, targets = batch()
    targets = targets.clone()
    targets[0, 1] = targets[2, 4] = -100
    loss = module(features, targets, tokens).detach()
    x = features.double().numpy().reshape(-1, WIDTH)
    if norm is None:
        eps = torch.finfo(torch.float32).eps
        hidden = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
    else:
        centred = x - x.mean(1, keepdims=True)
        hidden = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        hidden = hidden * model.norm.weight.detach().double().numpy() + model.norm.bias.detach().double().numpy()
    scores = 1.7 * hidden @ model.head.weight.detach().double().numpy().T
    if bias:
        scores = scores + model.head.bias.detach().double().numpy()
    assert float(loss) == pytest.approx(naive(scores, targets.numpy().ravel(), -100), abs=1e-5)
    assert torch.allclose(module.predict(features).double().flatten(0, 1), torch.tensor(scores), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 1000, None])
@pytest.mark.parametrize("ignore_index", [-100, 3, 255])
def test_chunks_give_autograd_s_loss_and_gradient(chunk: int | None, ignore_index: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (10,), generator=generator)
    targets[4] = ignore_index
    expected = F.cross_entropy(hidden @ weight.T + bias, targets, ignore_index=ignore_index)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    loss = linear_cross_entropy(hidden, weight, bias, targets, ignore_index, chunk)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    assert loss.dtype == torch.float64
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_no_token_that_counts_is_no_loss() -> None:
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(VOCABULARY, WIDTH), None, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_without_gradients_none_is_made() -> None:
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.arange(4)
    loss = linear_cross_entropy(hidden, weight, None, targets)
    assert not loss.requires_grad
    assert torch.allclose(loss, F.cross_entropy(hidden @ weight.T, targets))


def test_under_autocast_scores_are_multiplied_in_bfloat16_and_the_loss_is_float32() -> None:
    hidden = torch.randn(64, 32, requires_grad=True)
    weight, targets = torch.randn(50, 32) / 6, torch.randint(50, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, None, targets)
    loss.backward()
    exact = F.cross_entropy((hidden.detach().bfloat16() @ weight.bfloat16().T).float(), targets)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact), abs=1e-4)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_the_model_s_layers_get_no_gradient_and_are_no_part_of_the_head() -> None:
    model = Model(bias=True)
    module = readout("head", "norm", depth=1, shift=False)(site(model))
    features, tokens, targets = batch()
    features.requires_grad_()
    (module(features, targets, tokens) + module.predict(features).square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not set(module.parameters()) & set(model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert features.grad is not None and features.grad.any()
    assert not any("head" in name for name in module.state_dict())


def test_the_output_layer_is_read_as_it_is_now_and_may_be_exchanged() -> None:
    model = Model()
    module = readout("head", shift=False)(site(model))
    features, tokens, targets = batch()
    before = module(features, targets, tokens)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert module(features, targets, tokens) != before
    model.head = nn.Linear(WIDTH, 2 * VOCABULARY)
    assert module.predict(features).shape == (BATCH, LENGTH, 2 * VOCABULARY)


def test_fresh_units_have_the_shape_of_those_after_the_cut_and_values_of_their_own() -> None:
    model = Model()
    module = readout("head", depth=2, shift=False)(site(model))
    fresh, own = module.classifier[0], model.layers[0]
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in own.parameters()]
    assert not torch.equal(fresh[1].weight, own[1].weight)
    features, _, _ = batch()
    expected = F.linear(module.classifier[2](module.classifier[1](fresh(features))), model.head.weight)
    assert torch.allclose(module.predict(features), expected)


def test_labels_that_repeat_the_tokens_are_shifted() -> None:
    model = Model()
    features, tokens, targets = batch()
    shifting, plain = (readout("head", shift=shift)(site(model)) for shift in (True, False))
    last_out = targets.clone()
    last_out[:, -1] = -100  # the token after the last is not among the labels
    assert torch.allclose(shifting(features, tokens, tokens), plain(features, last_out, tokens))


def test_a_wrong_shift_is_refused_by_the_first_batch() -> None:
    model = Model()
    features, tokens, targets = batch()
    with pytest.raises(LocalGradError, match="shift=False"):
        readout("head")(site(model))(features, targets, tokens)
    with pytest.raises(LocalGradError, match="learn to copy"):
        readout("head", shift=False)(site(model))(features, tokens, tokens)
    masked = torch.where(torch.arange(LENGTH) == 2, tokens, -100)  # what is not scored tells nothing
    readout("head")(site(model))(features, masked, tokens)
    readout("head")(site(model))(features, targets, features)  # no token ids: nothing to compare with


def test_vectors_have_one_class_each() -> None:
    model = Model()
    module = readout("head")(site(model, (BATCH, WIDTH)))
    features, targets = torch.randn(BATCH, WIDTH), torch.arange(BATCH)
    loss = module(features, targets, features)
    assert torch.allclose(loss, F.cross_entropy(module.predict(features), targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lm_head"}, "'lm_head' and Model has no such submodule"),
        ({"head": "layers"}, "without a weight"),
        ({"head": "embedding", "norm": "nothing"}, "norm is 'nothing'"),
        ({"head": "norm"}, r"its weight is \(6,\)"),
        ({"head": "head", "depth": 3}, "depth is 3 and 2 units follow"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        readout(**options)(site(Model()))


def test_a_site_that_cannot_have_it_is_refused() -> None:
    model = Model()
    with pytest.raises(LocalGradError, match="the site has no model"):
        readout("head")(site(None))
    with pytest.raises(LocalGradError, match="dense takes maps"):
        readout("head")(site(model, (2, 6, 4, 4), channel_dim=1))
    features, tokens, _ = batch()
    with pytest.raises(LocalGradError, match="one class for each"):
        readout("head")(site(model))(features, tokens[:, 1:], tokens)

    class Masked(nn.Module):
        def forward(self, features: Tensor, mask: Tensor) -> Tensor:
            return features

    model.layers[0] = Masked()
    with pytest.raises(LocalGradError, match="takes features, mask"):
        readout("head", depth=1)(site(model))


@pytest.mark.parametrize("options", [{"head": ""}, {"head": nn.Linear(2, 2)}, {"depth": -1}, {"chunk": 0}])
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LocalGradError):
        readout(**{"head": "head"} | options)


def test_scores_of_all_tokens_are_never_alive_at_once() -> None:
    from localgrad.planning.measure import measure_peak

    tokens, width, vocabulary = 8192, 64, 50_000
    hidden = torch.empty(tokens, width, device="meta", requires_grad=True)
    weight = torch.empty(vocabulary, width, device="meta")
    targets = torch.empty(tokens, dtype=torch.long, device="meta")

    def step() -> None:
        linear_cross_entropy(hidden, weight, None, targets, chunk=128).backward()

    _, peak = measure_peak(step, torch.device("meta"))
    one_chunk, gradient = 4 * 128 * vocabulary, 4 * tokens * width
    assert peak < 4 * one_chunk + 4 * gradient < 4 * tokens * vocabulary / 4


def test_a_copy_of_the_head_reads_the_copy_of_its_model() -> None:
    model = Model()
    module = readout("head", shift=False)(site(model))
    model_copy, module_copy = copy.deepcopy((model, module))
    with torch.no_grad():
        model_copy.head.weight.zero_()
    features, _, _ = batch()
    assert not module_copy.predict(features).any()
    assert module.predict(features).any()
