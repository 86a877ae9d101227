"""Configs: all problems at once, and a JSON form that is read strictly."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from localgrad.config import schema
from localgrad.config.build import build_model
from localgrad.config.checks import validate
from localgrad.config.methods import option_problems, with_defaults
from localgrad.config.saved import differences, from_dict, to_dict
from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.core import split
from localgrad.errors import LocalGradError
from localgrad.planning import simulation

LOCAL = TrainConfig(cuts=("layer1.0",), objective=ObjectiveConfig(name="dgl"), momentum=MomentumConfig(name="man"))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0"),
        ({"lr": float("nan")}, "optim.lr is nan"),
        ({"lr": float("inf")}, "optim.lr is inf"),
        ({"momentum": 1.0}, "optim.momentum is 1.0"),
        ({"momentum": 0.0}, "optim.nesterov is on with optim.momentum 0"),
        ({"name": "adamw"}, "optim.nesterov is on, but optim.name adamw has no such form"),
        ({"name": "adam", "nesterov": False}, "optim.name is 'adam'; it must be one of sgd, adamw"),
        ({"weight_decay": -1.0}, "optim.weight_decay is -1.0"),
        ({"batch_size": 0}, "optim.batch_size is 0"),
        ({"epochs": 0}, "optim.epochs is 0"),
        ({"warmup_epochs": -1}, "optim.warmup_epochs is -1"),
        ({"first_epoch": 2}, "optim.first_epoch is 2"),
        ({"clip_norm": 0.0}, "optim.clip_norm is 0.0"),
        ({"clip_norm": float("inf")}, "optim.clip_norm is inf"),
        ({"accumulate": 0}, "optim.accumulate is 0"),
        ({"accumulate": 5, "batch_size": 4}, "optim.accumulate is 5"),
        ({"label_smoothing": 1.0}, "optim.label_smoothing is 1.0"),
    ],
)
def test_numbers_out_of_range(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        validate(replace(LOCAL, optim=OptimConfig(**optim)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"devices": 3}, "batch_size 1024 cannot be shared by 3 devices"),
        ({"seed": -1}, "seed is -1"),
        (
            {"step_each_block": True, "optim": OptimConfig(accumulate=2)},
            "step_each_block is on with optim.accumulate 2.*use one of the two",
        ),
        ({"reach": 0}, "reach is 0"),
        ({"reach": 2, "parallel": "blocks", "devices": 2}, "reach is 2, .*neither with --parallel blocks"),
        ({"reach": 2, "parallel": "shards", "devices": 2}, "reach is 2, .*--parallel shards"),
        ({"reach": 2, "cuts": (), "objective": ObjectiveConfig(), "momentum": MomentumConfig()}, "reach is 2, but"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"cuts": None}, "cuts is None and num_blocks is None, give exactly one"),
        ({"num_blocks": 2}, "give exactly one"),
        ({"cuts": None, "num_blocks": 0}, "num_blocks is 0"),
        ({"objective": ObjectiveConfig()}, "blocks that are cut off need a local loss"),
        ({"cuts": ()}, "objective.name is dgl, but without a cut"),
        ({"cuts": (), "objective": ObjectiveConfig()}, "momentum.name is man, but without a local loss"),
        ({"precision": "16"}, "precision is '16'"),
        ({"balance": "luck"}, "balance is 'luck'"),
        ({"accelerator": "abacus"}, "accelerator is 'abacus'"),
        ({"objective": ObjectiveConfig(name="dlg")}, r"objective.name is 'dlg' \(.*\bdgl\?\)"),
        ({"objective": ObjectiveConfig(name="dgl", beta=0.5)}, "objective.beta is given, but dgl has no such option"),
        (
            {"momentum": MomentumConfig(name="manpp", form="sum")},
            "momentum.form is given, but manpp has no such option",
        ),
        ({"momentum": MomentumConfig(decay=0.9)}, "momentum.decay is given, but momentum.name is none"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        validate(replace(LOCAL, **changes))


def test_all_problems_come_at_once_in_one_line() -> None:
    broken = replace(LOCAL, seed=-1, precision="half", optim=OptimConfig(lr=-1.0), objective=ObjectiveConfig("dlg"))  # type: ignore[arg-type]
    with pytest.raises(LocalGradError) as caught:
        validate(broken)
    message = str(caught.value)
    assert all(name in message for name in ("seed", "precision", "optim.lr", "objective.name"))
    assert "\n" not in message


def test_num_blocks_instead_of_cuts_and_one_block_are_fine() -> None:
    for config in (replace(LOCAL, cuts=None, num_blocks=4), TrainConfig(cuts=()), TrainConfig(num_blocks=1)):
        assert validate(config) is config


def test_choices_of_the_core_are_those_of_a_config() -> None:
    assert get_args(schema.Balance) == get_args(split.Balance)
    assert get_args(schema.Precision) == ("auto", *get_args(simulation.Precision))


def test_json_gives_the_config_back() -> None:
    config = replace(LOCAL, optim=OptimConfig(lr=1, clip_norm=2), objective=ObjectiveConfig("infopro", task=(0, 1)))
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.optim.lr, float)
    assert again.cuts == ("layer1.0",)


def test_fields_left_out_keep_their_defaults() -> None:
    assert from_dict({"seed": 3}) == TrainConfig(seed=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"config is \[\]; it should be an object"),
        ({"optim": 3}, "config.optim is 3; it should be an object"),
        ({"sed": 3}, r"'sed' \(.*\bseed\?\)"),
        ({"optim": {"lrr": 3}}, r"config\.optim .*'lrr' \(.*\blr\b"),
        ({"seed": "3"}, "config.seed is '3'; it should be a valid integer"),
        ({"seed": True}, "config.seed is True"),
        ({"seed": 1.5}, "config.seed is 1.5"),
        ({"channels_last": 1}, "config.channels_last is 1"),
        ({"optim": {"lr": "__import__('os')"}}, "config.optim.lr is"),
        ({"cuts": "layer1.0"}, "config.cuts is 'layer1.0'"),
        ({"cuts": [1]}, r"config.cuts.0 is 1"),
        ({"objective": {"task": [0.0, "one"]}}, "config.objective.task.1 is 'one'"),
        ({"precision": "fp8"}, "config.precision is 'fp8'"),
    ],
)
def test_unknown_names_and_wrong_types_are_named(values: Any, message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        from_dict(values)


def test_all_json_problems_come_at_once() -> None:
    with pytest.raises(LocalGradError, match=r"config\.optim\.lr.*'sed'"):
        from_dict({"sed": 3, "optim": {"lr": None}})


def test_differences_name_the_nested_fields() -> None:
    other = replace(LOCAL, seed=4, optim=replace(LOCAL.optim, lr=0.1))
    assert differences(LOCAL, other) == ["optim.lr: 0.8 -> 0.1", "seed: 0 -> 4"]
    assert differences(LOCAL, LOCAL) == []


def test_defaults_are_written_out_and_change_nothing_given() -> None:
    config = with_defaults(replace(LOCAL, momentum=MomentumConfig(name="man", decay=0.5)))
    assert (config.momentum.decay, config.momentum.form, config.momentum.bias) == (0.5, "sum", True)
    assert config.objective.head == "compact"
    assert config.objective.beta is None
    assert with_defaults(TrainConfig(cuts=())) == TrainConfig(cuts=())
    assert option_problems("momentum", config.momentum) == []


@pytest.mark.parametrize("name", ["cifar_resnet", "torchvision:mobilenet_v3_small", "timm:test_resnet"])
def test_models_by_name(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = build_model(ModelConfig(name, depth=8), num_classes=7)
    assert isinstance(model, nn.Module)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet19", r"torchvision .*'resnet19' \(.*\bresnet1"),
        ("timm:resnet19", r"timm has no model 'resnet19'"),
        ("resnet18", "'resnet18'"),
    ],
)
def test_models_that_are_not_there(name: str, message: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(LocalGradError, match=message):
        build_model(ModelConfig(name), num_classes=10)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(LocalGradError, match=r"pip install 'localgrad\[timm\]'"):
        build_model(ModelConfig("timm:resnet18"), num_classes=10)
