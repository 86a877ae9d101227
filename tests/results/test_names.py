"""What the report calls images, networks and runs, and the command that makes a run again."""

import json
import shlex
from dataclasses import replace

import pytest

from helpers.results import make_config
from localgrad.commands.main import main
from localgrad.config.methods import with_defaults
from localgrad.config.saved import from_dict
from localgrad.config.schema import ModelConfig, TrainConfig
from localgrad.recipes import RECIPES
from localgrad.results.names import command, dataset_label, network_label, without_paths


@pytest.mark.parametrize(
    ("recipe", "source", "label"),
    [
        ("cifar10-resnet32-e2e", "uoft-cs/cifar10", "CIFAR-10"),
        ("cifar10-resnet32-e2e", "/data/CIFAR-10-images/", "CIFAR-10"),
        ("cifar10-resnet32-e2e", "/data/cifar-10-python", "CIFAR-10"),
        ("cifar10-resnet32-e2e", "/data/cifar100", "cifar100"),
        ("cifar10-resnet32-e2e", "/home/me/holiday photos", "holiday photos"),
        ("cifar10-resnet32-e2e", "C:\\photos\\cats", "cats"),
        ("imagenet-resnet50-e2e", "/data/imagenette", "Imagenette"),
        ("imagenette-resnet50-e2e", "/data/imagenette2-160", "Imagenette"),
        ("digits-e2e", "digits", "Digits"),
        ("digits-e2e", "my/digits", "digits (own images)"),
        ("digits-e2e", "my/mnist", "mnist"),
        ("", "my/svhn", "SVHN"),
    ],
)
def test_own_images_are_called_by_their_name(recipe: str, source: str, label: str) -> None:
    config = make_config(recipe) if recipe in RECIPES else TrainConfig(name=recipe)
    assert dataset_label(replace(config, data=replace(config.data, source=source))) == label


def test_the_name_that_was_given_to_images_counts() -> None:
    config = make_config("cifar10-resnet32-e2e")
    named = replace(config.data, source="/somewhere/train", name="my cats")
    assert dataset_label(replace(config, data=named)) == "my cats"


@pytest.mark.parametrize(
    ("name", "label"),
    [("cifar_resnet", "ResNet-110"), ("torchvision:resnet50", "resnet50"), ("timm:vit_tiny", "vit_tiny")],
)
def test_networks(name: str, label: str) -> None:
    assert network_label(TrainConfig(model=ModelConfig(name, depth=110))) == label


@pytest.mark.parametrize("name", ["digits-dgl-man", "cifar10-resnet32-k16-infopro-man", "imagenette-resnet50-k4-dgl"])
def test_the_command_makes_the_config_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(name, epochs=3, seed=7, local_heads=True, channels_last=False)
    fewer = replace(config, cuts=config.cuts and config.cuts[:2], optim=replace(config.optim, nesterov=False))
    config = with_defaults(fewer)
    program, *words = shlex.split(command(config))
    assert program == "localgrad"
    assert main([*words, "--dry-run"]) == 0
    assert from_dict(json.loads(capsys.readouterr().out)) == config


def test_absolute_paths_are_left_out_of_commands() -> None:
    config = make_config("cifar10-resnet32-e2e")
    config = replace(config, data=replace(config.data, source="/home/me/my cifar10"))
    assert "--data.source 'path/to/my cifar10'" in command(config)
    assert without_paths("localgrad train x --data /home/me/cifar10 --lr 0.1") == (
        "localgrad train x --data path/to/cifar10 --lr 0.1"
    )
    assert without_paths("an 'unfinished quotation") == "an 'unfinished quotation"
