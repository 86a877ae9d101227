"""Local objectives: every loss against naive float64 loops of its formula, layouts, precision, arguments.

The oracles are NumPy loops in float64 on the module's own parameters; they share no code with what they check.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localgrad import LocalGradError, Site, classifier, dgl, infopro, predsim, split
from localgrad.objectives.infopro import supervised_contrast
from localgrad.objectives.layout import MeanOverSpace
from localgrad.objectives.predsim import prediction_pool, similarity_matrix

torch.set_num_threads(1)

Array = np.ndarray
MEAN = (0.5, 0.4, 0.3)
STD = (0.25, 0.2, 0.3)


def site(
    features: Sequence[int],
    inputs: Sequence[int] = (2, 3, 32, 32),
    index: int = 0,
    num_blocks: int = 4,
    channel_dim: int = 1,
) -> Site:
    return Site(
        features=torch.Size(features),
        channel_dim=channel_dim,
        inputs=torch.Size(inputs),
        index=index,
        num_blocks=num_blocks,
    )


def image(*shape: int, seed: int = 0) -> Tensor:
    """Normalised images whose values lie in [0, 1] before normalisation."""
    pixels = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (MEAN, STD))
    return ((pixels - mean) / std).float()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(values: Tensor) -> Array:
    return values.detach().double().numpy()


def randomised(module: nn.Module, seed: int = 3) -> nn.Module:
    """No parameter or running statistic at a neutral value, which would hide a term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if "running_var" in name or ("weight" in name and value.dim() == 1):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith((".bias", "running_mean")):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return module


# The formulas, in loops.


