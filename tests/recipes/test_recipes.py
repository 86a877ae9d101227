"""The recipes: the papers' rows, each a complete config."""

import json
import sys
from functools import cache
from itertools import pairwise

import pytest
import torch

import localgrad
from localgrad.config.build import build_blocks, build_model, build_optimizers
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.saved import differences, from_dict, to_dict
from localgrad.core.momentum import MomentumAuxiliary
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.recipes import RECIPES, Recipe, recipe
from localgrad.recipes.tables import TABLES, table

K8 = ["layer1.0", "layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"]
K16 = [f"layer{stage}.{unit}" for stage in (1, 2) for unit in range(5)] + [f"layer3.{unit}" for unit in range(4)]


@cache
def _rows() -> dict[str, Recipe]:
    return {name: make() for name, make in RECIPES.items()}


@cache
def _unit_names(depth: int) -> list[str]:
    return [unit.name for unit in localgrad.units(cifar_resnet(depth), torch.zeros(2, 3, 32, 32))]


def test_every_row_is_a_valid_config_under_its_own_name() -> None:
    for name, row in _rows().items():
        assert row.config.name == name
        assert validate(row.config) is row.config
        assert row.num_blocks == len(row.config.cuts or ()) + 1


def test_every_row_survives_json() -> None:
    for row in _rows().values():
        config = with_defaults(row.config)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("depth", [14, 32, 110])
def test_cuts_are_units_in_the_networks_order(depth: int) -> None:
    names = _unit_names(depth)
    rows = [row.config for row in _rows().values() if row.config.model.name == "cifar_resnet"]
    partitions = {config.cuts for config in rows if config.model.depth == depth}
    assert len(partitions) >= 2
    for cuts in partitions:
        assert cuts is not None
        positions = [names.index(cut) for cut in cuts]
        assert positions == sorted(set(positions))
        assert not cuts or positions[-1] < len(names) - 2, "the last unit and fc belong to the last block"


@pytest.mark.parametrize(
    ("name", "num_cuts"),
    [
        ("cifar10-resnet32-e2e", 0),
        ("cifar10-resnet32-k8-dgl", 7),
        ("cifar10-resnet32-k8-stem-dgl-manpp", 8),
        ("cifar10-resnet32-k16-dgl-man", 14),
        ("cifar10-resnet32-k16-stem-infopro", 15),
        ("svhn-resnet110-k32-predsim", 31),
        ("stl10-resnet110-k55-classifier-man", 53),
        ("cifar10-resnet110-k55-stem-dgl", 54),
    ],
)
def test_number_of_cuts(name: str, num_cuts: int) -> None:
    row = recipe(name)
    assert len(row.config.cuts or ()) == num_cuts
    assert row.num_blocks == num_cuts + 1


def test_cut_names_of_resnet32() -> None:
    assert recipe("cifar10-resnet32-k8-dgl").config.cuts == tuple(K8)
    assert recipe("cifar10-resnet32-k16-dgl").config.cuts == tuple(K16)
    assert recipe("cifar10-resnet32-k16-stem-dgl").config.cuts == ("conv1", *K16)


def test_cut_names_of_resnet110_with_32_blocks() -> None:
    first_two = [1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17]
    stages = (first_two, first_two, [1, 3, 4, 6, 7, 9, 11, 13, 15])
    expected = [f"layer{stage}.{unit}" for stage, units in enumerate(stages, start=1) for unit in units]
    assert recipe("cifar10-resnet110-k32-dgl").config.cuts == tuple(expected)


def test_the_papers_errors_are_on_their_rows_only() -> None:
    published = {name: row.paper_error for name, row in _rows().items() if row.paper_error is not None}
    assert len(published) == 32
    assert published["cifar10-resnet32-k16-dgl-man"] == 9.11
    assert published["cifar10-resnet32-k8-infopro"] == 11.51
    assert published["cifar10-resnet110-e2e"] == 5.42
    assert published["cifar10-resnet110-k55-infopro-man"] == 9.77
    assert published["cifar10-resnet32-k16-dgl-man-ema-only"] == 11.07
    assert published["imagenet-resnet101-k4-infopro-man"] == 21.73
    assert published["imagenet-resnet152-k2-infopro"] == 21.45
    assert published["imagenet-resnext101-k2b-infopro"] == 20.35
    assert not any("imagenette" in name or "bias-only" in name or "-vit-" in name for name in published)


