"""The local step: equal to backpropagation for one block, isolated for more, exact and deterministic."""

import copy
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers.cases import IMAGE, MOMENTA, NUM_CLASSES, OBJECTIVES, batch
from localgrad import LocalGradError, local_step, split
from localgrad.core.block import Block
from localgrad.core.step import apply_updates, local_gradients
from localgrad.errors import LocalGradWarning
from localgrad.models import cifar_resnet
from localgrad.planning.measure import measure_peak

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)


def optimizers_of(blocks: list[Block]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(block.trainable_parameters(), lr=0.1, momentum=0.9, nesterov=True) for block in blocks]


def train(model: nn.Module, steps: int = 5, **arguments) -> list[list[torch.Tensor]]:
    blocks = split(model, EXAMPLE, **arguments)
    optimizers = optimizers_of(blocks)
    return [local_step(blocks, optimizers, *batch(seed)) for seed in range(steps)]


def train_by_hand(model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for seed in range(steps):
        inputs, targets = batch(seed)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_one_block_is_backpropagation_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = cifar_resnet(14, NUM_CLASSES)
    by_hand, by_blocks = copy.deepcopy(model), copy.deepcopy(model)
    expected = train_by_hand(by_hand)
    assert [loss for (loss,) in train(by_blocks, cuts=[])] == expected
    assert all(map(torch.equal, by_hand.state_dict().values(), by_blocks.state_dict().values()))

    several = copy.deepcopy(model)
    train(several, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES))
    assert not torch.equal(several.conv1.weight, by_hand.conv1.weight)
    assert not torch.equal(several.fc.weight, by_hand.fc.weight)


