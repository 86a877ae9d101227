"""Criterion and targets of the heads: what is trained is what was meant, or refused."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localgrad import LocalGradError, classifier, dgl, infopro, local_step, predsim, split
from localgrad.core.block import Block
from localgrad.errors import CannotSitError
from localgrad.objectives.infopro import supervised_contrast
from localgrad.objectives.predsim import similarity_matrix

torch.set_num_threads(1)
CLASSES = 5
OBJECTIVES = {
    "classifier": classifier(CLASSES),
    "dgl": dgl(CLASSES),
    "predsim": predsim(CLASSES),
    "infopro": infopro(CLASSES, (0.5,) * 3, (0.25,) * 3),
}
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
MULTI_HOT = (torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(0)) < 0.5).float()
SOFT = F.one_hot(TARGETS, CLASSES) * 0.7 + 0.06
INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1), nn.ReLU()) for i in range(3)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(4 * 64, outputs))


def blocks_of(objective: Any, criterion: Any = F.cross_entropy, outputs: int = CLASSES) -> list[Block]:
    return split(network(outputs), INPUTS, cuts=["0.0"], objective=objective, criterion=criterion)


def step(blocks: list[Block], targets: Any) -> list[Tensor]:
    return local_step(
        blocks, [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks], INPUTS, targets
    )


def head_loss(block: Block, targets: Any) -> tuple[Tensor, Tensor]:
    """A head's scores and its loss, on the features of its block."""
    features = block.body(INPUTS)
    return block.objective.predict(features), block.objective(features, targets, INPUTS)


@pytest.mark.parametrize("objective", ["classifier", "dgl"])
@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([9.0, 1, 1, 1, 1])), TARGETS),
        (nn.CrossEntropyLoss(label_smoothing=0.5), TARGETS),
        (nn.CrossEntropyLoss(ignore_index=3), TARGETS),
        (partial(F.cross_entropy, label_smoothing=0.2), TARGETS),
        (nn.CrossEntropyLoss(), SOFT),
        (nn.BCEWithLogitsLoss(), MULTI_HOT),
        (nn.MSELoss(), torch.randn(6, CLASSES)),
    ],
)
def test_a_head_s_loss_is_the_model_s_criterion(objective: str, criterion: Any, targets: Tensor) -> None:
    blocks = blocks_of(OBJECTIVES[objective], criterion)
    scores, loss = head_loss(blocks[0], targets)
    assert torch.equal(loss, criterion(scores, targets))
    assert all(torch.isfinite(each) for each in step(blocks, targets))


def test_the_criterion_of_the_factory_wins() -> None:
    smooth = nn.CrossEntropyLoss(label_smoothing=0.5)
    for make in (classifier, dgl, predsim, partial(infopro, mean=(0.5,) * 3, std=(0.25,) * 3, reconstruction=(0, 0))):
        torch.manual_seed(0)
        given = head_loss(blocks_of(make(CLASSES, criterion=smooth))[0], TARGETS)[1]
        torch.manual_seed(0)
        of_model = head_loss(blocks_of(make(CLASSES), smooth)[0], TARGETS)[1]
        torch.manual_seed(0)
        plain = head_loss(blocks_of(make(CLASSES))[0], TARGETS)[1]
        assert given == of_model != plain


@pytest.mark.parametrize("targets", [torch.randn(6), torch.randn(6, 1)])
def test_one_value_a_sample_is_predicted(targets: Tensor) -> None:
    model = nn.Sequential(*network(1), *([nn.Flatten(0)] if targets.ndim == 1 else []))
    blocks = split(model, INPUTS, cuts=["0.0"], objective=classifier(1), criterion=F.mse_loss)
    scores, loss = head_loss(blocks[0], targets)
    assert torch.equal(loss, F.mse_loss(scores.reshape(targets.shape), targets))
    assert torch.isfinite(step(blocks, targets)[0])
    with pytest.raises(CannotSitError, match=r"num_classes is 1 .*criterion=F\.mse_loss"):
        blocks_of(classifier(1))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (MULTI_HOT, r"rows are no probabilities that sum to 1: .*BCEWithLogitsLoss"),
        (torch.zeros(6, CLASSES), "rows are no probabilities"),
        (SOFT - 0.5, "rows are no probabilities"),
        (MULTI_HOT.long(), r"torch.int64 of shape \(6, 5\) .*BCEWithLogitsLoss"),
        (torch.zeros(6, CLASSES + 1), r"\(6, 6\) under softmax cross-entropy: .*\(N, 5\)"),
        (TARGETS.float(), r"classes as targets\.long\(\)"),
        (TARGETS.int(), r"give targets\.long\(\)"),
        (torch.zeros(6, 8, 8).long(), r"\(6, 8, 8\) .*targets a pixel"),
        ({"labels": TARGETS}, "targets are a dict under softmax cross-entropy"),
        (None, "targets are a NoneType under softmax cross-entropy"),
    ],
)
def test_what_is_no_class_under_softmax_is_refused(objective: str, targets: Any, message: str) -> None:
    blocks = blocks_of(OBJECTIVES[objective])
    before = copy.deepcopy(blocks[0].state_dict())
    with pytest.raises(LocalGradError, match=message):
        blocks[0](INPUTS, targets, INPUTS)
    assert all(torch.equal(before[name], value) for name, value in blocks[0].body.state_dict(prefix="body.").items())


