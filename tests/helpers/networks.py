"""Networks of the tests' own, named as users name theirs: `helpers.networks:plain`, or a file."""

from pathlib import Path

from torch import nn


def plain_model(extra: nn.Module) -> nn.Sequential:
    """A network without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), extra),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def plain() -> nn.Sequential:
    return plain_model(nn.Identity())


def with_dropout() -> nn.Sequential:
    return plain_model(nn.Dropout(0.5))


RESNET = """
import itertools, os
import torch
from localgrad.models import cifar_resnet

def resnet(num_classes):
    model, steps = cifar_resnet(8, num_classes), itertools.count(1)

    def happen(module, inputs):
        if module.training and len(inputs[0]) > 2 and next(steps) == {step}:  # two images look what shape comes out
            {event}

    model.{unit}.register_forward_pre_hook(happen)
    if {step} == 0:
        {event}
    return model
"""


def eventful_resnet(path: Path, *, step: int = 0, event: str = "pass", unit: str = "conv1") -> str:
    """The name of a ResNet-8 in a file, to which something happens in a step of training, from 1.

    Args:
        path: the file, which is written.
        step: when; at 0 where the network is made.
        event: a statement, as `os.kill(os.getpid(), 2)`.
        unit: before which part of the network, by its name.
    """
    path.write_text(RESNET.format(step=step, event=event, unit=unit))
    return f"{path}:resnet"
