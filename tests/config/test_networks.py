"""Networks and weights of one's own: by module or file, pretrained, from a run, frozen; all checked before a step."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from localgrad.config.networks import build_model, check_scores, located_model
from localgrad.config.schema import ModelConfig
from localgrad.config.weights import load_weights
from localgrad.data.config import digits, imagenette
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet

OWN = """
from torch import nn
class Net(nn.Sequential):
    pass
def net(num_classes, width=4):
    return Net(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
def broken(num_classes):
    return 1 / 0
def number(num_classes):
    return num_classes
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mynets").mkdir()
    (tmp_path / "mynets" / "__init__.py").write_text("")
    (tmp_path / "mynets" / "nets.py").write_text(OWN)
    (tmp_path / "single.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", ["mynets.nets", "single.py", "./mynets/nets.py"])
def test_a_network_of_ones_own(own: Path, where: str) -> None:
    model = build_model(ModelConfig(f"{where}:net"), 5)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    check_scores(model, where, 8, 5)


def test_a_file_means_the_same_from_another_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = located_model(ModelConfig("single.py:net"))
    monkeypatch.chdir("/")
    assert config.name == f"{own}/single.py:net" and build_model(config, 5)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("single.py:nett", r"has no function 'nett' \(.*\bnet\b"),
        ("absent.py:net", "there is no file absent.py"),
        ("absent.module:net", r"cannot be imported \(No module named 'absent'\); run localgrad in its folder"),
        ("single.py:nothing_like_it", r"has no function 'nothing_like_it'; it has .*net"),
        ("single.py:broken", r"failed: ZeroDivisionError: division by zero \(.*single.py, line 10\)"),
        ("single.py:number", "gave a int: it must give a torch.nn.Module"),
        ("resnet18", "give cifar_resnet, torchvision:NAME, timm:NAME, package.module:factory"),
    ],
)
def test_a_network_that_cannot_be_had(own: Path, name: str, message: str) -> None:
    with pytest.raises(LocalGradError, match=message):
        build_model(ModelConfig(name), 5)


def test_scores_of_other_classes_are_refused(own: Path) -> None:
    model = build_model(ModelConfig("single.py:fixed"), 5)
    with pytest.raises(LocalGradError, match=r"gives \(2, 7\) for 2 images: .* each of the 5 classes"):
        check_scores(model, "single.py:fixed", 8, 5)
    with pytest.raises(LocalGradError, match=r"on images of 16 x 16 pixels failed: RuntimeError"):
        check_scores(model, "single.py:fixed", 16, 7)
    assert model.training