def naive_conv(x: Array, weight: Array, bias: Array | None = None, stride: int = 1) -> Array:
    """Zero-padded so that an odd kernel keeps the size."""
    outputs, _, height, width = weight.shape
    top, left = height // 2, width // 2
    samples, _, rows, columns = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    y = np.zeros((samples, outputs, (rows - 1) // stride + 1, (columns - 1) // stride + 1))
    for n, i, j in itertools.product(range(samples), range(y.shape[2]), range(y.shape[3])):
        patch = padded[n, :, i * stride : i * stride + height, j * stride : j * stride + width]
        for o in range(outputs):
            y[n, o, i, j] = (patch * weight[o]).sum() + (0.0 if bias is None else bias[o])
    return y


def naive_norm(x: Array, module: nn.Module) -> Array:
    """Batch norm: biased variance of the batch while training, running statistics otherwise."""
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        if module.training:
            mean = x[:, c].mean()
            variance = ((x[:, c] - mean) ** 2).mean()
        else:
            mean, variance = module.running_mean[c].item(), module.running_var[c].item()
        y[:, c] = (x[:, c] - mean) / math.sqrt(variance + 1e-5)
        y[:, c] = y[:, c] * module.weight[c].item() + module.bias[c].item()
    return y


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def naive_linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = np.zeros((x.shape[0], weight.shape[0]))
    for n, o in itertools.product(*map(range, y.shape)):
        y[n, o] = (x[n] * weight[o]).sum() + (0.0 if bias is None else bias[o])
    return y


def naive_adaptive_pool(x: Array, height: int, width: int) -> Array:
    """Bin i of o covers floor(i H / o) to ceil((i + 1) H / o)."""
    y = np.zeros((*x.shape[:2], height, width))
    for i, j in itertools.product(range(height), range(width)):
        rows = slice(i * x.shape[2] // height, math.ceil((i + 1) * x.shape[2] / height))
        columns = slice(j * x.shape[3] // width, math.ceil((j + 1) * x.shape[3] / width))
        y[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
    return y


def naive_pool(x: Array, kernel: tuple[int, int], padding: tuple[int, int] = (0, 0)) -> Array:
    """Mean over kernels side by side; zeros of the padding count."""
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    y = np.zeros((*x.shape[:2], x.shape[2] // kernel[0], x.shape[3] // kernel[1]))
    for i, j in itertools.product(*map(range, y.shape[2:])):
        window = x[:, :, i * kernel[0] : (i + 1) * kernel[0], j * kernel[1] : (j + 1) * kernel[1]]
        y[:, :, i, j] = window.sum(axis=(2, 3)) / (kernel[0] * kernel[1])
    return y


def naive_upsample(x: Array, height: int, width: int) -> Array:
    """Bilinear with the corners aligned: output i reads position i (H - 1) / (height - 1)."""
    y = np.zeros((*x.shape[:2], height, width))
    rows, columns = x.shape[2:]
    for i, j in itertools.product(range(height), range(width)):
        v = i * (rows - 1) / (height - 1) if height > 1 else 0.0
        u = j * (columns - 1) / (width - 1) if width > 1 else 0.0
        top, left = min(int(v), rows - 1), min(int(u), columns - 1)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        b, a = v - top, u - left
        y[:, :, i, j] = (1 - b) * ((1 - a) * x[:, :, top, left] + a * x[:, :, top, right]) + b * (
            (1 - a) * x[:, :, bottom, left] + a * x[:, :, bottom, right]
        )
    return y


def naive_cross_entropy(scores: Array, targets: Tensor) -> float:
    total = 0.0
    for row, target in zip(scores, targets.tolist(), strict=True):
        total += math.log(sum(math.exp(score - row.max()) for score in row)) + row.max() - row[target]
    return total / len(scores)


def naive_similarity(x: Array) -> Array:
    """Unbiased standard deviation over space of maps of more than 3 channels, then cosine of the centred rows."""
    rows: list[list[float]] = []
    for sample in x:
        if x.ndim == 4 and x.shape[1] > 3 and x.shape[2] > 1:
            row = []
            for channel in sample:
                values = channel.ravel().tolist()
                mean = sum(values) / len(values)
                row.append(math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))
        else:
            row = sample.ravel().tolist()
        centre = sum(row) / len(row)
        row = [value - centre for value in row]
        length = 1e-8 + math.sqrt(sum(value * value for value in row))
        rows.append([value / length for value in row])
    dots = [[sum(a * b for a, b in zip(left, right, strict=True)) for right in rows] for left in rows]
    return np.clip(np.array(dots), -1.0, 1.0)


def naive_contrast(embeddings: Array, targets: Tensor, temperature: float = 0.07) -> float:
    labels = targets.tolist()
    unit = [row / math.sqrt((row * row).sum()) for row in embeddings]
    total = 0.0
    for i in range(len(unit)):
        positives = [p for p in range(len(unit)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        denominator = sum(math.exp(float(unit[i] @ unit[a]) / temperature) for a in range(len(unit)) if a != i)
        logs = [math.log(math.exp(float(unit[i] @ unit[p]) / temperature) / denominator) for p in positives]
        total -= sum(logs) / len(positives)
    return total / len(unit)


def naive_bce(logits: Array, pixels: Array) -> float:
    total = 0.0
    for logit, pixel in zip(logits.ravel().tolist(), pixels.ravel().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        total -= pixel * math.log(probability) + (1 - pixel) * math.log(1 - probability)
    return total / logits.size


def leaves(module: nn.Module, *kinds: type[nn.Module]) -> list[Any]:
    return [child for child in module.modules() if isinstance(child, kinds)]


def weight_and_bias(layer: nn.Module) -> tuple[Array, Array | None]:
    return numbers(layer.weight), None if layer.bias is None else numbers(layer.bias)


def conv_norm_relu_of(x: Array, layer: nn.Conv2d, norm: nn.Module) -> Array:
    return relu(naive_norm(naive_conv(x, *weight_and_bias(layer), stride=layer.stride[0]), norm))


def count(module: nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def check(loss: Tensor, expected: float, tolerance: float = 1e-5) -> None:
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


# Greedy.


def test_classifier_is_cross_entropy_of_a_linear_layer_on_the_mean_over_space() -> None:
    module = classifier(4)(site((2, 5, 3, 7)))
    features, targets = noise(6, 5, 3, 7), torch.tensor([0, 1, 2, 3, 3, 0])
    (linear,) = leaves(module.classifier, nn.Linear)
    pooled = np.array([[channel.mean() for channel in sample] for sample in numbers(features)])
    scores = naive_linear(pooled, *weight_and_bias(linear))
    check(module(features, targets, image(6, 3, 32, 32)), naive_cross_entropy(scores, targets))
    np.testing.assert_allclose(numbers(module.predict(features)), scores, atol=1e-5)
    assert count(module) == 5 * 4 + 4


@pytest.mark.parametrize("prefix", [0, 1, 2, 4, 5])
def test_classifier_takes_the_class_token_or_the_mean_after_a_layer_norm(prefix: int) -> None:
    width, grid = 6, 4 * 4
    module = randomised(classifier(3)(site((2, grid + prefix, width), channel_dim=2)))
    tokens, targets = noise(5, grid + prefix, width), torch.tensor([0, 1, 2, 2, 1])
    (norm,), (linear,) = leaves(module.classifier, nn.LayerNorm), leaves(module.classifier, nn.Linear)
    normal = np.empty((5, grid + prefix, width))
    for n, position in itertools.product(range(5), range(grid + prefix)):
        token = numbers(tokens)[n, position]
        deviation = math.sqrt(((token - token.mean()) ** 2).mean() + norm.eps)
        normal[n, position] = (token - token.mean()) / deviation * numbers(norm.weight) + numbers(norm.bias)
    taken = normal[:, prefix:].mean(axis=1) if prefix in (0, 4) else normal[:, 0]  # four registers, no class token
    scores = naive_linear(taken, *weight_and_bias(linear))
    check(module(tokens, targets, image(5, 3, 32, 32)), naive_cross_entropy(scores, targets))
    np.testing.assert_allclose(numbers(module.predict(tokens)), scores, atol=1e-5)


def test_classifier_on_a_vector_is_one_linear_layer() -> None:
    module = classifier(3)(site((2, 7)))
    features, targets = noise(4, 7), torch.tensor([2, 1, 0, 1])
    (linear,) = leaves(module.classifier, nn.Linear)
    scores = naive_linear(numbers(features), *weight_and_bias(linear))
    check(module(features, targets, image(4, 3, 32, 32)), naive_cross_entropy(scores, targets))


# PredSim.


@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (5, 4, 2, 1), (5, 3, 4, 4), (5, 6, 1, 7), (5, 9), (5, 2)])
def test_similarity_matrix_follows_the_formula(shape: tuple[int, ...]) -> None:
    features = noise(*shape) + 0.5
    found = similarity_matrix(features)
    assert found.shape == (5, 5)
    np.testing.assert_allclose(numbers(found), naive_similarity(numbers(features)), atol=1e-5)
    assert found.abs().max() <= 1
    np.testing.assert_allclose(numbers(found.diagonal()), 1.0, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_similarity_of_targets_is_1_or_minus_1_over_n_minus_1(classes: int) -> None:
    targets = torch.tensor([0, 1, 1, classes - 1, 0])
    expected = np.where(targets[:, None] == targets[None], 1.0, -1 / (classes - 1))
    found = similarity_matrix(nn.functional.one_hot(targets, classes).float())
    np.testing.assert_allclose(numbers(found), expected, atol=1e-5)


def test_similarity_of_constant_features_is_zero_with_finite_gradients() -> None:
    features = noise(3, 5, 4, 4)
    features[0] = 0.7  # no deviation in any channel: a row of zeros
    features[1, 2] = 0.0  # a dead channel
    features.requires_grad_()
    found = similarity_matrix(features)
    assert found[0].abs().max() < 1e-5
    found.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 1.0])
def test_predsim_weighs_prediction_and_similarity(beta: float) -> None:
    module = predsim(3, beta=beta, max_features=16)(site((2, 5, 4, 4)))
    features, targets = noise(6, 5, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    (linear,) = leaves(module.classifier, nn.Linear)
    pooled = naive_pool(numbers(features), (4, 2))  # 5 * 4 * 4 = 80 -> 40 -> 20 -> 10 <= 16
    scores = naive_linear(pooled.reshape(6, -1), *weight_and_bias(linear))
    found = naive_similarity(naive_conv(numbers(features), numbers(module.similarity.weight)))
    wanted = np.where(targets[:, None] == targets[None], 1.0, -1 / 2)
    squared = sum((found[i, j] - wanted[i, j]) ** 2 for i, j in itertools.product(range(6), range(6))) / 36
    expected = (1 - beta) * naive_cross_entropy(scores, targets) + beta * squared
    check(module(features, targets, image(6, 3, 32, 32)), expected)
    np.testing.assert_allclose(numbers(module.predict(features)), scores, atol=1e-5)
    assert module.similarity.bias is None


POOLS = [  # channels, size, kernel, padding, features left: AugLocal's tables at 32x32 and 96x96 pixels
    (16, 32, (8, 4), (0, 0), 512),
    (32, 16, (4, 4), (0, 0), 512),
    (64, 8, (4, 2), (0, 0), 512),
    (16, 96, (32, 16), (0, 0), 288),
    (32, 48, (16, 16), (0, 0), 288),
    (64, 24, (16, 8), (8, 0), 384),
]


@pytest.mark.parametrize(("channels", "size", "kernel", "padding", "left"), POOLS)
def test_predsim_pools_as_in_the_tables(
    channels: int, size: int, kernel: tuple[int, int], padding: tuple[int, int], left: int
) -> None:
    pool, remaining = prediction_pool(channels, (size, size), 512)
    assert channels * remaining[0] * remaining[1] == left
    features = noise(1, channels, size, size)
    expected = naive_pool(numbers(features), kernel, padding)
    assert expected.shape[2:] == remaining
    np.testing.assert_allclose(numbers(pool(features)), expected, atol=1e-5)
    module = predsim(10)(site((2, channels, size, size)))
    (linear,) = leaves(module.classifier, nn.Linear)
    assert linear.in_features == left
    assert count(module.similarity) == 9 * channels * channels
    assert count(module.classifier) == 10 * left + 10


def test_predsim_counts_of_the_tables_at_32_pixels() -> None:
    modules = [predsim(10)(site((2, channels, size, size))) for channels, size in ((16, 32), (32, 16), (64, 8))]
    assert [count(module.classifier) for module in modules] == [5130, 5130, 5130]
    assert [count(module.similarity) for module in modules] == [2304, 9216, 36864]


def test_predsim_on_a_vector_maps_linearly_and_does_not_pool() -> None:
    module = predsim(3, beta=0.4)(site((2, 6)))
    features, targets = noise(5, 6), torch.tensor([0, 1, 2, 1, 0])
    (linear,) = leaves(module.classifier, nn.Linear)
    scores = naive_linear(numbers(features), *weight_and_bias(linear))
    found = naive_similarity(naive_linear(numbers(features), numbers(module.similarity.weight)))
    wanted = np.where(targets[:, None] == targets[None], 1.0, -1 / 2)
    expected = 0.6 * naive_cross_entropy(scores, targets) + 0.4 * ((found - wanted) ** 2).mean()
    check(module(features, targets, image(5, 3, 32, 32)), expected)
    assert count(module.similarity) == 36


def test_predsim_with_more_channels_than_it_may_keep_still_has_a_head() -> None:
    module = predsim(3, max_features=4)(site((2, 6, 3, 5)))
    features = noise(4, 6, 3, 5)
    assert module.predict(features).shape == (4, 3)
    assert module(features, torch.tensor([0, 1, 2, 0]), image(4, 3, 32, 32)).isfinite()


# DGL.


def naive_dgl(module: nn.Module, x: Array, head: str) -> Array:
    quarter = [math.ceil(size / 4) for size in x.shape[2:]]
    first = [8, 8] if head == "wide" else quarter
    second = {"wide": [1, 1], "original": [2, 2], "compact": [min(size, 2) for size in quarter]}[head]
    convs, linears = leaves(module.classifier, nn.Conv2d), leaves(module.classifier, nn.Linear)
    norms = leaves(module.classifier, nn.BatchNorm2d)
    assert [tuple(conv.kernel_size) for conv in convs] == [(1, 1)] * 3
    assert all(conv.bias is None for conv in convs)
    assert len(linears) == (3 if head == "compact" else 4)
    x = naive_adaptive_pool(x, *first)
    for conv, norm in zip(convs, norms, strict=True):
        x = conv_norm_relu_of(x, conv, norm)
    x = naive_adaptive_pool(x, *second).reshape(len(x), -1)
    for linear, norm in zip(linears[:-1], leaves(module.classifier, nn.BatchNorm1d), strict=True):
        assert (linear.bias is None) == (head == "compact")
        x = relu(naive_norm(naive_linear(x, *weight_and_bias(linear)), norm))
    return naive_linear(x, *weight_and_bias(linears[-1]))


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ("original", (8, 8)),
        ("original", (6, 9)),
        ("original", (4, 3)),
        ("compact", (8, 8)),
        ("compact", (6, 9)),
        ("compact", (4, 3)),
        ("wide", (8, 8)),
    ],
)
def test_dgl_is_cross_entropy_of_its_head(head: Any, size: tuple[int, int]) -> None:
    module = randomised(dgl(3, head)(site((2, 4, *size))))
    features, targets = noise(5, 4, *size), torch.tensor([0, 1, 2, 1, 0])
    module.eval()
    expected = naive_dgl(module, numbers(features), head)
    np.testing.assert_allclose(numbers(module.predict(features)), expected, atol=1e-4)
    module.train()
    expected = naive_cross_entropy(naive_dgl(module, numbers(features), head), targets)
    check(module(features, targets, image(5, 3, 32, 32)), expected, 1e-4)


def test_wide_dgl_averages_to_8_by_8_whatever_the_size() -> None:
    module = dgl(3, "wide")(site((2, 2, 12, 16))).eval()
    features = noise(2, 2, 12, 16)
    pooled = torch.from_numpy(naive_adaptive_pool(numbers(features), 8, 8)).float()
    np.testing.assert_allclose(numbers(module.predict(features)), numbers(module.predict(pooled)), atol=1e-5)


@pytest.mark.parametrize(
    ("head", "channels", "size", "expected"),
    [
        ("compact", 16, 32, 9962),
        ("compact", 32, 16, 37834),
        ("compact", 64, 8, 147338),
        ("wide", 16, 32, 635146),
        ("wide", 32, 16, 637194),
        ("wide", 64, 8, 641290),
    ],
)
def test_dgl_heads_have_the_published_number_of_parameters(head: Any, channels: int, size: int, expected: int) -> None:
    assert count(dgl(10, head)(site((2, channels, size, size)))) == expected


def test_dgl_original_has_three_biased_layers_more_than_the_scores() -> None:
    channels, width = 16, 64
    convs = 3 * (channels * channels + 2 * channels)
    layers = 3 * (width * width + width + 2 * width)
    assert count(dgl(10, "original")(site((2, channels, 32, 32)))) == convs + layers + width * 10 + 10


def test_dgl_uses_the_compact_head_unless_told_otherwise() -> None:
    assert count(dgl(10)(site((2, 16, 32, 32)))) == 9962


# InfoPro.


def naive_reconstruction(module: nn.Module, features: Array, images: Tensor) -> float:
    """The decoder for at most 64 channels, and the entropy against the image before its normalisation."""
    first, last = leaves(module.decoder, nn.Conv2d)
    (norm,) = leaves(module.decoder, nn.BatchNorm2d)
    assert (first.kernel_size, last.kernel_size, first.out_channels) == ((3, 3), (3, 3), 12)
    x = naive_upsample(features, *images.shape[2:])
    x = relu(naive_norm(naive_conv(x, *weight_and_bias(first)), norm))
    logits = naive_conv(x, *weight_and_bias(last))
    pixels = numbers(images) * np.array(STD).reshape(1, 3, 1, 1) + np.array(MEAN).reshape(1, 3, 1, 1)
    return naive_bce(logits, np.clip(pixels, 0.0, 1.0))


def naive_head(module: nn.Module, x: Array) -> Array:
    for conv, norm in zip(leaves(module.classifier, nn.Conv2d), leaves(module.classifier, nn.BatchNorm2d), strict=True):
        assert conv.kernel_size == (3, 3)
        assert conv.bias is None
        x = conv_norm_relu_of(x, conv, norm)
    x = x.mean(axis=(2, 3))
    linears = leaves(module.classifier, nn.Linear)
    for linear in linears[:-1]:
        x = relu(naive_linear(x, *weight_and_bias(linear)))
    return naive_linear(x, *weight_and_bias(linears[-1]))


BATCH = (noise(5, 4, 3, 4), torch.tensor([0, 1, 1, 2, 0]), image(5, 3, 6, 8))


def infopro_module(index: int = 0, num_blocks: int = 4, **settings: Any) -> nn.Module:
    settings = {"feature_dim": 6, **settings}
    return randomised(infopro(3, MEAN, STD, **settings)(site((2, 4, 3, 4), (2, 3, 6, 8), index, num_blocks)))


def test_infopro_reconstruction_is_the_entropy_of_the_denormalised_image() -> None:
    features, targets, images = BATCH
    module = infopro_module(reconstruction=(1.0, 1.0), task=(0.0, 0.0))
    check(module(features, targets, images), naive_reconstruction(module, numbers(features), images), 1e-5)


@pytest.mark.parametrize("head", ["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"])
def test_infopro_task_is_cross_entropy_of_the_head(head: str) -> None:
    features, targets, images = BATCH
    module = infopro_module(reconstruction=(0.0, 0.0), task=(1.0, 1.0), head=head)
    module.eval()
    np.testing.assert_allclose(numbers(module.predict(features)), naive_head(module, numbers(features)), atol=1e-5)
    module.train()
    scores = naive_head(module, numbers(features))
    assert scores.shape == (5, 3)
    check(module(features, targets, images), naive_cross_entropy(scores, targets))


def test_infopro_contrast_is_supervised_contrast_of_the_head() -> None:
    features, targets, images = BATCH
    module = infopro_module(reconstruction=(0.0, 0.0), task=(1.0, 1.0), loss="contrast")
    embeddings = naive_head(module, numbers(features))
    assert embeddings.shape == (5, 6)
    check(module(features, targets, images), naive_contrast(embeddings, targets))
    assert module.predict(features) is None


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize(
    ("index", "num_blocks", "weights"),
    [
        (0, 2, (5.0, 0.5)),
        (0, 3, (5.0, 0.5)),
        (1, 3, (1.0, 2.0)),
        (0, 5, (5.0, 0.5)),
        (1, 5, (11 / 3, 1.0)),
        (2, 5, (7 / 3, 1.5)),
        (3, 5, (1.0, 2.0)),
    ],
)
def test_infopro_weights_go_linearly_from_the_first_local_block_to_the_last(
    index: int, num_blocks: int, weights: tuple[float, float], loss: str
) -> None:
    features, targets, images = BATCH
    module = infopro_module(index, num_blocks, reconstruction=(5.0, 1.0), task=(0.5, 2.0), loss=loss)
    outputs = naive_head(module, numbers(features))
    task = naive_contrast(outputs, targets) if loss == "contrast" else naive_cross_entropy(outputs, targets)
    expected = weights[0] * naive_reconstruction(module, numbers(features), images) + weights[1] * task
    check(module(features, targets, images), expected)


def test_infopro_weights_of_each_block() -> None:
    for index, (reconstruction, task) in enumerate([(5.0, 0.0), (4.0, 0.25), (0.0, 1.0)]):
        module = infopro_module(index, 4, reconstruction=(5.0, 4.0, 0.0), task=[0.0, 0.25, 1.0])
        assert (module.reconstruction, module.task) == (reconstruction, task)


def test_infopro_weights_count_blocks_of_a_split_model() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(4)))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)))
    seen: list[tuple[int, int]] = []

    def objective(where: Site) -> nn.Module:
        seen.append((where.index, where.num_blocks))
        return infopro(3, MEAN, STD, task=(0.5, 0.0))(where)

    with pytest.raises(LocalGradError):  # both weights reach 0 at the fourth of five blocks
        split(model, torch.empty(2, 3, 6, 6), num_blocks=5, balance="count", objective=objective)
    assert seen == [(index, 5) for index in range(4)]


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 2, 1], [0, 1, 1, 1, 1, 1]]
)
def test_supervised_contrast_follows_the_formula(labels: list[int]) -> None:
    embeddings, targets = 3 * noise(6, 5), torch.tensor(labels)
    check(supervised_contrast(embeddings, targets), naive_contrast(numbers(embeddings), targets))


