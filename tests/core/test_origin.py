"""Blocks that are no longer the model's are noticed at the next step, with the cause; wrapped models are told apart."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers.cases import IMAGE, NUM_CLASSES, batch
from localgrad import LocalGradError, local_step, man, split, units
from localgrad.core.block import Block
from localgrad.errors import LocalGradWarning
from localgrad.models import cifar_resnet

torch.set_num_threads(1)
EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)


class Network(nn.Module):
    """A stem with a bare parameter and a bare buffer, residual stages and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.1))
        self.layers = cifar_resnet(8, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs - self.mean + self.shift)


def made(momentum: Any = None) -> tuple[nn.Module, list[Block]]:
    torch.manual_seed(0)
    model = Network()
    cuts = ["layers.layer1", "layers.layer2"]
    return model, split(model, EXAMPLE, cuts=cuts, objective=localgrad.dgl(NUM_CLASSES), momentum=momentum)


def sgd(blocks: list[Block]) -> list[Any]:
    return [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def new_head(model: Any) -> None:
    model.layers.fc = nn.Linear(64, NUM_CLASSES)


def new_norm(model: Any) -> None:
    model.layers.bn1 = copy.deepcopy(model.layers.bn1)


def synchronised(model: nn.Module) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def cast(model: nn.Module) -> None:
    model.double()


def low_rank(model: Any) -> None:
    """As an adapter that is injected: the layer inside another, frozen, beside trained ones."""
    conv = model.layers.layer2[0].conv1
    model.layers.layer2[0].conv1 = nn.Sequential(conv.requires_grad_(False), nn.Conv2d(32, 32, 1))


def thawed(model: Any) -> None:
    model.layers.layer2.requires_grad_(False)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "assigned": (assigned, "block 0 holds 1 parameter that the model no longer has, 'shift'"),
    "new head": (new_head, "block 2 holds 1 module that the model no longer has, 'layers.fc'"),
    "new norm": (new_norm, "block 0 holds 1 module that the model no longer has, 'layers.bn1'"),
    "synchronised": (synchronised, "block 0 holds 1 module that the model no longer has, 'layers.bn1'"),
    "cast": (cast, r"parameters are torch\.float64 and were torch\.float32 at split"),
}


@pytest.mark.parametrize("when", ["before the optimizers", "after a step"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_model_no_longer_has_is_noticed(change: str, when: str) -> None:
    model, blocks = made()
    optimizers = sgd(blocks)
    if when == "after a step":
        local_step(blocks, optimizers, *batch())
    change_it, message = CHANGES[change]
    change_it(model)
    if when == "before the optimizers":
        optimizers = sgd(blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # as often as it is asked
        with pytest.raises(LocalGradError, match=f"{message}.*(split|autocast)"):
            local_step(blocks, optimizers, *batch())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    blocks = split(model, EXAMPLE.to(model.shift.dtype), cuts=["layers.layer1"], objective=localgrad.dgl(NUM_CLASSES))
    inputs, targets = batch()
    if change != "synchronised":  # which needs a process group
        local_step(blocks, sgd(blocks), inputs.to(model.shift.dtype), targets)


def test_a_layer_that_is_added_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    blocks = split(model, torch.randn(2, 8), cuts=["0"], objective=localgrad.classifier(5))
    optimizers, inputs, targets = sgd(blocks), torch.randn(2, 8), torch.arange(2)
    local_step(blocks, optimizers, inputs, targets)
    model.note = nn.Dropout()  # trains nothing
    local_step(blocks, optimizers, inputs, targets)
    model.append(nn.Linear(5, 5))
    for _ in range(2):
        with pytest.raises(LocalGradError, match=r"'4.weight' since split, and no block trains or runs it"):
            local_step(blocks, optimizers, inputs, targets)


def test_what_computes_the_inputs_is_said_not_to_be_trained() -> None:
    before, model = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    blocks = split(model, torch.randn(2, 8), cuts=["0"], objective=localgrad.classifier(5))
    with pytest.warns(LocalGradWarning, match=r"inputs are computed by something.*give inputs.detach\(\)"):
        local_step(blocks, sgd(blocks), before(torch.randn(2, 8)), torch.arange(2))
    local_step(blocks, sgd(blocks), before(torch.randn(2, 8)).detach(), torch.arange(2))


def test_a_buffer_of_the_model_is_the_blocks_when_it_is_replaced() -> None:
    model, blocks = made()
    twin, plain = made()
    local_step(blocks, sgd(blocks), *batch())
    local_step(plain, sgd(plain), *batch())
    model.mean = model.mean + 1.0
    twin.mean.add_(1.0)
    assert local_step(blocks, sgd(blocks), *batch(1)) == local_step(plain, sgd(plain), *batch(1))


@pytest.mark.parametrize("change", [low_rank, thawed])
def test_copies_of_what_changed_are_noticed(change: Callable[[Any], None]) -> None:
    model, blocks = made(man())
    local_step(blocks, sgd(blocks), *batch())
    change(model)
    with pytest.raises(LocalGradError, match=r"units that the momentum of block 0 copies have changed since split"):
        local_step(blocks, sgd(blocks), *batch())
    model, blocks = made()
    change(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    local_step(blocks, sgd(blocks), *batch())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad)


def test_shared_parameters_that_are_thawed_are_noticed() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    model.layer2[0].conv1.requires_grad_(False)
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES), momentum=man())
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())
    model.layer2[0].conv1.requires_grad_(True)
    with pytest.raises(LocalGradError, match=r"block 0 .*\(requires_grad"):
        local_step(blocks, sgd(blocks), *batch())


