"""Warnings point at the user's own line, whatever lies between it and the library; a mistyped name gets a hint."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import localgrad
from helpers.cases import IMAGE, NUM_CLASSES, batch
from localgrad.errors import LocalGradWarning, closest
from localgrad.models import cifar_resnet

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
DGL = localgrad.dgl(NUM_CLASSES)


def test_a_warning_of_a_function_points_at_its_call() -> None:
    model = cifar_resnet(8, NUM_CLASSES).requires_grad_(False)
    model.fc.requires_grad_(True)
    with pytest.warns(LocalGradWarning) as caught:
        localgrad.split(model, EXAMPLE, num_blocks=2, objective=DGL)
    assert {warning.filename for warning in caught} == {__file__}


def test_a_warning_in_a_hook_points_at_the_call_of_the_model() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    isolation = localgrad.isolate(model, ["layer1.0"], objective=DGL, example=EXAMPLE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # gradients of the first batch are still there
            inputs, isolation.targets = batch(0)
            F.cross_entropy(model(inputs), batch(0)[1]).backward()
    assert [warning.filename for warning in caught if warning.category is LocalGradWarning] == [__file__]


def test_a_mistyped_name_gets_what_is_like_it() -> None:
    assert closest("trian", ["plan", "train"]) == " (did you mean train?)"
    assert closest("lrr", ["lr", "lrs", "seed"]) == " (did you mean lr or lrs?)"
    assert closest("lrr", ["lr", "lrs", "seed"], count=1) == " (did you mean lr?)"
    assert closest("lrr", ["seed"]) == ""
