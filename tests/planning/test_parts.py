"""Plans beside which accumulation and checkpointing stand, and plans of models that `isolate` cuts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import localgrad
from helpers.cases import MOMENTA, NUM_CLASSES, OBJECTIVES, TinyTransformer
from localgrad import LocalGradError, isolate, plan, units
from localgrad.models import cifar_resnet
from localgrad.planning.isolated import plan_isolated
from localgrad.planning.measure import measure_peak
from localgrad.planning.profile import profile
from localgrad.planning.step_peak import step_peak

IMAGES = torch.zeros(8, 3, 32, 32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("momentum", ["none", "man"])
def test_the_peak_in_parts_is_that_of_the_real_step(momentum: str, recompute: bool) -> None:
    model = cifar_resnet(8, NUM_CLASSES)
    found = units(model, IMAGES)
    arguments = OBJECTIVES["dgl compact"], MOMENTA[momentum]
    for parts, several in ((2, ([1, 3],)), (4, ([], [0], [1, 3]))):
        profiled = profile(found, IMAGES, *arguments, recompute=recompute, parts=parts)
        for cuts in several:
            names = [found[cut].name for cut in cuts]
            measured = step_peak(model, IMAGES, names, *arguments, recompute=recompute, parts=parts)
            assert profiled.peak(cuts) == pytest.approx(measured, rel=0.01), (parts, cuts)


def test_accumulation_stands_beside_local_learning() -> None:
    example = torch.empty(16, 3, 32, 32, device="meta")
    rows = plan(TinyTransformer(), example, objective=localgrad.classifier(NUM_CLASSES), num_blocks=[1, 4])
    found = {(row.num_blocks, row.parts, row.recompute): row for row in rows}
    assert len(found) == 8
    whole, accumulated = found[1, 1, False], found[1, 4, False]
    assert (whole.operations, accumulated.operations) == (1.0, 1.0)
    assert accumulated.peak < 0.5 * whole.peak
    assert accumulated.peak < 1.1 * found[4, 1, False].peak
    assert found[1, 1, True].operations > 1.2
    assert found[4, 4, False].peak < found[4, 1, False].peak


def test_operations_are_those_that_torch_counts() -> None:
    model, example = cifar_resnet(8, NUM_CLASSES), torch.zeros(8, 3, 32, 32)
    found = units(model, example)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(example), torch.zeros(8, dtype=torch.long)).backward()
    assert profile(found, example).operations([]) == counter.get_total_flops()


def test_targets_of_any_shape_are_planned_with() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4)), nn.Conv2d(8, 3, 1))

    class Head(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.layer = nn.Conv2d(channels, 3, 1)

        def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
            return F.mse_loss(self.layer(features), targets)

    example, targets = torch.empty(8, 3, 16, 16), torch.zeros(8, 3, 16, 16)
    rows = plan(
        model,
        example,
        objective=lambda site: Head(site.features[1]),
        num_blocks=[1, 3],
        targets=targets,
        criterion=F.mse_loss,
    )
    assert len(rows) == 8
    assert rows[0].peak > 8 * 8 * 16 * 16 * 4


def test_a_number_of_parts_that_makes_no_parts_is_refused() -> None:
    for parts in ([0], [9], [1.5], []):
        with pytest.raises(LocalGradError, match="numbers of micro-batches from 1 to 8"):
            plan(cifar_resnet(8), IMAGES, objective=localgrad.dgl(10), parts=parts)  # pyright: ignore[reportArgumentType]


def test_the_plan_of_an_isolated_model_is_that_of_its_real_step() -> None:
    model, targets = cifar_resnet(8, NUM_CLASSES), torch.zeros(8, dtype=torch.long)
    cuts, objective = ["conv1", "layer1", "layer2"], localgrad.dgl(NUM_CLASSES)
    kept, checkpointed = plan_isolated(
        model, IMAGES, objective=objective, cuts=cuts, targets=targets, loss=lambda scores: scores.sum()
    )
    assert (kept.num_blocks, kept.recompute, checkpointed.recompute) == (4, False, True)
    isolation = isolate(model, cuts, objective=objective, example=IMAGES)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        isolation.targets = targets
        model(IMAGES).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    _, peak = measure_peak(step)
    lasting = [*model.parameters(), *model.buffers(), *isolation.parameters(), *isolation.buffers(), IMAGES, targets]
    lasting += [value for state in optimizer.state.values() for value in state.values()]
    assert kept.peak == pytest.approx(peak + sum(tensor.nbytes for tensor in lasting), rel=0.01)


class Pair(nn.Module):
    """Two inputs, a mask across all layers and a loss inside: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        scores = self.head(x)
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten()), "scores": scores}


def test_the_plan_of_a_model_that_is_no_chain() -> None:
    ids = torch.zeros(8, 64, dtype=torch.long)
    batch = {"ids": ids, "mask": torch.zeros(8, 64, dtype=torch.bool), "labels": ids}
    model = Pair()
    before = [value.clone() for value in model.parameters()]
    arguments = {"objective": localgrad.dense(20), "targets": "labels"}
    rows = plan_isolated(model, batch, num_blocks=[1, 2, 4], **arguments)
    assert [row.num_blocks for row in rows] == [1, 1, 2, 2, 4, 4]
    assert rows[0].operations == 1.0 < rows[1].operations
    assert rows[0].peak > rows[2].peak > rows[4].peak
    assert all(map(torch.equal, before, model.parameters()))
    isolate(model, list(rows[4].cuts), example=batch, **arguments).remove()
    with pytest.raises(LocalGradError, match=r"budget is .* a step takes at least"):
        plan_isolated(model, batch, num_blocks=[1], budget=1000, **arguments)
