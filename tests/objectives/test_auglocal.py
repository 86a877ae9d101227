"""AugLocal's heads: which units, what shape, and the loss, against what the released code builds."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import LocalGradError, Site, auglocal, local_step, man, split, units
from localgrad.core.costs import unit_costs
from localgrad.models import BasicBlock, cifar_resnet
from localgrad.objectives.auglocal import depth_at, picked

torch.set_num_threads(1)


def layers(units_per_stage: int) -> list[str]:
    return ["conv1", *(f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(units_per_stage))]


def aug_blocks(depth: int, aug: int, k: int, momentum: Any = None) -> list[Any]:
    """The released blocks: K - d of one layer each, but for the last, which has d + 1."""
    cuts = layers((depth - 2) // 6)[: k - aug - 1]
    torch.manual_seed(0)
    return split(
        cifar_resnet(depth), torch.zeros(2, 3, 32, 32), cuts=cuts, objective=auglocal(10, aug), momentum=momentum
    )


def head_of(block: Any) -> list[tuple[int, int, int]]:
    """Channels in, channels out and stride of each unit."""
    found = [unit for unit in block.objective.classifier if isinstance(unit, BasicBlock)]
    return [(unit.conv1.in_channels, unit.conv2.out_channels, unit.conv1.stride[0]) for unit in found]


def half_even(value: Fraction) -> int:
    below = value.numerator // value.denominator
    rest = value - below
    return below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))


@pytest.mark.parametrize("depth", range(1, 10))
@pytest.mark.parametrize("num_blocks", [2, 3, 11, 14, 52])
def test_the_depth_falls_to_half_and_halves_are_rounded_to_even(depth: int, num_blocks: int) -> None:
    for index in range(num_blocks - 1):
        share = Fraction(index, num_blocks - 2) if num_blocks > 2 else Fraction(0)
        half = Fraction(1, 2)
        wanted = max(1, half_even(depth * (1 - half * share) + half * share))
        assert depth_at(index, num_blocks, depth, 0.5) == wanted
        assert depth_at(index, num_blocks, depth, 0.0) == depth


def test_picked_layers_are_those_of_the_released_code() -> None:
    # resnet32, 16 layers: absolute numbers, the stem 0
    def absolute(index: int, depth: int) -> list[int]:
        return [index + step for step in picked(index, 15 - index, depth)]

    assert absolute(0, 5) == [3, 6, 9, 12, 15]
    assert absolute(6, 2) == [10, 15]  # 10.5, to even
    assert absolute(7, 3) == [10, 12, 15]
    assert absolute(1, 2) == [8, 15]
    assert absolute(13, 5) == [14, 15]  # no more are left
    assert absolute(15, 1) == []


# ((16, 32, 2), (32, 64, 2)) and so on, by layer; auglocal's released code at nominal K = 16
D2 = [((16, 32, 2), (32, 64, 2))] * 6 + [((32, 32, 1), (32, 64, 2))] + [((32, 64, 2), (64, 64, 1))] * 4
D2 += [((64, 64, 1), (64, 64, 1))] * 2
D5 = [((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))] * 3
D5 += [((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))] * 3
D5 += [((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1))] + [((32, 32, 1), (32, 64, 2), (64, 64, 1))] * 2
D5 += [((32, 64, 2), (64, 64, 1), (64, 64, 1))]
D1 = [((16, 64, 2),)] * 6 + [((32, 64, 2),)] * 5 + [((64, 64, 1),)] * 3


@pytest.mark.parametrize(("aug", "table"), [(1, D1), (2, D2), (5, D5)])
def test_units_of_resnet32_have_the_released_widths_and_strides(aug: int, table: list[Any]) -> None:
    blocks = aug_blocks(32, aug, 16)
    assert [tuple(head_of(block)) for block in blocks[:-1]] == table
    for block in blocks[:-1]:
        norms = [layer for layer in block.objective.classifier if isinstance(layer, nn.BatchNorm1d)]
        assert len(norms) == (aug == 1)


@pytest.mark.parametrize(
    ("depth", "aug", "k", "num_blocks", "parameters"),
    [
        (32, 1, 16, 15, 806_412),
        (32, 2, 16, 14, 1_341_058),
        (32, 3, 16, 13, 1_511_608),
        (32, 5, 16, 11, 1_684_388),
        (110, 3, 55, 52, 7_240_702),
        (110, 6, 55, 49, 12_466_400),
    ],
)
def test_heads_have_as_many_parameters_as_released(
    depth: int, aug: int, k: int, num_blocks: int, parameters: int
) -> None:
    blocks = aug_blocks(depth, aug, k)
    assert len(blocks) == num_blocks
    assert sum(p.numel() for block in blocks[:-1] for p in block.objective.parameters()) == parameters


def test_the_loss_is_that_of_residual_units_written_out() -> None:
    block = aug_blocks(32, 5, 16)[3].double()
    shapes = [(16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    written = nn.Sequential(*(BasicBlock(*shape) for shape in shapes)).double().train()
    values = list(block.objective.classifier.parameters())
    for mine, given in zip(written.parameters(), values[:-2], strict=True):
        mine.data.copy_(given)
    features = torch.randn(4, 16, 32, 32, dtype=torch.float64)
    targets = torch.tensor([1, 9, 0, 4])
    scores = written(features).mean((2, 3)) @ values[-2].T + values[-1]
    torch.testing.assert_close(block.objective(features, targets, features), F.cross_entropy(scores.float(), targets))


def test_heads_share_nothing_with_the_network_or_each_other_and_start_from_draws_of_their_own() -> None:
    blocks = aug_blocks(32, 2, 16)
    own = [p for block in blocks[:-1] for p in block.objective.parameters()]
    network = [p for block in blocks for p in block.body.parameters()]
    assert not {id(p) for p in own} & {id(p) for p in network}
    kernels = [p for p in own if p.ndim == 4]
    for kernel in kernels:
        assert not any(p.shape == kernel.shape and torch.equal(p, kernel) for p in network)
    for kernel in kernels[:4]:  # fan-out, as the network
        wanted = (2 / (kernel.shape[0] * kernel.shape[2] * kernel.shape[3])) ** 0.5
        assert abs(float(kernel.detach().std()) / wanted - 1) < 0.1


def test_with_a_momentum_in_front_the_units_after_the_copied_one_are_sampled() -> None:
    torch.manual_seed(0)
    seen: list[Site] = []
    plain = auglocal(10, 2)

    def objective(site: Site) -> nn.Module:
        seen.append(site)
        return plain(site)

    cuts = ["layer1.4", "layer2.4"]
    blocks = split(cifar_resnet(32), torch.zeros(2, 3, 32, 32), cuts=cuts, objective=objective, momentum=man())
    assert [unit.name for unit in seen[0].following] == [*layers(5)[7:], "fc"]
    assert seen[0].features[1:] == (32, 16, 16)
    assert head_of(blocks[0]) == [(32, 32, 1), (32, 64, 2)]  # of layer2.1 to layer3.4: the fourth (4.5) and last


def step(model: nn.Module, size: int, cuts: list[str], aug: int = 2) -> list[Any]:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, size, size)
    blocks = split(model, inputs, cuts=cuts, objective=auglocal(10, aug))
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.01) for block in blocks]
    losses = local_step(blocks, optimizers, inputs, torch.tensor([3, 7]))
    assert all(loss.isfinite() for loss in losses)
    return blocks


def kinds(block: Any) -> list[str]:
    return [type(unit).__name__ for unit in block.objective.classifier]


def test_a_transformer_gets_blocks_of_its_own_kind() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=6, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10
    )
    names = [unit.name for unit in units(model, torch.zeros(2, 3, 16, 16))]
    blocks = step(model, 16, names[:3])
    assert [kinds(block).count("EncoderBlock") for block in blocks[:-1]] == [2, 2, 2]
    assert kinds(blocks[0])[2:] == ["LayerNorm", "TokenPool", "Linear"]


def test_a_network_that_downsamples_between_stages_keeps_its_downsampling_layers() -> None:
    convnext = pytest.importorskip("torchvision.models.convnext")
    settings = [convnext.CNBlockConfig(4, 8, 2), convnext.CNBlockConfig(8, 12, 2), convnext.CNBlockConfig(12, None, 2)]
    model = convnext.ConvNeXt(settings, num_classes=10)
    blocks = step(model, 32, ["features.0"], aug=1)
    # to the last stage: 4 to 8, 8 to 12 channels, and a block
    assert kinds(blocks[0])[2] == "CNBlock"
    assert [p.shape[0] for p in blocks[0].objective.classifier[:2].parameters() if p.ndim == 4] == [8, 12]


def test_networks_without_residual_units_work_too() -> None:
    chain = []
    for channels_in, channels_out in ((3, 4), (4, 8), (8, 8), (8, 12), (12, 12)):
        chain += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    step(nn.Sequential(*chain, nn.Flatten(), nn.Linear(12, 10)), 32, ["0", "3", "12"])
    step(nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.Linear(8, 10)), 2, ["1", "3"])


def test_costs_are_counted_without_data() -> None:
    found = units(cifar_resnet(8), torch.zeros(2, 3, 32, 32))
    costs = unit_costs(found, torch.zeros(4, 3, 32, 32), auglocal(10, 2), None, 4)
    assert [cost.end_flops > 0 for cost in costs[:-1]] == [True] * (len(costs) - 1)
    assert costs[0].end_flops > costs[2].end_flops


@pytest.mark.parametrize(
    "given",
    [{"num_classes": 0}, {"depth": 0}, {"depth": 1.5}, {"depth": True}, {"pyramid": -0.1}, {"pyramid": 2}, {"pool": 0}],
)
def test_arguments_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(LocalGradError, match=next(iter(given))):
        auglocal(**{"num_classes": 10, **given})


def test_a_site_without_the_units_after_it_is_refused() -> None:
    bare = Site(torch.Size((2, 16, 32, 32)), 1, torch.Size((2, 3, 32, 32)), 0, 4)
    with pytest.raises(LocalGradError, match="following"):
        auglocal(10)(bare)


def test_units_and_strides_agree_with_the_record_of_the_released_code() -> None:
    path = Path(__file__).parents[2].parent / "shared" / "oracles" / "auglocal_d2.json"
    if not path.exists():
        pytest.skip("../shared/oracles is not there")
    for block, wanted in zip(aug_blocks(32, 2, 16)[:-1], json.loads(path.read_text())["auxiliary"], strict=True):
        assert [list(p.shape) for p in block.objective.classifier.parameters()] == wanted["cls_shapes"]
        assert [stride for _, _, stride in head_of(block)] == wanted["strides"]


def test_a_pooled_head_sees_the_mean_of_squares_and_costs_a_quarter() -> None:
    torch.manual_seed(0)
    cuts = ["layer1.0", "layer2.0"]
    blocks: Any = split(cifar_resnet(8), torch.zeros(2, 3, 32, 32), cuts=cuts, objective=auglocal(10, 2, pool=2))
    head = blocks[0].objective.classifier
    features = torch.randn(4, 16, 32, 32)
    small = features.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(head(features), head[1:](small))
    found = units(cifar_resnet(8), torch.zeros(2, 3, 32, 32))
    plain, pooled = (
        unit_costs(found, torch.zeros(4, 3, 32, 32), auglocal(10, 2, pool=side), None, 4)[1].end_flops
        for side in (1, 2)
    )
    assert abs(pooled / plain - 0.25) < 0.005
    with pytest.raises(LocalGradError, match="pool is 2 and features are"):
        split(
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 10)),
            torch.zeros(2, 4),
            cuts=["0"],
            objective=auglocal(10, pool=2),
        )


def test_features_are_left_as_they_are() -> None:
    block = aug_blocks(32, 2, 16)[4]
    features = torch.randn(2, 16, 32, 32)
    before: Tensor = features.clone()
    block.objective(features, torch.tensor([0, 1]), features)
    assert torch.equal(features, before)