def test_anchors_without_positives_count_in_the_mean_over_anchors() -> None:
    embeddings = noise(4, 5)
    lonely = torch.cat([embeddings, noise(1, 5, seed=9)])
    labels = torch.tensor([0, 0, 1, 1, 2])
    terms = naive_contrast(numbers(lonely), labels) * 5
    with_all = supervised_contrast(lonely, labels).item()
    assert with_all * 5 == pytest.approx(terms, rel=1e-5)
    assert supervised_contrast(lonely, torch.arange(5)).item() == 0


def test_supervised_contrast_has_finite_gradients_where_nothing_is_to_be_pulled() -> None:
    for rows, labels in ((1, [0]), (3, [0, 1, 2]), (3, [0, 0, 1])):
        embeddings = noise(rows, 4)
        embeddings[0] = 0.0
        embeddings.requires_grad_()
        loss = supervised_contrast(embeddings, torch.tensor(labels))
        loss.backward()
        assert loss.isfinite()
        assert embeddings.grad is not None
        assert embeddings.grad.isfinite().all()


def test_supervised_contrast_ignores_the_length_of_the_embeddings() -> None:
    embeddings, targets = noise(5, 4), torch.tensor([0, 0, 1, 1, 0])
    scaled = embeddings * torch.tensor([0.1, 2.0, 5.0, 300.0, 1.0]).view(-1, 1)
    check(supervised_contrast(scaled, targets), supervised_contrast(embeddings, targets).item())


