"""What isolation refuses, in words that say what to do; nothing is left on the model then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import localgrad
from helpers.cases import IMAGE, NUM_CLASSES, batch
from localgrad import LocalGradError, isolate, man
from localgrad.models import cifar_resnet

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
CLASSIFIER = localgrad.classifier(NUM_CLASSES)


class Net(nn.Module):
    """A stem, three layers and a head, with switches for what people do to forward passes."""

    def __init__(self, **switches: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.same, self.unused, self.head = nn.Identity(), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.switches = switches

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for index, layer in enumerate(self.layers):
            if self.switches.get("drop") == index:
                continue
            if self.switches.get("checkpoint"):
                features = checkpoint(layer, features, use_reentrant=self.switches["checkpoint"] == "reentrant")
            else:
                features = layer(features)
            if self.switches.get("twice") == index:
                features = layer(features)
        return self.head(self.same(features))


INPUTS, TARGETS = torch.randn(4, 8), torch.arange(4)


def run(model: nn.Module, isolation: localgrad.Isolation, targets: Any = TARGETS) -> None:
    isolation.targets = targets
    F.cross_entropy(model(INPUTS), TARGETS).backward()
    model.zero_grad()


def refuse(match: str, model: nn.Module, *args: Any, **options: Any) -> None:
    """`isolate` refuses, and leaves no hook."""
    given = {"objective": CLASSIFIER, "example": INPUTS} | options
    with pytest.raises(LocalGradError, match=match):
        isolate(model, *args, **given)
    if isinstance(model, nn.Module):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("match", "args", "options"),
    [
        ("give one of them", (), {}),
        ("give one of them", (["stem"],), {"num_blocks": 2}),
        ("a list of names", ("stem",), {}),
        ("'layers.7' is no module of Net: in layers are layers.0, layers.1", (["layers.7"],), {}),
        ("'' is no module", ([""],), {}),
        ("num_blocks is 0", (), {"num_blocks": 0}),
        ("num_blocks is 9: .* makes 1 to 5 blocks", (), {"num_blocks": 9}),
        ("objective is None", (["stem"],), {"objective": None}),
        ("must be a factory, such as localgrad.man", (["stem"],), {"momentum": nn.Linear(1, 1)}),
        ("reach is 0", (["stem"],), {"reach": 0}),
        ("Net.forward takes inputs; name one", (["stem"],), {"targets": "labels"}),
        ("'unused' is called never in the example's forward pass", (["unused"],), {}),
        ("'same' returns what it is given", (["same"],), {}),
        ("momentum has nothing to copy", (["head"],), {"momentum": man()}),
        ("dgl cannot|cannot sit|cannot lay", (["stem"],), {"example": torch.randn(1, 2, 3, 4, 5, 8)}),
    ],
)
def test_wrong_arguments(match: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    refuse(match, Net(), *args, **options)


def test_a_cut_that_runs_twice() -> None:
    refuse("'layers.0' .* 2 ", Net(twice=0), ["layers.0"])
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    model.switches["twice"] = 0
    with pytest.raises(LocalGradError, match=r"'layers.0' is run twice in a forward pass"):
        run(model, isolation)


def test_a_cut_that_is_not_reached_as_with_layerdrop() -> None:
    model = Net()
    isolation = isolate(model, ["layers.0", "layers.1"], objective=CLASSIFIER, example=INPUTS)
    model.switches["drop"] = 1
    with pytest.raises(LocalGradError, match=r"'layers.1' was not run in this forward pass.*layerdrop"):
        run(model, isolation)
    isolation.remove()
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, momentum=man(), example=INPUTS)
    model.switches["drop"] = 1
    with pytest.raises(LocalGradError, match=r"'layers\.1\.0'"):
        run(model, isolation)


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_models_own_checkpointing_around_a_cut(kind: str) -> None:
    refuse("inside the model's own activation checkpointing.*recompute=True", Net(checkpoint=kind), ["layers.0"])
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    model.switches["checkpoint"] = kind
    with pytest.raises(LocalGradError, match="recompute=True"):
        run(model, isolation)


def test_no_targets() -> None:
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    with pytest.raises(LocalGradError, match=r"no targets.*set isolation.targets before every call"):
        run(model, isolation, None)
    run(model, isolation)
    with pytest.raises(LocalGradError, match="no targets"):  # those of the last batch are no longer there
        model(INPUTS)
    run(model, isolation)


def test_targets_that_do_not_fit() -> None:
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    with pytest.raises(LocalGradError):
        run(model, isolation, TARGETS[:3])


def test_a_cut_that_is_run_outside_of_the_models_forward_pass() -> None:
    model = Net()
    isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    with pytest.raises(LocalGradError, match="outside of the isolated model's forward pass: call the model as a whole"):
        model.layers[0](INPUTS)
    with torch.no_grad():
        model.layers[0](INPUTS)


def exchange(model: Net) -> None:
    model.head = nn.Linear(8, NUM_CLASSES)


def assign(model: Net) -> None:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def parametrize(model: Net) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[1][0])


def half(model: Net) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (exchange, "'head' was exchanged after isolate"),
        (assign, "'stem.weight' was exchanged after isolate.*assign=True"),
        (parametrize, "was exchanged after isolate"),
        (half, "'stem.weight' was float32 in isolate and is bfloat16 now"),
    ],
)
def test_a_model_that_is_changed_afterwards(change: Callable[[Net], None], match: str) -> None:
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    change(model)
    with pytest.raises(LocalGradError, match=match):
        run(model, isolation)


def test_hooks_that_somebody_removes() -> None:
    model = Net()
    isolation = isolate(model, ["layers.0"], objective=CLASSIFIER, example=INPUTS)
    model.layers[0]._forward_hooks.clear()
    with pytest.raises(LocalGradError, match="hooks of the isolation were removed"):
        run(model, isolation)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    run(model, isolation)  # nothing is left that could notice it
    with pytest.raises(LocalGradError, match=r"remove\(\)"):
        _ = isolation.losses


def test_wrapped_models() -> None:
    refuse("isolate the model itself, then wrap it", nn.DataParallel(Net()), ["module.stem"])
    refuse("wrapped in OptimizedModule", torch.compile(Net()), ["stem"])
    with pytest.raises(LocalGradError, match="a network that consists of modules"):
        isolate(nn.Linear(2, 2), [], example=torch.randn(1, 2))
    model = Net()
    first = isolate(model, ["stem"], objective=CLASSIFIER, example=INPUTS)
    with pytest.raises(LocalGradError, match=r"isolated already: call remove\(\)"):
        isolate(model, ["stem"], objective=CLASSIFIER, example=INPUTS)
    first.remove()
    isolate(model, ["stem"], objective=CLASSIFIER, example=INPUTS)


def test_a_replica_of_data_parallel() -> None:
    model = Net()
    isolate(model, ["stem"], objective=CLASSIFIER, example=INPUTS)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(LocalGradError, match="use DistributedDataParallel"):
        replica(INPUTS)


def test_an_objective_that_cannot_sit_at_a_cut() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    infopro = localgrad.infopro(NUM_CLASSES, (0.5,), (0.5,))
    refuse("infopro", model, ["layer1"], objective=infopro, example=EXAMPLE)


def test_an_objective_that_changes_its_features() -> None:
    class InPlace(nn.Module):
        def __init__(self, site: localgrad.Site) -> None:
            super().__init__()
            self.head = CLASSIFIER(site)

        def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
            return self.head(features.mul_(2), targets, inputs)

    model = Net()
    isolation = isolate(model, ["layers.0"], objective=InPlace, example=INPUTS)
    with pytest.raises(LocalGradError, match="changes its features in place"):
        run(model, isolation)


def test_after_a_failure_the_next_batch_trains() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    isolation = isolate(model, ["layer1.0"], objective=CLASSIFIER, momentum=man(), example=EXAMPLE)
    inputs, targets = batch()
    isolation.targets = targets
    with pytest.raises(RuntimeError):
        model(inputs[:, :2])
    isolation.targets = targets
    F.cross_entropy(model(inputs), targets).backward()
    assert len(isolation.losses) == 1


class Keeping(nn.Module):
    """Layers that keep the mean of their output, as experts keep their balance loss, and the model their sum."""

    class Layer(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            output = super().forward(inputs)
            self.balance = {"mean": output.mean()}
            return output

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(self.Layer(8, 8) for _ in range(3)))
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.layers(inputs)
        self.balance = sum(layer.balance["mean"] for layer in self.layers)
        return self.head(features)


@pytest.mark.parametrize(
    ("loss", "refused"),
    [
        (lambda model: model.layers[0].balance["mean"], "'layers.0.balance'"),
        (lambda model: model.layers[1].balance["mean"], "'layers.1.balance'"),
        (lambda model: model.balance, "'balance'"),
        (lambda model: model.layers[2].balance["mean"], None),
        (lambda model: model.layers[0].balance["mean"].detach(), None),
    ],
    ids=["of the first block", "of the second", "of all", "of the last", "detached"],
)
def test_a_loss_that_stays_on_a_module_of_a_local_block(loss: Callable[[Keeping], Tensor], refused: str | None) -> None:
    model = Keeping()
    isolation = isolate(model, ["layers.0", "layers.1"], objective=CLASSIFIER, example=INPUTS)
    for _ in range(2):
        isolation.targets = TARGETS
        whole = F.cross_entropy(model(INPUTS), TARGETS) + 0.1 * loss(model)
        if refused is None:
            whole.backward()
        else:
            with pytest.raises(LocalGradError, match=f"a loss is made of {refused}.*objective of your own"):
                whole.backward()
        model.zero_grad()


@pytest.mark.parametrize(
    ("frozen", "momentum", "match"),
    [
        ("layers.0", None, r"block 1 \(to layers.0\) was frozen in isolate.*isolate the model again"),
        ("layers.1.0", man(), r"modules that a momentum auxiliary network copies have changed since isolate"),
    ],
)
def test_weights_that_are_thawed_afterwards(frozen: str, momentum: Any, match: str) -> None:
    model = Net()
    model.stem.requires_grad_(frozen != "layers.0")
    model.get_submodule(frozen).requires_grad_(False)
    if momentum is not None:
        model.get_submodule(frozen).bias.requires_grad_(True)  # something to follow
    isolation = isolate(model, ["layers.0", "layers.1"], objective=CLASSIFIER, momentum=momentum, example=INPUTS)
    run(model, isolation)
    model.get_submodule(frozen).requires_grad_(True)
    with pytest.raises(LocalGradError, match=match):
        run(model, isolation)
