"""local_step beside a plain optimizer: several a block, micro-batches, scalers, deferred steps, what is refused."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers.cases import IMAGE, MOMENTA, NUM_CLASSES, batch
from localgrad import LocalGradError, local_step, split
from localgrad.core.block import Block
from localgrad.core.step import apply_updates, local_gradients
from localgrad.errors import LocalGradWarning, SettingsError
from localgrad.models import cifar_resnet
from localgrad.planning.measure import measure_peak

torch.set_num_threads(1)
EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)


def blocks_of(momentum: Any = None, **arguments: Any) -> list[Block]:
    torch.manual_seed(0)
    arguments = {"cuts": ["layer1", "layer2"], "objective": localgrad.dgl(NUM_CLASSES), **arguments}
    return split(cifar_resnet(8, NUM_CLASSES), EXAMPLE, momentum=momentum, **arguments)


def without_norms(width: int = 8, layers: int = 4) -> list[Block]:
    """In float64, so that sums in another order are equal to 1e-12."""
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Linear(6 if i == 0 else width, width), nn.Tanh()) for i in range(layers)]
    model = nn.Sequential(*units, nn.Linear(width, 3)).double()
    return split(model, torch.empty(2, 6).double(), num_blocks=3, objective=localgrad.classifier(3))


def sgd(blocks: list[Block], lr: float = 0.1) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(block.trainable_parameters(), lr=lr, momentum=0.9) for block in blocks]


def state(blocks: list[Block]) -> list[Tensor]:
    return [tensor for block in blocks for tensor in block.state_dict().values()]


# Several optimizers


def test_two_optimizers_that_share_a_block_are_one() -> None:
    states = []
    for several in (False, True):
        blocks = blocks_of(MOMENTA["man"])
        optimizers: list[Any] = sgd(blocks)
        if several:
            optimizers = [
                [
                    torch.optim.SGD([p for p in block.trainable_parameters() if (p.ndim == 2) == flat], 0.1, 0.9)
                    for flat in (True, False)
                    if any((p.ndim == 2) == flat for p in block.trainable_parameters())
                ]
                for block in blocks
            ]
        for seed in range(3):
            local_step(blocks, optimizers, *batch(seed))
        states.append(state(blocks))
    assert all(map(torch.equal, *states))


def test_muon_and_adamw_train_a_block_together() -> None:
    blocks = without_norms()
    optimizers = [
        (
            torch.optim.Muon([p for p in block.trainable_parameters() if p.ndim == 2], lr=0.02),
            torch.optim.AdamW([p for p in block.trainable_parameters() if p.ndim != 2], lr=1e-3),
        )
        for block in blocks
    ]
    before = [p.clone() for block in blocks for p in block.parameters()]
    local_step(blocks, optimizers, torch.randn(8, 6).double(), torch.arange(8) % 3)
    after = [p for block in blocks for p in block.parameters()]
    assert not any(map(torch.equal, before, after))


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "requires a closure"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [torch.optim.SGD(p, 0.1), torch.optim.SGD(p[:1], 0.1)], "share a parameter"),
        (lambda p: [torch.optim.SGD(p[1:], 0.1)], "optimizer 0 .* 1 "),
        (lambda p: None, "optimizer 0 is None"),
        (lambda p: [], "optimizer 0 is None"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS, whose step takes a closure .* as SGD or AdamW"),
        (lambda p: NeedsClosure(p, 0.1), "NeedsClosure failed .*without a closure"),
        (lambda p: "SGD", "optimizer 0 is a str: give a torch optimizer"),
    ],
)
def test_optimizers_that_cannot_train_a_block_are_refused(make: Callable[..., Any], message: str) -> None:
    blocks = blocks_of()
    optimizers: list[Any] = [make(blocks[0].trainable_parameters()), *sgd(blocks)[1:]]
    before = [tensor.clone() for block in blocks for tensor in block.parameters()]
    with pytest.raises(LocalGradError, match=message):
        local_step(blocks, optimizers, *batch())
    assert all(map(torch.equal, before, (p for block in blocks for p in block.parameters())))
    assert all(p.grad is None for block in blocks for p in block.parameters())


def test_schedulers_and_groups_need_no_other_step() -> None:
    blocks = blocks_of()
    optimizers = [
        torch.optim.AdamW([{"params": [parameter]} for parameter in block.trainable_parameters()]) for block in blocks
    ]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5) for optimizer in optimizers]
    for _ in range(2):
        local_step(blocks, optimizers, *batch())
        for scheduler in schedulers:
            scheduler.step()


def test_what_changes_after_the_first_step_is_noticed() -> None:
    blocks = blocks_of()
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())
    head: Any = blocks[0].objective
    head.classifier[-1] = nn.Linear(head.classifier[-1].in_features, NUM_CLASSES)
    with pytest.raises(LocalGradError, match=r"^optimizer 0 .* 2 .*block 0 .* 2 "):
        local_step(blocks, optimizers, *batch())
    optimizers = sgd(blocks)
    local_step(blocks, optimizers, *batch())
    blocks[1].body[0].conv1.weight.requires_grad_(False)
    local_step(blocks, optimizers, *batch())
    optimizers[1].param_groups[0]["params"].pop()
    with pytest.raises(LocalGradError, match=r"^optimizer 1 .* 0 .* 1 "):
        local_step(blocks, optimizers, *batch())


# Micro-batches


@pytest.mark.parametrize("step_each_block", [False, True])
@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("parts", [2, 3, 99])
def test_parts_of_a_batch_add_up_to_it(step_each_block: bool, reach: int, parts: int) -> None:
    inputs, targets = torch.randn(8, 6).double(), torch.arange(8) % 3
    states, losses = [], []
    for number in (1, parts):
        blocks = without_norms()
        optimizers = sgd(blocks)
        for _ in range(2):
            loss = local_step(
                blocks, optimizers, inputs, targets, parts=number, step_each_block=step_each_block, reach=reach
            )
        losses.append(loss)
        states.append(state(blocks))
    for whole, in_parts in zip(states[0] + losses[0], states[1] + losses[1], strict=True):
        torch.testing.assert_close(in_parts, whole, atol=1e-6, rtol=0)


def test_parts_pass_one_block_after_the_other_and_the_average_moves_once() -> None:
    blocks = blocks_of(MOMENTA["man"])
    order: list[tuple[int, int]] = []
    for index, block in enumerate(blocks):
        block.body[0].register_forward_pre_hook(
            lambda module, arguments, index=index: order.append((index, len(arguments[0])))
        )
    ema: Any = blocks[0].momentum
    source = [p.clone() for p in ema.followed()]
    before = [p.clone() for p in ema.averages()]
    local_step(blocks, sgd(blocks), *batch(size=5), parts=2)
    assert order == [(0, 3), (0, 2), (1, 3), (1, 2), (2, 3), (2, 2)]
    for old, new, followed in zip(before, ema.averages(), source, strict=True):
        torch.testing.assert_close(new, 0.995 * old + 0.005 * followed)


def test_parts_need_less_memory() -> None:
    def peak(parts: int) -> int:
        blocks = without_norms(width=64)
        optimizers = sgd(blocks)
        inputs, targets = torch.randn(256, 6).double(), torch.arange(256) % 3
        local_step(blocks, optimizers, inputs, targets, parts=parts)
        return measure_peak(lambda: local_step(blocks, optimizers, inputs, targets, parts=parts))[1]

    features = 256 * 64 * 8
    assert peak(1) - peak(8) > 2 * features


def test_targets_of_any_tree_are_parted_with_the_batch() -> None:
    seen: list[Any] = []

    def criterion(scores: Tensor, targets: Any) -> Tensor:
        seen.append(targets)
        return scores.square().mean()

    blocks = blocks_of(criterion=criterion, objective=localgrad.classifier(NUM_CLASSES))
    targets = {"a": torch.arange(6), "b": (torch.arange(12).view(6, 2), None), "temperature": torch.tensor(0.1)}
    local_step(blocks, sgd(blocks), batch()[0], targets, parts=2)
    assert len(seen) == 6
    assert [each["a"].tolist() for each in seen[:2]] == [[0, 1, 2], [3, 4, 5]]
    assert [each["b"][0].shape for each in seen[:2]] == [(3, 2), (3, 2)]
    assert all(each["b"][1] is None and each["temperature"] is targets["temperature"] for each in seen)
    seen.clear()
    local_step(blocks, sgd(blocks), batch()[0])
    assert seen == [None] * 3


@pytest.mark.parametrize("parts", [0, -1, 1.5, True, None])
def test_parts_that_are_no_number_of_micro_batches_are_refused(parts: Any) -> None:
    blocks = blocks_of()
    with pytest.raises(SettingsError, match="parts is"):
        local_step(blocks, sgd(blocks), *batch(), parts=parts)


# What others back-propagate and step


@pytest.mark.parametrize("step_each_block", [False, True])
def test_a_scaler_trains_as_without_it_and_skips_the_block_that_overflows(step_each_block: bool) -> None:
    states = []
    for scaled in (False, True):
        blocks = blocks_of(MOMENTA["man"])
        optimizers = sgd(blocks)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options: dict[str, Any] = {"step_each_block": step_each_block}
        if scaled:
            options |= {"backward": lambda loss, s=scaler: s.scale(loss).backward(), "step": scaler.step}
        for seed in range(3):
            local_step(blocks, optimizers, *batch(seed), **options)
            if scaled:
                scaler.update()
        states.append(state(blocks))
    for plain, scaled_tensor in zip(*states, strict=True):
        torch.testing.assert_close(plain, scaled_tensor)

    def overflow(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        weight = blocks[0].body[0]
        for parameter in itertools.islice(weight.parameters(), 1):
            parameter.grad = torch.full_like(parameter, float("inf"))

    before = [[p.clone() for p in block.parameters()] for block in blocks]
    local_step(blocks, optimizers, *batch(), backward=overflow, step=scaler.step)
    scaler.update()
    moved = [
        not all(map(torch.equal, old, block.trainable_parameters())) for old, block in zip(before, blocks, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(before[0], blocks[0].parameters(), strict=False) if b.requires_grad)
    assert moved[1:] == [True, True]


def test_float16_autocast_a_block_at_a_time_with_a_scaler() -> None:
    blocks = blocks_of()
    scaler = torch.amp.GradScaler("cpu")
    dtypes: list[torch.dtype] = []
    blocks[0].body[-1].register_forward_hook(lambda module, arguments, output: dtypes.append(output.dtype))
    inside: list[int] = []

    def context(index: int) -> Any:
        inside.append(index)
        return torch.autocast("cpu", torch.float16)

    losses = local_step(
        blocks,
        sgd(blocks),
        *batch(),
        context=context,
        backward=lambda loss: scaler.scale(loss).backward(),
        step=scaler.step,
    )
    assert dtypes == [torch.float16]
    assert inside == [0, 1, 2]
    assert all(loss.isfinite() for loss in losses)


def test_one_autocast_around_the_step_keeps_no_casts_of_other_blocks() -> None:
    def peak(around: bool) -> int:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64, bias=False) for _ in range(8)]
        blocks = split(nn.Sequential(*layers), torch.empty(2, 64), num_blocks=8, objective=localgrad.classifier(64))
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
        inputs, targets = torch.randn(4, 64), torch.arange(4)

        def run() -> None:
            if around:
                with torch.autocast("cpu", torch.bfloat16):
                    local_step(blocks, optimizers, inputs, targets)
            else:
                local_step(
                    blocks, optimizers, inputs, targets, context=lambda index: torch.autocast("cpu", torch.bfloat16)
                )

        run()
        return measure_peak(run)[1]

    casts = 64 * 64 * 2  # bytes of one block's
    assert peak(around=True) < peak(around=False) + 2 * casts


def test_clipping_in_the_step_is_a_block_s_own() -> None:
    blocks = blocks_of()
    norms: list[float] = []

    def clipped(optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(nn.utils.clip_grad_norm_(parameters, 1e-3).item())
        optimizer.step()

    before = [p.clone() for p in blocks[0].trainable_parameters()]
    local_step(blocks, [torch.optim.SGD(b.trainable_parameters(), 1.0) for b in blocks], *batch(), step=clipped)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, blocks[0].trainable_parameters(), strict=True)])
    assert len(norms) == 3
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


# Gradients that are there before


class Deferred(torch.optim.SGD):
    """Steps and frees gradients every fourth time, as Accelerate's optimizers do."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 4 == 0:
            super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 4 == 0:
            super().zero_grad(set_to_none)