@pytest.mark.parametrize(
    ("channels", "size", "decoder", "two_convs", "one_conv"),
    [(16, 32, 2091, 19466, 10186), (32, 16, 3819, 65162, 28170), (64, 8, 7275, 83594, 46602)],
)
def test_infopro_parts_have_the_published_number_of_parameters(
    channels: int, size: int, decoder: int, two_convs: int, one_conv: int
) -> None:
    where = site((2, channels, size, size))
    both = infopro(10, MEAN, STD, head="2c2f")(where)
    assert (count(both.decoder), count(both.classifier)) == (decoder, two_convs)
    assert count(infopro(10, MEAN, STD, head="1c2f")(where).classifier) == one_conv
    assert count(infopro(10, MEAN, STD)(where).classifier) == one_conv
    embedding = infopro(10, MEAN, STD, head="1c2f", loss="contrast", feature_dim=128)(where)
    assert count(embedding.classifier) == one_conv + (128 - 10) * 129


@pytest.mark.parametrize(
    ("head", "widths"), [("0c1f", [3]), ("0c2f", [128, 3]), ("1c1f", [3]), ("1c2f", [128, 3]), ("1c3f", [128, 128, 3])]
)
@pytest.mark.parametrize(("channels", "out"), [(16, 32), (32, 64), (64, 64)])
def test_infopro_heads_have_the_listed_shapes(head: Any, widths: list[int], channels: int, out: int) -> None:
    module = infopro(3, MEAN, STD, head=head)(site((2, channels, 8, 8)))
    convs = [(conv.in_channels, conv.out_channels, conv.stride[0]) for conv in leaves(module.classifier, nn.Conv2d)]
    assert convs == ([] if head.startswith("0") else [(channels, out, 1 if channels == 64 else 2)])
    assert [linear.out_features for linear in leaves(module.classifier, nn.Linear)] == widths