def test_two_blocks_are_two_separate_backpropagations() -> None:
    """By hand: the first block with its head, and the second on what the first gave, with the weights of the begin."""
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.classifier(NUM_CLASSES))
    body, rest = copy.deepcopy(blocks[0].body), copy.deepcopy(blocks[1].body)
    head = copy.deepcopy(blocks[0].objective.classifier)
    first = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    second = torch.optim.SGD(rest.parameters(), lr=0.1, momentum=0.9)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1, momentum=0.9) for block in blocks]
    for seed in range(3):
        inputs, targets = batch(seed)
        losses = local_step(blocks, optimizers, inputs, targets)
        features = body(inputs)
        expected = nn.functional.cross_entropy(head(features), targets)
        expected_last = nn.functional.cross_entropy(rest(features.detach()), targets)
        for loss, optimizer in ((expected, first), (expected_last, second)):
            optimizer.zero_grad()
            loss.backward()
        first.step()
        second.step()
        assert losses == [expected.detach(), expected_last.detach()]
    assert all(map(torch.equal, blocks[0].body.parameters(), body.parameters()))
    assert all(map(torch.equal, blocks[1].body.parameters(), rest.parameters()))


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = cifar_resnet(8, NUM_CLASSES)
        losses = train(model, num_blocks=3, objective=localgrad.dgl(NUM_CLASSES), momentum=localgrad.man())
        states.append(model.state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    assert all(not loss.requires_grad for step in losses for loss in step)


def test_gradients_add_up_over_the_parts_of_a_batch() -> None:
    """Without batch norm, two halves with scale 1/2 are the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    objective = localgrad.classifier(3)
    blocks = split(model, torch.empty(2, 4).double(), num_blocks=2, objective=objective)
    inputs, targets = torch.randn(8, 4).double(), torch.arange(8) % 3
    local_gradients(blocks, inputs, targets)
    whole = [parameter.grad.clone() for block in blocks for parameter in block.parameters()]
    for block in blocks:
        block.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        local_gradients(blocks, inputs[part], targets[part], scale=0.5)
    parts = [parameter.grad for block in blocks for parameter in block.parameters()]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(whole, parts, strict=True))


def test_gradients_are_freed_and_each_block_is_stepped_once() -> None:
    blocks = split(cifar_resnet(8), EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(10))
    optimizers = optimizers_of(blocks)
    local_gradients(blocks, *batch())
    before = [block.body[0] for block in blocks]
    weights = [next(module.parameters()).clone() for module in before]
    apply_updates(blocks, optimizers)
    assert not any(torch.equal(next(module.parameters()), w) for module, w in zip(before, weights, strict=True))
    assert all(parameter.grad is None for block in blocks for parameter in block.parameters())


def test_what_does_not_fit_is_explained() -> None:
    blocks = split(cifar_resnet(8, NUM_CLASSES), EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES))
    inputs, targets = batch()
    with pytest.raises(LocalGradError, match=r"1 optimizers for 2 blocks: give one a block"):
        local_step(blocks, optimizers_of(blocks)[:1], inputs, targets)
    with pytest.raises(LocalGradError, match=r"targets hold classes 0 to 7.*not among the classes of block 0"):
        local_step(blocks, optimizers_of(blocks), inputs, torch.full((6,), 7) * (torch.arange(6) > 0))
    with pytest.raises(LocalGradError, match=r"a batch of 1 leaves a batch norm of block 0 one value a channel"):
        local_step(blocks, optimizers_of(blocks), inputs[:1], targets[:1])
    with pytest.raises(LocalGradError, match=r"targets \(3,\)"):
        local_step(blocks, optimizers_of(blocks), inputs, targets[:3])


ORACLES = Path(__file__).parents[3] / "shared" / "oracles"


@pytest.mark.skipif(not ORACLES.exists(), reason="the released implementations' losses are not beside the project")
def test_the_losses_of_two_released_implementations() -> None:
    import subprocess
    import sys

    assert set(json.loads((ORACLES / "dgl_k16.json").read_text())) >= {"losses"}
    done = subprocess.run([sys.executable, str(ORACLES / "check.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("losses agree") == 2


def test_recomputed_units_give_the_same_weights_and_statistics() -> None:
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(cifar_resnet(8, 8), nn.Dropout(0.5), nn.Linear(8, NUM_CLASSES))
        train(model, cuts=["0.layer1"], objective=localgrad.dgl(NUM_CLASSES), recompute=recompute)
        states.append(model.state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    assert states[1]["0.bn1.num_batches_tracked"] == 5


def test_training_after_model_eval_is_refused_until_the_blocks_train_again() -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    blocks = split(model, EXAMPLE, cuts=["layer1"], objective=localgrad.dgl(NUM_CLASSES))
    model.eval()
    with pytest.raises(LocalGradError, match=r"block conv1\.\.layer1\.0 is in evaluation mode.*block\.train\(\)"):
        local_step(blocks, optimizers_of(blocks), *batch())
    for block in blocks:
        block.train()
    local_step(blocks, optimizers_of(blocks), *batch())


@pytest.mark.parametrize("momentum", ["none", "man", "man of depth 2", "man fused", "direct use", "manpp"])
def test_stepping_each_block_at_once_gives_the_same_weights_bit_for_bit(momentum: str) -> None:
    arguments = {"cuts": ["conv1", "layer1"], "objective": OBJECTIVES["dgl compact"], "momentum": MOMENTA[momentum]}
    states = []
    for step_each_block in (False, True):
        torch.manual_seed(0)
        blocks = split(cifar_resnet(14, NUM_CLASSES), EXAMPLE, **arguments)
        optimizers = optimizers_of(blocks)
        for seed in range(3):
            losses = local_step(blocks, optimizers, *batch(seed), step_each_block=step_each_block)
        states.append([*losses, *(tensor for block in blocks for tensor in block.state_dict().values())])
    assert all(map(torch.equal, *states))
    assert len(losses) == 3


def test_stepping_each_block_at_once_keeps_gradients_of_one_block_only() -> None:
    widths = [40, 50, 60, 70]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise([4, *widths])]
    blocks = split(nn.Sequential(*layers), torch.empty(2, 4), num_blocks=4, objective=localgrad.classifier(70))
    alive = []
    peaks = []
    for step_each_block in (False, True):
        optimizers = [_Watching(block.trainable_parameters(), blocks, alive) for block in blocks]
        run = partial(local_step, blocks, optimizers, torch.randn(2, 4), torch.arange(2))
        run(step_each_block=step_each_block)
        peaks.append(measure_peak(partial(run, step_each_block=step_each_block))[1])
    whole, each = alive[:8], alive[8:]
    assert whole == 2 * [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    assert each == 2 * [[0], [1], [2], [3]]
    gradients = [sum(parameter.nbytes for parameter in block.trainable_parameters()) for block in blocks]
    assert peaks[0] - peaks[1] >= sum(gradients) - 2 * max(gradients)


class _Watching(torch.optim.SGD):
    """SGD that notes which blocks have gradients when it steps."""

    def __init__(self, parameters: list[nn.Parameter], blocks: list[Block], alive: list[list[int]]) -> None:
        super().__init__(parameters, lr=0.1)
        self.blocks, self.alive = blocks, alive

    def step(self, closure=None) -> None:
        having = [any(p.grad is not None for p in block.trainable_parameters()) for block in self.blocks]
        self.alive.append([index for index, has in enumerate(having) if has])
        super().step(closure)


def test_a_batch_that_fails_in_the_middle_has_stepped_the_blocks_before_it() -> None:
    def fits_only_small_classes(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(inputs[:, :2], targets)

    for step_each_block in (False, True):
        blocks = split(
            cifar_resnet(8, NUM_CLASSES),
            EXAMPLE,
            cuts=["layer1"],
            objective=localgrad.dgl(NUM_CLASSES, criterion=nn.functional.cross_entropy),
            criterion=fits_only_small_classes,
        )
        before = [next(block.parameters()).clone() for block in blocks]
        with pytest.raises(LocalGradError, match="block 1"):
            local_step(blocks, optimizers_of(blocks), *batch(), step_each_block=step_each_block)
        changed = [not torch.equal(next(b.parameters()), w) for b, w in zip(blocks, before, strict=True)]
        assert changed == [step_each_block, False]
    with pytest.raises(LocalGradError, match=r"^1 .* 2 blocks"):
        local_step(blocks, optimizers_of(blocks)[:1], *batch(), step_each_block=True)


def test_every_block_gets_the_batch_and_the_features_without_a_copy() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    class Watching(nn.Module):
        def forward(self, features: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            seen.append((features, targets, inputs))
            return features.mean()

    blocks = split(cifar_resnet(8), EXAMPLE, num_blocks=4, balance="count", objective=lambda site: Watching())
    received: list[torch.Tensor] = []
    for block in blocks:
        block.body[0].register_forward_pre_hook(lambda module, arguments: received.append(arguments[0]))
    inputs, targets = batch()
    local_step(blocks, optimizers_of(blocks), inputs, targets)
    assert len(seen) == 3
    assert all(given[1] is targets and given[2] is inputs for given in seen)
    given = [inputs, *(features for features, _, _ in seen)]
    assert [a.data_ptr() for a in received] == [a.data_ptr() for a in given]


def test_a_gpu_that_stopped_is_not_explained_by_the_shape_of_the_inputs() -> None:
    class Stopped(nn.Module):
        def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
            error = torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")
            error.error_code = 710
            raise error

    blocks = localgrad.split(
        cifar_resnet(8), torch.empty(2, 3, 16, 16), cuts=["layer1.0"], objective=lambda site: Stopped()
    )
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    with pytest.raises(LocalGradError, match=r"the GPU stopped in block 0 or before; .*CUDA error: device-side assert"):
        localgrad.local_step(blocks, optimizers, torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))


def test_batches_that_do_not_fit_an_objective_are_explained() -> None:
    blocks = split(
        cifar_resnet(8), torch.empty(2, 3, 32, 32), cuts=["layer1"], objective=localgrad.predsim(10, max_features=64)
    )
    with pytest.raises(LocalGradError, match=r"\(4, 3, 48, 48\) .*\(N, 3, 32, 32\): block 0"):
        local_step(blocks, optimizers_of(blocks), torch.randn(4, 3, 48, 48), torch.arange(4))
    with pytest.raises(LocalGradError, match="BCEWithLogitsLoss"):
        local_step(blocks, optimizers_of(blocks), torch.randn(4, 3, 32, 32), torch.rand(4, 10))


# Misuse that would train something else in silence


def _blocks(**arguments: Any) -> list[Block]:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    return split(model, EXAMPLE, cuts=["layer1", "layer2"], objective=localgrad.dgl(NUM_CLASSES), **arguments)


@pytest.mark.parametrize("step_each_block", [False, True])
def test_a_batch_that_failed_leaves_nothing_for_the_next_one(step_each_block: bool) -> None:
    """The first two heads know more classes than the model's own, so their gradients are there when that one fails."""
    weights = []
    for fails in (True, False):
        torch.manual_seed(0)
        model = cifar_resnet(8, NUM_CLASSES)
        blocks = split(model, EXAMPLE, cuts=["layer1", "layer2"], objective=localgrad.dgl(NUM_CLASSES + 1))
        optimizers = optimizers_of(blocks)
        inputs, targets = batch()
        if fails:
            with pytest.raises(LocalGradError, match=rf"targets .* {NUM_CLASSES} "):
                local_gradients(blocks, inputs, torch.full_like(targets, NUM_CLASSES))
            assert all(parameter.grad is None for parameter in blocks[0].parameters())
        local_step(blocks, optimizers, inputs, targets, step_each_block=step_each_block)
        weights.append([parameter.detach().clone() for block in blocks for parameter in block.parameters()])
    assert all(map(torch.equal, *weights))


def test_auxiliary_networks_in_evaluation_mode_are_refused() -> None:
    blocks = _blocks(momentum=localgrad.man())
    for part in (blocks[0].objective, blocks[1].momentum):
        assert part is not None
        part.eval()
        with pytest.raises(LocalGradError, match=r"block\.train\(\)"):
            local_step(blocks, optimizers_of(blocks), *batch())
        part.train()
    local_step(blocks, optimizers_of(blocks), *batch())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (lambda model, block: model.parameters(), r"optimizer 0 has \d+ parameters that are not of block 0 and lacks"),
        (lambda model, block: block.body.parameters(), r"optimizer 0 has 0 parameters .* and lacks \d+ that are"),
    ],
)
def test_an_optimizer_over_other_parameters_is_refused(parameters: Any, message: str) -> None:
    blocks = _blocks()
    whole = nn.ModuleList(block.body for block in blocks)
    optimizers = [torch.optim.SGD(parameters(whole, block), lr=0.1) for block in blocks]
    before = copy.deepcopy(whole.state_dict())
    with pytest.raises(LocalGradError, match=message):
        local_step(blocks, optimizers, *batch())
    assert all(map(torch.equal, before.values(), whole.state_dict().values()))
    everything = [torch.optim.SGD(block.parameters(), lr=0.1) for block in blocks]
    local_step(blocks, everything, *batch())


