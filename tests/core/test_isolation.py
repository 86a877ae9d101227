"""Isolation by hooks: the weights of `local_step`, bit for bit, and what the object promises."""

import pytest
import torch
from torch import nn

import localgrad
from helpers.cases import IMAGE, MODELS, MOMENTA, NUM_CLASSES, OBJECTIVES, batch
from localgrad import isolate, local_step, split

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
DGL = localgrad.dgl(NUM_CLASSES)
# the modules after which the units of `MODELS` end; the class token joins after the patches, outside any module
CUTS = {
    "resnet": (["conv1", "layer1.0", "layer2.0"], ["relu", "layer1.0", "layer2.0"]),
    "transformer": (["layers.0", "layers.1"], ["layers.0", "layers.1"]),
}


@pytest.mark.parametrize("one_optimizer", [True, False])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_name", MODELS)
def test_five_steps_give_the_weights_of_local_step(
    model_name: str, objective: str, momentum: str, one_optimizer: bool
) -> None:
    make, (units, modules) = MODELS[model_name][0], CUTS[model_name]
    torch.manual_seed(0)
    model = make()
    blocks = split(model, EXAMPLE, cuts=units, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum])
    optimizers = [torch.optim.SGD(block.trainable_parameters(), 0.05, 0.9) for block in blocks]
    torch.manual_seed(0)
    other = make()
    isolation = isolate(other, modules, objective=OBJECTIVES[objective], momentum=MOMENTA[momentum], example=EXAMPLE)
    groups = [isolation.trainable_parameters(block) for block in range(len(blocks))]
    groups = [[parameter for group in groups for parameter in group]] if one_optimizer else groups
    others = [torch.optim.SGD(group, 0.05, 0.9) for group in groups]
    for step in range(5):
        inputs, targets = batch(step)
        losses = local_step(blocks, optimizers, inputs, targets)
        isolation.targets = targets
        loss = nn.functional.cross_entropy(other(inputs), targets)
        loss.backward()
        for optimizer in others:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(torch.stack(losses), torch.stack([*isolation.losses, loss.detach()]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    isolation.state_dict()
    for block, momentum_network, head in zip(blocks, isolation.momenta, isolation.objectives, strict=False):
        _assert_equal(block.objective, head)
        _assert_equal(block.momentum, momentum_network)


def _assert_equal(one: nn.Module | None, other: nn.Module | None) -> None:
    if one is None or other is None:
        assert one is other
    else:
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