DECODERS = {
    512: [(512, 128, 1), 56, (128, 32, 3), 112, (32, 12, 3), 224, (12, 3, 3)],
    1024: [(1024, 192, 1), 28, (192, 64, 1), 56, (64, 32, 3), 112, (32, 12, 3), 224, (12, 3, 3)],
}


@pytest.mark.parametrize(("channels", "size", "width"), [(512, 28, 128), (1024, 14, 256)])
def test_infopro_imagenet_parts_have_the_released_shapes(channels: int, size: int, width: int) -> None:
    where = site((2, channels, size, size), (2, 3, 224, 224), 0, 2)
    module = infopro(1000, MEAN, STD, head="imagenet")(where)
    described: list[Any] = []
    for layer in leaves(module.decoder, nn.Conv2d, nn.Upsample):
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            described.append((layer.in_channels, layer.out_channels, layer.kernel_size[0]))
        else:
            assert layer.mode == "bilinear"
            assert layer.align_corners
            described.append(layer.size[0] if isinstance(layer.size, tuple) else layer.size)
    assert described == DECODERS[channels]
    convs = leaves(module.classifier, nn.Conv2d)
    assert [(conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs] == [
        (width, 1, 1),
        (256, 3, 2),
        (512, 3, 2),
        (2048, 1, 1),
    ]
    assert all(conv.bias is None for conv in convs)
    (linear,) = leaves(module.classifier, nn.Linear)
    assert (linear.in_features, linear.out_features) == (2048, 1000)
    if channels == 512:
        assert count(module) == 4750259


def test_the_mean_over_space_keeps_the_layout_of_its_gradient() -> None:
    maps = noise(3, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    pooled = MeanOverSpace()(maps)
    np.testing.assert_allclose(numbers(pooled), numbers(maps).mean(axis=(2, 3)), atol=1e-5)
    (slope,) = torch.autograd.grad(pooled.sum(), maps)
    assert slope.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(slope, torch.full_like(slope, 1 / 24))


def test_infopro_deep_decoder_gives_one_logit_a_pixel() -> None:
    module = infopro(3, MEAN, STD)(site((2, 96, 3, 4), (2, 3, 12, 16)))
    features, images = noise(4, 96, 3, 4), image(4, 3, 12, 16)
    assert module.decoder(features).shape == images.shape
    assert module(features, torch.tensor([0, 1, 2, 0]), images).isfinite()


def test_sequences_that_are_no_images_are_pooled_as_a_whole() -> None:
    """Also where their length is that of a square and a few tokens more."""
    for length in (16, 17, 20, 64):
        module = classifier(3)(site((2, length, 6), (2, length, 4), channel_dim=2))
        features = noise(4, length, 6)
        changed = features.clone()
        changed[:, -1] *= -1
        assert not torch.equal(module.predict(features), module.predict(changed))
        assert dgl(3)(site((2, length, 6), (2, length, 4), channel_dim=2)).predict(features).shape == (4, 3)


def test_infopro_works_as_it_comes_and_refuses_what_is_no_sequence_of_numbers() -> None:
    for index in range(3):
        assert infopro(3, MEAN, STD)(site((2, 4, 4, 4), (2, 3, 8, 8), index, 4)).task == 0.5
    assert infopro(3, torch.tensor(MEAN), np.array(STD))(site((2, 4, 4, 4), (2, 3, 8, 8))).mean.shape == (3, 1, 1)
    with pytest.raises(LocalGradError, match="give a sequence of numbers, one a channel"):
        infopro(3, 0.5, STD)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("channels", "size"),
    [(512, (7, 7)), (512, (8, 8)), (2048, (7, 7)), (1024, (14, 14)), (16, (1, 500)), (16, (500, 1))],
)
def test_the_prediction_pool_keeps_its_limit(channels: int, size: tuple[int, int]) -> None:
    limit = max(512, channels)
    pool, left = prediction_pool(channels, size, limit)
    assert channels * left[0] * left[1] <= limit
    assert pool(noise(1, channels, *size)).shape == (1, channels, *left)


def test_infopro_makes_no_part_that_has_no_weight() -> None:
    on, off = (1.0, 1.0), (0.0, 0.0)
    assert infopro_module(reconstruction=off, task=on).decoder is None
    assert infopro_module(reconstruction=on, task=off).classifier is None
    assert infopro_module(reconstruction=on, task=off).predict(BATCH[0]) is None
    last = infopro_module(2, 4, reconstruction=(1.0, 0.0), task=(1.0, 2.0))
    assert last.decoder is None
    check(last(*BATCH), 2 * naive_cross_entropy(naive_head(last, numbers(BATCH[0])), BATCH[1]))


def test_infopro_keeps_mean_and_std_out_of_the_parameters() -> None:
    module = infopro_module()
    assert all(tuple(parameter.shape) != (1, 3, 1, 1) for parameter in module.parameters())
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"decoder", "classifier"}