@pytest.mark.parametrize(
    ("dataset", "lr", "batch_size"), [("cifar10", 0.8, 1024), ("svhn", 0.8, 1024), ("stl10", 0.1, 128)]
)
def test_settings_of_the_datasets(dataset: str, lr: float, batch_size: int) -> None:
    config = recipe(f"{dataset}-resnet32-k8-dgl-man").config
    optim = config.optim
    assert (optim.lr, optim.batch_size, optim.epochs) == (lr, batch_size, 400)
    assert (optim.momentum, optim.nesterov, optim.weight_decay) == (0.9, True, 1e-4)
    assert config.data == getattr(localgrad.data.config, dataset)()
    assert config.momentum.decay == 0.995


@pytest.mark.parametrize(
    ("name", "reconstruction", "task"),
    [
        ("cifar10-resnet32-k8-infopro", (5, 0), (0, 2)),
        ("cifar10-resnet32-k16-infopro-man", (5, 0.2), (0.05, 0.5)),
        ("cifar10-resnet110-k55-infopro", (5, 0.5), (0, 1)),
        ("svhn-resnet110-k55-infopro", (5, 0.5), (0.2, 1)),
        ("stl10-resnet32-k8-infopro", (20, 5), (0.2, 1)),
    ],
)
def test_weights_of_infopro(name: str, reconstruction: tuple[float, float], task: tuple[float, float]) -> None:
    objective = recipe(name).config.objective
    assert (objective.reconstruction, objective.task) == (reconstruction, task)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("cifar10-resnet32-k16-infopro", [(4, 13 / 14), (5, 12 / 14), (5, 11 / 14)]),
        ("cifar10-resnet110-k55-infopro", [(17, 52 / 53), (18, 51 / 53), (18, 50 / 53)]),
    ],
)
def test_weights_of_infopro_as_released_with_man_follow_the_stage(name: str, stages: list[tuple[int, float]]) -> None:
    shares = [share for number, share in stages for _ in range(number)]
    for momentum in ("", "-man"):
        row, published = recipe(f"{name}{momentum}-released"), recipe(f"{name}{momentum}")
        objective = row.config.objective
        assert objective.reconstruction == pytest.approx([5 * share for share in shares])
        assert objective.task == pytest.approx([0.5 * share for share in shares])
        assert (objective.head, objective.loss, row.config.momentum) == (
            *("2c2f", "cross_entropy"),
            published.config.momentum,
        )
        assert row.config.cuts == published.config.cuts


@pytest.mark.parametrize("method", ["classifier", "predsim", "dgl", "infopro"])
@pytest.mark.parametrize("momentum", ["", "-man", "-manpp"])
def test_rows_build_the_blocks_that_they_name(method: str, momentum: str) -> None:
    row = recipe(f"cifar10-resnet32-k8-{method}{momentum}")
    blocks = build_blocks(row.config, cifar_resnet(32), num_classes=10)
    assert [block.names[-1] for block in blocks[:-1]] == list(row.config.cuts or ())
    assert len(blocks) == row.num_blocks
    assert all((block.momentum is not None) == bool(momentum) for block in blocks[:-1])
    kinds = {type(block.objective).__name__.lower() for block in blocks[:-1]}
    assert len(kinds) == 1
    assert blocks[-1].objective is None


def test_a_mistyped_name_gets_the_closest_ones() -> None:
    with pytest.raises(LocalGradError, match=r"no recipe 'digits-dgl-mann' \(.*\bdigits-dgl-man\b"):
        recipe("digits-dgl-mann")