def test_weights_of_a_run_or_file_go_in_and_another_head_begins_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before, folder = cifar_resnet(8, num_classes=4), tmp_path / "run"
    folder.mkdir()
    save_file(before.state_dict(), folder / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in before.state_dict().items()}}, tmp_path / "w.pt")
    for weights in (str(folder), str(folder / "model.safetensors"), str(tmp_path / "w.pt")):
        config = ModelConfig(depth=8, weights=weights)
        same, other = build_model(config, 4), build_model(config, 6)
        head = other.get_parameter("fc.weight").clone()
        assert "anew" not in str(load_weights(same, config, 4))
        assert str(load_weights(other, config, 6)).endswith(" 6 classes")
        assert all(
            torch.equal(a, b) for a, b in zip(same.state_dict().values(), before.state_dict().values(), strict=True)
        )
        assert torch.equal(other.get_parameter("conv1.weight"), before.conv1.weight)
        assert torch.equal(other.get_parameter("fc.weight"), head)
    assert load_weights(before, ModelConfig(depth=8), 4) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("other.pt", r"is not of this network: \d+ shapes differ, \d+ names are missing .*\n  Give the --model.name"),
        ("text.pt", "is no file of weights"),
        ("whole.pt", "holds a whole model or other objects, .* save `model.state_dict\\(\\)` instead$"),
        ("list.pt", "holds no state dict"),
        ("absent.pt", "there is no such file, and only torchvision's and timm's networks have weights by name"),
        ("empty", "has no model.safetensors"),
    ],
)
def test_weights_that_cannot_be_used(
    weights: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(cifar_resnet(14).state_dict(), "other.pt")
    torch.save(cifar_resnet(8), "whole.pt")
    Path("text.pt").write_text("no weights")
    torch.save([1, 2], "list.pt")
    Path("empty").mkdir()
    config = ModelConfig(depth=8, weights=weights)
    model = build_model(config, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LocalGradError, match=message):
        load_weights(model, config, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("weights", ["default", "imagenet", "IMAGENET1K_V1"])
def test_torchvisions_weights_by_their_names(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    pretrained = torchvision.models.resnet18().state_dict()
    asked: list[str] = []

    def fetched(self: Any, **_: Any) -> dict[str, Tensor]:
        asked.append(self.name)
        return dict(pretrained)

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetched)
    config = ModelConfig("torchvision:resnet18", weights=weights)
    model = build_model(config, 3)
    said = load_weights(model, config, 3)
    assert said == "weights of torchvision's resnet18 (IMAGENET1K_V1); fc begins anew, for 3 classes"
    assert load_weights(model, config, 3, imagenette("x")) == said
    assert "--data.mean 0.485 0.456 0.406" in str(load_weights(model, config, 3, digits()))
    assert {*asked} == {"IMAGENET1K_V1"}
    assert torch.equal(model.get_parameter("layer4.1.conv2.weight"), pretrained["layer4.1.conv2.weight"])
    with pytest.raises(LocalGradError, match="torchvision:resnet18 has default, IMAGENET1K_V1; or give a file"):
        load_weights(model, ModelConfig("torchvision:resnet18", weights="IMAGENET21K"), 3)


def test_weights_without_network_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", unreachable)
    config = ModelConfig("torchvision:resnet18", weights="default")
    with pytest.raises(LocalGradError, match=r"not in the cache and cannot be fetched \(no network\); give a file$"):
        load_weights(build_model(config, 3), config, 3)


def hub_with(name: str, state: dict[str, Tensor], folder: Path) -> Path:
    """The hub's cache with one model in it, as its client leaves it."""
    model = folder / f"models--timm--{name}"
    (model / "refs").mkdir(parents=True)
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    save_file(state, model / "snapshots" / "abc" / "model.safetensors")
    return folder


def test_timms_weights_come_the_way_timm_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, for there is no network here; its means and deviations are not those of the images."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    pretrained = timm.create_model("vit_tiny_patch16_224").state_dict()
    cache = hub_with("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data = imagenette("x")
    for weights in ("default", "augreg_in21k_ft_in1k"):
        config = ModelConfig("timm:vit_tiny_patch16_224", weights=weights)
        model = build_model(config, 3)
        said = str(load_weights(model, config, 3, data))
        assert re.search(r"; head .* 3 classes; they were trained on images normalised with --data\.mean 0\.5", said)
        assert torch.equal(model.get_parameter("blocks.3.mlp.fc1.weight"), pretrained["blocks.3.mlp.fc1.weight"])
    assert "--data" not in str(load_weights(model, config, 3, replace(data, mean=(0.5,) * 3, std=(0.5,) * 3)))
    other = ModelConfig("timm:vit_tiny_patch16_224", weights="augreg_in21k")
    with pytest.raises(
        LocalGradError, match=r"^--model.weights augreg_in21k: timm/vit_.* is not in the cache, and HF_HU"
    ):
        load_weights(build_model(other, 3), other, 3)


def trained(model: nn.Module, holds: Callable[[str], bool]) -> set[bool]:
    return {parameter.requires_grad for name, parameter in model.named_parameters() if holds(name)}


def test_frozen_modules_need_no_gradient() -> None:
    model = build_model(ModelConfig(depth=8, freeze=("conv1", "layer1", "bn1.weight")), 3)
    frozen = ("conv1.", "layer1.", "bn1.weight")
    assert trained(model, lambda name: name.startswith(frozen)) == {False}
    assert trained(model, lambda name: not name.startswith(frozen)) == {True}
    with pytest.raises(LocalGradError, match=r"--freeze layer9: .* \(.*\blayer\d.*\?\)"):
        build_model(ModelConfig(depth=8, freeze=("layer9",)), 3)