def test_infopro_gradients_reach_the_features_through_both_terms() -> None:
    features, targets, images = BATCH
    on, off = (1.0, 1.0), (0.0, 0.0)
    for reconstruction, task in ((on, off), (off, on)):
        leaf = features.clone().requires_grad_()
        infopro_module(reconstruction=reconstruction, task=task)(leaf, targets, images).backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


# Layouts.

OBJECTIVES: dict[str, Callable[[int], Callable[[Site], nn.Module]]] = {
    "classifier": classifier,
    "predsim": predsim,
    "dgl original": functools.partial(dgl, head="original"),
    "dgl compact": functools.partial(dgl, head="compact"),
    "dgl wide": functools.partial(dgl, head="wide"),
    "infopro": functools.partial(infopro, mean=MEAN, std=STD, reconstruction=(1.0, 1.0), task=(1.0, 1.0)),
    "infopro contrast": functools.partial(
        infopro, mean=MEAN, std=STD, reconstruction=(1.0, 1.0), task=(1.0, 1.0), loss="contrast", head="2c2f"
    ),
}
TARGETS = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_channels_last_maps_give_the_loss_of_the_permuted_map(name: str) -> None:
    first = randomised(OBJECTIVES[name](3)(site((2, 5, 4, 6), (2, 3, 8, 12))))
    last = OBJECTIVES[name](3)(site((2, 4, 6, 5), (2, 3, 8, 12), channel_dim=3))
    last.load_state_dict(first.state_dict())
    features, images = noise(5, 5, 4, 6), image(5, 3, 8, 12)
    expected = first(features, TARGETS, images)
    leaf = features.permute(0, 2, 3, 1).contiguous().requires_grad_()
    found = last(leaf, TARGETS, images)
    check(found, expected.item())
    scores = first.eval().predict(features)
    if scores is not None:
        torch.testing.assert_close(last.eval().predict(leaf), first.predict(features), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "classifier"])