def test_parameters_that_were_replaced_in_a_unit_need_new_optimizers() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES))
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())
    assigned(model)
    with pytest.raises(LocalGradError, match=r"optimizer of block 0 has \d+ parameters that the model no longer has.*"):
        local_step(blocks, optimizers, *batch())
    before = model.conv1.weight.clone()
    local_step(blocks, sgd(blocks), *batch())
    assert not torch.equal(model.conv1.weight, before)


def test_a_cast_of_a_part_is_noticed_and_one_of_all_is_not_refused() -> None:
    inputs, targets = batch()
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES), momentum=man())
    optimizers = sgd(blocks)
    model.double()
    with pytest.raises(LocalGradError, match=r"torch\.float64 .*torch\.float32 .*autocast"):
        local_step(blocks, optimizers, inputs.double(), targets)
    for block in blocks:
        block.double()
    local_step(blocks, optimizers, inputs.double(), targets)
    for block in blocks:
        block.bfloat16()
    with pytest.raises(LocalGradError, match=r"cast to torch\.bfloat16 since split, in which an average"):
        local_step(blocks, optimizers, inputs.bfloat16(), targets)


def test_what_changes_nothing_is_not_refused() -> None:
    model, blocks = made(man())
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())
    model.to(memory_format=torch.channels_last)
    model.load_state_dict(model.state_dict())
    model.eval()(batch()[0])
    model.note = "kept"
    for block in blocks:
        block.train()
    for optimizer in optimizers:
        optimizer.load_state_dict(optimizer.state_dict())
    local_step(blocks, optimizers, *batch())
    local_step(blocks[:1], optimizers[:1], *batch())


def test_the_check_looks_at_each_tensor_once_and_walks_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    _, blocks = made(man())
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())

    def walked(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the modules are walked in a step where nothing changed")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", walked)
        local_step(blocks, optimizers, *batch())


# Wrappers


def test_a_compiled_model_is_unwrapped_with_a_word() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.warns(LocalGradWarning, match=r"CifarResNet inside is used.*block\.compile\(\)"):
        blocks = split(compiled, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES))
    assert blocks[0].names[0] == "conv1"
    local_step(blocks, sgd(blocks), *batch())
    with pytest.warns(LocalGradWarning, match="CifarResNet"):
        assert units(compiled, EXAMPLE)[0].name == "conv1"


class Adapted(nn.Module):
    """As peft wraps a network whose layers have adapters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (Adapted, r"is a Adapted around .*model\.get_base_model\(\)"),
        (nn.DataParallel, r"is a DataParallel.*model\.module.*DistributedDataParallel\(block\)"),
        (torch.optim.swa_utils.AveragedModel, r"AveragedModel.*update_parameters"),
        (
            lambda model: nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), model),
            r"lazy .*model\(batch\)",
        ),
    ],
)
def test_models_in_other_wrappers_are_refused(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    wrapped = wrap(cifar_resnet(8, NUM_CLASSES))
    for use in (lambda: split(wrapped, EXAMPLE, cuts=[]), lambda: units(wrapped, EXAMPLE)):
        with pytest.raises(LocalGradError, match=message):
            use()


def test_another_default_device_is_not_asked() -> None:
    for how in (torch.device, lambda kind: None):
        torch.manual_seed(0)
        model = cifar_resnet(8, NUM_CLASSES)
        try:
            context = how("meta")
            if context is None:
                torch.set_default_device("meta")
            with context or torch.device("meta"):
                blocks = split(model, EXAMPLE, num_blocks=2, objective=localgrad.dgl(NUM_CLASSES), momentum=man())
        finally:
            torch.set_default_device(None)
        assert {p.device.type for block in blocks for p in block.parameters()} == {"cpu"}
        local_step(blocks, sgd(blocks), *batch())