def test_deferred_optimizers_train_on_all_micro_batches_and_the_average_moves_once() -> None:
    inputs, targets = torch.randn(8, 6).double(), torch.arange(8) % 3
    whole, deferred = without_norms(), without_norms()
    for block, twin in zip(whole, deferred, strict=True):
        twin.load_state_dict(block.state_dict())
    local_step(whole, [torch.optim.SGD(block.trainable_parameters(), 0.1) for block in whole], inputs, targets)
    optimizers = [Deferred(block.trainable_parameters(), 0.1) for block in deferred]
    moved: list[int] = []
    deferred[0].update_momentum = lambda: moved.append(1)
    for start in range(0, 8, 2):
        part = slice(start, start + 2)
        local_step(deferred, optimizers, inputs[part], targets[part], backward=lambda loss: (loss / 4).backward())
        assert len(moved) == (start == 6)
    for a, b in zip(state(whole), state(deferred), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert all(p.grad is None for block in deferred for p in block.parameters())


def test_gradients_that_somebody_left_count_and_are_said() -> None:
    blocks, plain = blocks_of(), blocks_of()
    extra = torch.ones_like(blocks[0].trainable_parameters()[0])
    blocks[0].trainable_parameters()[0].grad = extra.clone()
    with pytest.warns(LocalGradWarning, match=r"block 0 has gradients that no local step left.*zero_grad\(\) before"):
        local_step(blocks, [torch.optim.SGD(b.trainable_parameters(), 0.1) for b in blocks], *batch())
    local_step(plain, [torch.optim.SGD(b.trainable_parameters(), 0.1) for b in plain], *batch())
    difference = plain[0].trainable_parameters()[0] - blocks[0].trainable_parameters()[0]
    torch.testing.assert_close(difference, 0.1 * extra)
    local_gradients(blocks, *batch())
    local_step(blocks, sgd(blocks), *batch())  # what the library left is not warned of


def test_an_interrupted_batch_leaves_no_gradients() -> None:
    blocks = blocks_of()

    def interrupted(loss: Tensor) -> None:
        loss.backward()
        if blocks[1].body[0].conv1.weight.grad is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_step(blocks, sgd(blocks), *batch(), backward=interrupted)
    assert all(p.grad is None for block in blocks for p in block.parameters())


# Losses and wrappers


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"the loss of block conv1\.\.layer1\.0 is of shape \(6,\)"),
        (lambda scores, targets: 1.0, "is a float: give a criterion"),
        (lambda scores, targets: scores.detach().mean(), "has no gradient, and the block has parameters"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(criterion: Any, message: str) -> None:
    blocks = blocks_of(criterion=criterion)
    with pytest.raises(LocalGradError, match=message):
        local_step(blocks, sgd(blocks), *batch())


def test_compiled_blocks_are_trained_as_plain_ones() -> None:
    blocks, compiled = blocks_of(), blocks_of()
    wrapped = [torch.compile(block, backend="eager") for block in compiled]
    local_step(blocks, sgd(blocks), *batch())
    local_step(wrapped, sgd(compiled), *batch())
    assert all(map(torch.equal, state(blocks), state(compiled)))


def test_updates_can_be_done_by_hand() -> None:
    blocks, by_hand = blocks_of(MOMENTA["man"]), blocks_of(MOMENTA["man"])
    local_step(blocks, sgd(blocks), *batch())
    local_gradients(by_hand, *batch())
    apply_updates(by_hand, [[optimizer] for optimizer in sgd(by_hand)])
    assert all(map(torch.equal, state(blocks), state(by_hand)))


def test_copies_of_blocks_are_unchecked_and_train() -> None:
    blocks = blocks_of(MOMENTA["man"])
    local_step(blocks, sgd(blocks), *batch())
    copies = copy.deepcopy(blocks)
    assert all(block.origin is None and block.checked is None for block in copies)
    local_step(copies, sgd(copies), *batch())


def test_deferred_optimizers_sum_the_losses_of_batches_and_that_is_said() -> None:
    blocks = without_norms()
    optimizers = [Deferred(block.trainable_parameters(), 0.1) for block in blocks]
    inputs, targets = torch.randn(2, 6).double(), torch.arange(2)
    local_step(blocks, optimizers, inputs, targets)
    with pytest.warns(UserWarning, match=r"gradients of batches are summed.*backward=accelerator.backward"):
        local_step(blocks, optimizers, inputs, targets)


def test_an_objective_that_cannot_take_the_targets_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    def of_tokens(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())

    inputs, targets = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.long)
    blocks = localgrad.split(model, inputs, cuts=["0"], objective=localgrad.classifier(5), criterion=of_tokens)
    optimizers = [torch.optim.SGD(block.trainable_parameters(), 0.1) for block in blocks]
    message = r"objective of block 0 fails on targets torch.int64 \(2, 6\): give it a criterion= of its own, or take"
    with pytest.raises(LocalGradError, match=message):
        local_step(blocks, optimizers, inputs, targets)