@cache
def _blocks(name: str) -> list[localgrad.Block]:
    """The blocks of a recipe, without numbers in the weights."""
    row = recipe(name)
    classes = 1000 if name.startswith("imagenet-") else 10
    with torch.device("meta"):
        return build_blocks(row.config, build_model(row.config.model, classes), classes)


@pytest.mark.filterwarnings("ignore::localgrad.errors.DefaultsWarning")
@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("imagenette-resnet50-k4-dgl-man", "layer2.0 layer3.0 layer3.4"),
        ("imagenette-resnet101-k4-infopro-man", "layer3.0 layer3.9 layer3.17"),
        ("imagenet-resnet101-k2-infopro", "layer2.0"),
        ("imagenet-resnet152-k4b-infopro-manpp", "layer2.6 layer3.13 layer3.25"),
        ("imagenet-resnext101-k2b-infopro-man", "layer2.2"),
        ("imagenet-vit-tiny-k4-classifier-manpp", "blocks.2 blocks.5 blocks.8"),
    ],
)
def test_large_rows_build_the_blocks_that_they_name(name: str, cuts: str) -> None:
    row, blocks = recipe(name), _blocks(name)
    assert [block.names[-1] for block in blocks[:-1]] == cuts.split()
    assert row.label == f"K={len(blocks)}"
    for block, following in pairwise(blocks):
        assert (block.momentum is not None) == ("man" in name)
        if isinstance(block.momentum, MomentumAuxiliary):
            assert block.momentum.ema is not None
            copied = [parameter.shape for parameter in block.momentum.ema.parameters()]
            assert copied == [parameter.shape for parameter in following.body[0].parameters()]
            assert (block.momentum.scale is not None) == name.endswith("manpp")


def test_imagenet_heads_have_the_released_number_of_parameters() -> None:
    head, trained = _blocks("imagenet-resnet101-k2-infopro-man")[0], {"resnet101": 280_064, "resnext101": 601_088}
    assert head.objective is not None
    assert sum(parameter.numel() for parameter in head.objective.parameters()) == 4_750_259
    for network, parameters in trained.items():
        momentum = _blocks(f"imagenet-{network}-k2-infopro-man")[0].momentum
        assert isinstance(momentum, MomentumAuxiliary)
        assert isinstance(momentum.bias, torch.nn.Module)
        assert sum(parameter.numel() for parameter in momentum.bias.parameters()) == parameters


def test_settings_of_imagenet_and_imagenette() -> None:
    for dataset in ("imagenet", "imagenette"):
        config = recipe(f"{dataset}-resnet101-k4-infopro").config
        optim, objective = config.optim, config.objective
        assert (optim.lr, optim.batch_size, optim.epochs, optim.warmup_epochs) == (0.05, 128, 90, 0)
        assert optim.first_epoch == 0
        assert (objective.reconstruction, objective.task, objective.head) == ((5, 5), (0.75, 0.75), "imagenet")
        assert config.data == getattr(localgrad.data.config, dataset)()
    assert recipe("imagenet-resnet152-k4-infopro").config.objective.task == (1, 1)


@pytest.mark.filterwarnings("ignore::localgrad.errors.DefaultsWarning")
def test_transformers_are_trained_by_adamw() -> None:
    config = recipe("imagenet-vit-tiny-k4-classifier-manpp").config
    optimizers = build_optimizers(config.optim, _blocks(config.name))
    assert len(optimizers) == 4
    for optimizer in optimizers:
        assert isinstance(optimizer, torch.optim.AdamW)
        defaults = optimizer.defaults
        assert (defaults["lr"], defaults["betas"], defaults["weight_decay"]) == (1e-3, (0.9, 0.999), 0.05)
    assert isinstance(build_optimizers(recipe("digits-e2e").config.optim, _blocks("digits-e2e"))[0], torch.optim.SGD)


def test_configs_need_no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    row = recipe("imagenet-vit-base-k4-classifier-manpp")
    assert with_defaults(validate(row.config)).momentum.initial == "copy"
    with pytest.raises(LocalGradError, match=r"^timm:"):
        build_model(row.config.model, 10)