def test_tokens_are_laid_on_the_grid_without_class_tokens(name: str, prefix: int) -> None:
    """Token 1 is right of token 0: rows of patches, in the image's proportions."""
    maps = randomised(OBJECTIVES[name](3)(site((2, 5, 2, 3), (2, 3, 8, 12))))
    tokens = OBJECTIVES[name](3)(site((2, prefix + 6, 5), (2, 3, 8, 12), channel_dim=2))
    tokens.load_state_dict(maps.state_dict())
    sequence, images = noise(5, prefix + 6, 5), image(5, 3, 8, 12)
    grid = torch.empty(5, 5, 2, 3)
    for row, column in itertools.product(range(2), range(3)):
        grid[:, :, row, column] = sequence[:, prefix + 3 * row + column]
    check(tokens(sequence, TARGETS, images), maps(grid, TARGETS, images).item(), 1e-5)


@pytest.mark.parametrize("name", ["dgl original", "dgl compact", "dgl wide"])
def test_dgl_takes_a_vector_for_a_map_of_one_pixel(name: str) -> None:
    maps = randomised(OBJECTIVES[name](3)(site((2, 5, 1, 1))))
    vectors = OBJECTIVES[name](3)(site((2, 5)))
    vectors.load_state_dict(maps.state_dict())
    features, images = noise(5, 5), image(5, 3, 8, 8)
    check(vectors(features, TARGETS, images), maps(features[:, :, None, None], TARGETS, images).item(), 1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_leave_features_and_images_as_they_were(name: str) -> None:
    module = OBJECTIVES[name](3)(site((2, 5, 4, 6), (2, 3, 8, 12)))
    features, images = noise(5, 5, 4, 6), image(5, 3, 8, 12)
    kept = features.clone(), images.clone()
    module(features, TARGETS, images)
    module.predict(features)
    assert torch.equal(features, kept[0])
    assert torch.equal(images, kept[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_can_be_placed_by_the_number_of_blocks(name: str) -> None:
    """The default way to split weighs the memory of each place, local objective included."""
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2)))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)))
    blocks = split(model, torch.empty(2, 3, 6, 6), num_blocks=2, objective=OBJECTIVES[name](3))
    features, loss = blocks[0](image(4, 3, 6, 6), TARGETS[:4], image(4, 3, 6, 6))
    assert features.shape == (4, 3, 6, 6)
    assert loss.isfinite()


# Precision.


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_float32_under_bfloat16_autocast(name: str) -> None:
    module = randomised(OBJECTIVES[name](3)(site((2, 5, 4, 6), (2, 3, 8, 12))))
    features, images = noise(5, 5, 4, 6), image(5, 3, 8, 12)
    expected = module(features, TARGETS, images)
    for given in (features, features.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module(given, TARGETS, images)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=0.05)


