"""The cheaper forms of MAN: a 1x1 convolution as the trained part, and branches on pooled features."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import LocalGradError, dgl, infopro, local_step, man, split, units
from localgrad.models import cifar_resnet

torch.set_num_threads(1)


def blocks_of(momentum: Any, size: int = 12, objective: Any = None, cuts: tuple[str, ...] = ("layer1.0",)) -> list[Any]:
    torch.manual_seed(0)
    return split(
        cifar_resnet(8).double(),
        torch.zeros(2, 3, size, size, dtype=torch.float64),
        cuts=list(cuts),
        objective=objective or dgl(10),
        momentum=momentum,
    )


def features(size: int = 12) -> Tensor:
    return torch.randn(4, 16, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [12, 13])
def test_a_1x1_convolution_is_added_to_the_average_with_the_units_stride(size: int) -> None:
    block = blocks_of(man(0.9, bias_form="conv1x1"), size)[0]
    layer, given = block.momentum.bias, features(size)
    assert torch.equal(block.momentum(given), block.momentum.ema(given))  # it starts at 0
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    taken = given[:, :, ::2, ::2]  # layer2.0 has stride 2
    written = torch.einsum("oi,nihw->nohw", layer.weight[:, :, 0, 0], taken) + layer.bias[:, None, None]
    torch.testing.assert_close(block.momentum(given), written + block.momentum.ema(given))


def test_the_1x1_convolution_is_trained_and_the_average_is_not() -> None:
    blocks = blocks_of(man(0.9, bias_form="conv1x1"))
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    average = [p.clone() for p in blocks[0].momentum.ema.parameters()]
    source = [p.clone() for p in blocks[1].body[0].parameters()]
    inputs = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    local_step(blocks, optimizers, inputs, torch.arange(4))
    assert blocks[0].momentum.bias.weight.abs().sum() > 0
    for now, before, followed in zip(blocks[0].momentum.ema.parameters(), average, source, strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * followed)


def test_tokens_get_a_linear_layer() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10
    )
    inputs = torch.randn(2, 3, 16, 16)
    name = units(model, inputs)[1].name
    block = split(model, inputs, cuts=[name], objective=dgl(10, "light"), momentum=man(bias_form="conv1x1"))[0]
    assert isinstance(block.momentum.bias, nn.Linear)
    tokens = torch.randn(2, 5, 8)
    assert torch.equal(block.momentum(tokens), block.momentum.ema(tokens))


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"bias_form": "conv1x1"}, {"form": "fused"}])
def test_pooled_branches_see_the_mean_of_squares(size: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    seen: list[torch.Size] = []

    def objective(site: Any) -> nn.Module:
        seen.append(site.features)
        return dgl(10)(site)

    block = blocks_of(man(0.9, pool=2, **settings), size, objective)[0]
    given = features(size)
    small = F.avg_pool2d(given, 2, ceil_mode=True)
    expected = block.momentum.ema(small)
    if isinstance(block.momentum.bias, nn.Module):
        expected = expected + block.momentum.bias(small)
    torch.testing.assert_close(block.momentum(given), expected)
    assert seen[0][1:] == block.momentum(given).shape[1:]  # the objective is built for the smaller map


def test_a_decoder_behind_pooled_branches_still_reconstructs_the_whole_image() -> None:
    objective = infopro(10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), task=(0.5, 0.5))
    blocks = blocks_of(man(pool=2), 16, objective, ("layer1.0", "layer2.0"))
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    losses = local_step(blocks, optimizers, torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.arange(4))
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias_form": "low-rank"}, "bias_form is"),
        ({"bias_form": "conv1x1", "bias": False}, "without a trained part"),
        ({"bias_form": "conv1x1", "form": "fused"}, "without a trained part"),
        ({"pool": 0}, "pool is"),
        ({"pool": True}, "pool is"),
        ({"pool": 1.5}, "pool is"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LocalGradError, match=said):
        man(**settings)


def test_features_that_cannot_be_pooled_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 10))
    with pytest.raises(LocalGradError, match=r"pool is 2 and features are \(2, 5\)"):
        split(model, torch.zeros(2, 4), cuts=["0"], objective=dgl(10), momentum=man(pool=2))