@pytest.mark.parametrize(
    ("row", "ema", "bias", "decay"),
    [
        ("-ema-only", True, False, 0.995),
        ("-bias-only", False, True, 0.995),
        ("-direct", True, False, 0.0),
        ("", True, True, 0.995),
        ("-decay0.9", True, True, 0.9),
        ("-decay0.999", True, True, 0.999),
    ],
)
def test_ablations_of_the_parts(row: str, ema: bool, bias: bool, decay: float) -> None:
    momentum = _blocks(f"cifar10-resnet32-k16-dgl-man{row}")[0].momentum
    assert isinstance(momentum, MomentumAuxiliary)
    assert (momentum.ema is not None, momentum.bias is not None, momentum.decay) == (ema, bias, decay)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_ablation_of_the_depth_really_copies_so_many_units(depth: int) -> None:
    row = f"-depth{depth}" if depth > 1 else ""
    blocks = _blocks(f"cifar10-resnet32-k4-dgl-man{row}")
    for block, following in pairwise(blocks):
        assert isinstance(block.momentum, MomentumAuxiliary)
        assert block.momentum._units == tuple(following.body[:depth])
        assert block.momentum.depth == depth


def test_ablations_change_one_setting_of_the_full_method() -> None:
    full = recipe("cifar10-resnet32-k16-dgl-man").config
    changed = {
        "fused": {"momentum.form: 'sum' -> 'fused'"},
        "random": {"momentum.initial: 'copy' -> 'random'"},
        "direct": {"momentum.bias: True -> False", "momentum.decay: 0.995 -> 0.0"},
    }
    for row, expected in changed.items():
        config = recipe(f"{full.name}-{row}").config
        found = set(differences(with_defaults(full), with_defaults(config)))
        assert found - {f"name: {full.name!r} -> {config.name!r}"} == expected


def test_tables_list_recipes_and_none_twice() -> None:
    for name, listed in TABLES.items():
        assert table(name) is listed
        assert set(listed.rows) <= RECIPES.keys()
        assert len(set(listed.rows)) == len(listed.rows) >= 2, name


def test_rows_of_the_main_tables() -> None:
    k16 = "cifar10-resnet32-k16"
    first = ["predsim", "predsim-man", "dgl", "dgl-man", "dgl-manpp", "infopro", "infopro-man"]
    assert table("first").rows == ("cifar10-resnet32-e2e", *(f"{k16}-{row}" for row in first))
    assert len(table("cifar10").rows) == 2 + 4 * 9
    errors = {name: recipe(name).paper_error for name in table("cifar10").rows}
    assert sum(error is not None for error in errors.values()) == 18, "the paper's table is whole"
    assert len(table("ablation-depth").rows) == 4
    assert [name for name in table("imagenet-resnet101").rows if "k4-" in name] == [
        f"imagenet-resnet101-k4-infopro{momentum}" for momentum in ("", "-man", "-manpp")
    ]


def test_a_mistyped_table_gets_the_closest_ones() -> None:
    with pytest.raises(LocalGradError, match=r"no table 'ablation-part' \(.*\bablation-parts\b"):
        table("ablation-part")


def test_auglocal_cuts_after_each_layer_and_keeps_d_plus_one_in_the_last_block() -> None:
    for depth, units, k, blocks in ((2, 5, 16, 14), (5, 5, 16, 11), (3, 18, 55, 52), (6, 18, 55, 49)):
        network = 6 * units + 2
        row = recipe(f"cifar10-resnet{network}-k{k}-auglocal-d{depth}")
        assert row.num_blocks == blocks
        names = _unit_names(network)
        assert list(row.config.cuts or ()) == names[: blocks - 1]
        assert len(names) - 1 - (blocks - 1) == depth + 1  # the head beside


def test_rows_with_reach_are_their_rows_but_for_that() -> None:
    for name, row in _rows().items():
        plain_name, _, reach = name.partition("-reach")
        if reach:
            plain = recipe(plain_name).config
            assert differences(plain, row.config) == [f"name: {plain.name!r} -> {name!r}", f"reach: 1 -> {reach}"]