def test_similarity_and_contrast_do_not_round_to_bfloat16_under_autocast() -> None:
    features, embeddings = noise(6, 5, 3, 3).bfloat16(), noise(5, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, loss = similarity_matrix(features), supervised_contrast(embeddings, TARGETS)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(numbers(found), naive_similarity(numbers(features)), atol=1e-5)
    check(loss, naive_contrast(numbers(embeddings), TARGETS))


def test_cross_entropy_and_reconstruction_are_summed_in_float32_under_autocast() -> None:
    """With scores that bfloat16 holds exactly, only a loss in bfloat16 would be off."""
    module = classifier(3)(site((2, 2, 1, 1)))
    (linear,) = leaves(module.classifier, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
        linear.bias.zero_()
    features = torch.tensor([[1.0, 0.25], [0.5, 2.0], [0.75, 0.125], [3.0, 1.5], [0.0, 1.0]])
    expected = naive_cross_entropy(naive_linear(numbers(features), numbers(linear.weight)), TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(module(features[:, :, None, None], TARGETS, image(5, 3, 8, 8)), expected)
    decoder = infopro(3, MEAN, STD, reconstruction=(1.0, 1.0), task=(0.0, 0.0))(site((2, 2, 8, 8), (2, 3, 8, 8)))
    last = leaves(decoder.decoder, nn.Conv2d)[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    images = image(5, 3, 8, 8)
    logits = np.broadcast_to(numbers(last.bias).reshape(1, 3, 1, 1), images.shape)
    pixels = numbers(images) * np.array(STD).reshape(1, 3, 1, 1) + np.array(MEAN).reshape(1, 3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(decoder(noise(5, 2, 8, 8), TARGETS, images), naive_bce(logits, pixels))


# Arguments.


def on(
    features: Sequence[int], objective: Callable[[Site], nn.Module], inputs: Sequence[int] = (2, 3, 32, 32)
) -> nn.Module:
    return objective(site(features, inputs, channel_dim=2 if len(features) == 3 else 1))


plain_infopro = functools.partial(infopro, 10, MEAN, STD)
ERRORS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "classifier of no class": (lambda: classifier(0), ["num_classes", "0"]),
    "predsim of one class": (lambda: predsim(1), ["num_classes", "1"]),
    "dgl of no class": (lambda: dgl(0), ["num_classes", "0"]),
    "infopro of -3 classes": (lambda: infopro(-3, MEAN, STD), ["num_classes", "-3"]),
    "dgl head": (lambda: dgl(10, "mlp"), ["head", "'mlp'", "'original'", "'compact'", "'wide'"]),  # pyright: ignore
    "infopro head": (lambda: plain_infopro(head="3c3f"), ["head", "'3c3f'", "'1c2f'", "'imagenet'"]),
    "infopro loss": (lambda: plain_infopro(loss="mse"), ["loss", "'mse'", "'cross_entropy'", "'contrast'"]),
    "mean without std": (lambda: infopro(10, (0.5, 0.5), (0.25,)), ["mean", "std", "0.25"]),
    "no mean": (lambda: infopro(10, (), ()), ["mean", "()"]),
    "std of 0": (lambda: infopro(10, (0.5, 0.5), (0.2, 0.0)), ["std", "0.0"]),
    "std of nan": (lambda: infopro(10, (0.5, 0.5), (0.2, math.nan)), ["std", "nan"]),
    "no weights": (lambda: plain_infopro(reconstruction=()), ["reconstruction", "()"]),
    "weights of other blocks": (
        lambda: plain_infopro(task=(1.0, 2.0, 3.0))(site((2, 4, 8, 8), num_blocks=5)),
        ["task has 3 weights", "4 local blocks"],
    ),
    "negative reconstruction": (lambda: plain_infopro(reconstruction=(1.0, -2.0)), ["reconstruction", "-2.0"]),
    "negative task": (lambda: plain_infopro(task=(-0.5, 1.0)), ["task", "-0.5"]),
    "weight of nan": (lambda: plain_infopro(task=(0.5, math.nan)), ["task", "nan"]),
    "embedding of width 0": (lambda: plain_infopro(feature_dim=0), ["feature_dim", "0"]),
    "beta below 0": (lambda: predsim(10, beta=-0.01), ["beta", "-0.01"]),
    "beta above 1": (lambda: predsim(10, beta=1.5), ["beta", "1.5"]),
    "beta of nan": (lambda: predsim(10, beta=math.nan), ["beta", "nan"]),
    "no features": (lambda: predsim(10, max_features=0), ["max_features", "0"]),
    "a block without a loss": (
        lambda: plain_infopro(reconstruction=(5.0, 0.0), task=(0.5, 0.0))(site((2, 4, 8, 8), index=2)),
        ["reconstruction", "(5.0, 0.0)", "task", "(0.5, 0.0)", "block 2 of 4"],
    ),
    "no weight at all": (
        lambda: plain_infopro(reconstruction=(0.0, 5.0), task=(0.0, 1.0))(site((2, 4, 8, 8), num_blocks=2)),
        ["reconstruction", "(0.0, 5.0)", "block 0 of 2"],
    ),
    "infopro on a vector": (lambda: on((2, 7), plain_infopro()), ["infopro", "(2, 7)", "block 0"]),
    "infopro on other inputs": (lambda: on((2, 4, 8, 8), plain_infopro(), (2, 30)), ["infopro", "(2, 30)"]),
    "infopro on gray images": (lambda: on((2, 4, 8, 8), plain_infopro(), (2, 1, 8, 8)), ["(2, 1, 8, 8)", "3"]),
    "classifier on 6-D features": (
        lambda: on((2, 4, 3, 3, 3, 3), classifier(10)),
        ["classifier", "(2, 4, 3, 3, 3, 3)", "block 0"],
    ),
    "predsim on 6-D features": (lambda: on((2, 4, 3, 3, 3, 3), predsim(10)), ["predsim", "(2, 4, 3, 3, 3, 3)"]),
    "dgl on 6-D features": (lambda: on((2, 4, 3, 3, 3, 3), dgl(10)), ["dgl", "(2, 4, 3, 3, 3, 3)"]),
    "infopro on 6-D features": (lambda: on((2, 4, 3, 3, 3, 3), plain_infopro()), ["infopro", "(2, 4, 3, 3, 3, 3)"]),
    "dgl on tokens without a grid": (lambda: on((2, 30, 7), dgl(10), (2, 3, 7, 11)), ["dgl", "30", "7x11"]),
    "predsim on tokens without a grid": (lambda: on((2, 30, 7), predsim(10), (2, 3, 7, 11)), ["predsim", "30", "7x11"]),
    "infopro on tokens without a grid": (
        lambda: on((2, 30, 7), plain_infopro(), (2, 3, 7, 11)),
        ["infopro", "30", "7x11"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_arguments_that_cannot_be_used_are_named(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(LocalGradError) as raised:
        call()
    message = str(raised.value)
    assert [word for word in words if word not in message] == []


def test_tokens_without_a_grid_can_still_be_classified() -> None:
    module = classifier(10)(site((2, 30, 7), (2, 3, 7, 11), channel_dim=2))
    assert module(noise(2, 30, 7), torch.tensor([0, 9]), image(2, 3, 7, 11)).isfinite()


@pytest.mark.parametrize("factory", [classifier, dgl, predsim, functools.partial(infopro, mean=MEAN, std=STD)])
def test_a_number_of_classes_may_be_numpys(factory: Callable[..., Any]) -> None:
    head = factory(np.int64(3))(site((2, 8, 8, 8)))
    assert head(noise(2, 8, 8, 8), torch.tensor([0, 2]), image(2, 3, 32, 32)).isfinite()


def test_the_light_head_has_finite_gradients_on_maps_of_one_pixel() -> None:
    """In bf16 on a processor, where taps that see padding alone get gradients that nothing wrote."""
    for seed in range(40):
        torch.manual_seed(seed)
        head: Any = dgl(3, "light")(Site(torch.Size((8, 128, 1, 1)), 1, torch.Size((8, 3, 32, 32)), 0, 2))
        head.to(memory_format=torch.channels_last)
        features = torch.randn(8, 128, 1, 1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(features, torch.arange(8) % 3, torch.zeros(8, 3, 32, 32))
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())
