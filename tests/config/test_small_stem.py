"""The stem for small images."""

import pytest
import torch

from localgrad import LocalGradError
from localgrad.config.build import build_model
from localgrad.config.schema import ModelConfig


def test_images_of_64_pixels_enter_the_first_stage_with_32() -> None:
    pytest.importorskip("torchvision")
    model = build_model(ModelConfig("torchvision:resnet18", small_stem=True), 10)
    seen: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert seen == [(2, 64, 32, 32)]


@pytest.mark.parametrize("name", ["cifar_resnet", "torchvision:vgg11"])
def test_a_network_without_such_a_stem_is_refused(name: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(LocalGradError, match="small_stem"):
        build_model(ModelConfig(name, small_stem=True), 10)