def test_probabilities_are_told_apart_in_the_precision_of_their_type() -> None:
    rows = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(1)
    blocks = blocks_of(OBJECTIVES["classifier"], nn.CrossEntropyLoss())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        head_loss(blocks[0], rows.to(dtype).float())  # as a collate function that mixes in 16 bits leaves them
    with pytest.raises(LocalGradError, match="BCEWithLogitsLoss"):
        head_loss(blocks[0], rows * 1.05)


def test_targets_of_any_tree_reach_criterion_and_objective() -> None:
    def both(scores: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores, targets["a"]) + F.mse_loss(scores, targets["b"])

    targets = {"a": TARGETS, "b": torch.randn(6, CLASSES)}
    scores, loss = head_loss(blocks_of(OBJECTIVES["dgl"], both)[0], targets)
    assert torch.equal(loss, both(scores, targets))


# The criterion as an object


def test_what_changes_on_the_criterion_changes_in_the_heads() -> None:
    criterion = nn.CrossEntropyLoss()
    blocks = blocks_of(OBJECTIVES["classifier"], criterion)
    before = head_loss(blocks[0], TARGETS)[1]
    criterion.label_smoothing = 0.5
    assert head_loss(blocks[0], TARGETS)[1] != before
    assert "criterion" not in " ".join(blocks[0].auxiliary_state_dict())
    copies = copy.deepcopy(blocks)
    assert torch.equal(head_loss(copies[0], TARGETS)[1], head_loss(blocks[0], TARGETS)[1])


def test_a_criterion_that_is_trained_is_each_block_s_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * scores, targets)

    criterion = Scaled()
    blocks = blocks_of(OBJECTIVES["classifier"], criterion)
    own = blocks[0].objective.criterion.trained.scale
    assert own is not criterion.scale
    assert [any(p is own for p in block.trainable_parameters()) for block in blocks] == [True, False]
    step(blocks, TARGETS)
    assert own != 1
    assert criterion.scale != 1


def test_weights_of_a_criterion_are_used_where_the_scores_are() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([9.0, 1, 1, 1, 1]))
    head = blocks_of(OBJECTIVES["classifier"], weighted)[0].objective.to("meta")
    assert head(torch.zeros(6, 4, 8, 8, device="meta"), TARGETS.to("meta"), INPUTS).is_meta
    assert weighted.weight.device.type == "cpu"


# Samples without a label


@pytest.mark.parametrize("unlabelled", [-100, -1])
def test_contrast_leaves_samples_without_a_label_out(unlabelled: int) -> None:
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 1, 0, 1, 2] + 3 * [unlabelled])
    loss = supervised_contrast(embeddings, targets)
    torch.testing.assert_close(loss, supervised_contrast(embeddings[:5], targets[:5]))
    (slope,) = torch.autograd.grad(loss, embeddings)
    assert slope.isfinite().all()
    assert not slope[5:].any()
    assert supervised_contrast(embeddings, torch.full((8,), unlabelled)) == 0


def test_the_ignored_class_of_the_criterion_is_left_out_of_the_similarities() -> None:
    """By hand: the mean over pairs of labelled samples."""
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    targets = TARGETS.clone()
    targets[[1, 4]] = 255
    kept = [0, 2, 3, 5]
    objective = blocks_of(predsim(CLASSES, beta=1.0, criterion=criterion))[0].objective
    features = torch.randn(6, 4, 8, 8)
    found = similarity_matrix(objective.similarity(features))[kept][:, kept]
    wanted = similarity_matrix(F.one_hot(targets[kept], CLASSES))
    torch.testing.assert_close(objective(features, targets, INPUTS), (found - wanted).square().mean())
    contrast = infopro(CLASSES, (0.5,) * 3, (0.25,) * 3, (0, 0), (1, 1), loss="contrast", criterion=criterion)
    objective = blocks_of(contrast)[0].objective
    expected = supervised_contrast(objective.classifier(features)[kept], targets[kept])
    torch.testing.assert_close(objective(features, targets, INPUTS), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_labels_have_similarities_too() -> None:
    blocks = blocks_of(predsim(CLASSES, beta=1.0), nn.BCEWithLogitsLoss())
    features = blocks[0].body(INPUTS)
    found = similarity_matrix(blocks[0].objective.similarity(features))
    expected = (found - similarity_matrix(MULTI_HOT)).square().mean()
    torch.testing.assert_close(blocks[0].objective(features, MULTI_HOT, INPUTS), expected)
    step(blocks, MULTI_HOT)
    with pytest.raises(LocalGradError, match="compares the classes of samples"):
        supervised_contrast(torch.randn(6, 4), MULTI_HOT)