def test_a_criterion_with_parameters_is_the_last_block_s_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.scale * scores, targets)

    criterion = Scaled()
    blocks = _blocks(criterion=criterion)
    assert [any(p is criterion.scale for p in block.trainable_parameters()) for block in blocks] == [False, False, True]
    local_step(blocks, optimizers_of(blocks), *batch())
    assert criterion.scale != 1


def test_inputs_with_a_graph_are_detached() -> None:
    infopro = localgrad.infopro(NUM_CLASSES, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    blocks = split(cifar_resnet(8, NUM_CLASSES), EXAMPLE, cuts=["layer1", "layer2"], objective=infopro)
    inputs, targets = batch()
    leaf = inputs.clone().requires_grad_()
    with pytest.warns(LocalGradWarning, match=r"inputs\.detach\(\)"):
        local_step(blocks, optimizers_of(blocks), 2 * leaf, targets)
    assert leaf.grad is None


def test_the_end_of_another_process_is_not_the_batch_s_fault() -> None:
    def gone(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    blocks = split(cifar_resnet(8, NUM_CLASSES), EXAMPLE, cuts=[], criterion=gone)
    with pytest.raises(RuntimeError, match="closed by peer") as caught:
        local_step(blocks, optimizers_of(blocks), *batch())
    assert not isinstance(caught.value, LocalGradError)
