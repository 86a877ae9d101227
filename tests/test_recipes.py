"""The recipes: the papers' rows, each a complete config."""

import json
from functools import cache

import pytest
import torch

import localgrad
from localgrad.build import build_blocks, with_defaults
from localgrad.config import from_dict, to_dict, validate
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.recipes import RECIPES, Recipe, recipe

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
    partitions = {row.config.cuts for row in _rows().values() if row.config.model.depth == depth}
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
    assert len(published) == 18
    assert published["cifar10-resnet32-k16-dgl-man"] == 9.11
    assert published["cifar10-resnet32-k8-infopro"] == 11.51
    assert published["cifar10-resnet110-e2e"] == 5.42
    assert published["cifar10-resnet110-k55-infopro-man"] == 9.77


@pytest.mark.parametrize(
    ("dataset", "lr", "batch_size"), [("cifar10", 0.8, 1024), ("svhn", 0.8, 1024), ("stl10", 0.1, 128)]
)
def test_settings_of_the_datasets(dataset: str, lr: float, batch_size: int) -> None:
    config = recipe(f"{dataset}-resnet32-k8-dgl-man").config
    optim = config.optim
    assert (optim.lr, optim.batch_size, optim.epochs) == (lr, batch_size, 400)
    assert (optim.momentum, optim.nesterov, optim.weight_decay) == (0.9, True, 1e-4)
    assert config.data == getattr(localgrad.data, dataset)()
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
    with pytest.raises(LocalGradError, match=r"no recipe 'digits-dgl-mann' \(did you mean digits-dgl-man"):
        recipe("digits-dgl-mann")
