"""Analyses against formulas in float64, scikit-learn, and what must hold for any features."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from helpers.cases import TinyTransformer
from localgrad.analysis import probe as probing
from localgrad.analysis import study
from localgrad.analysis.cka import cka, mean_diagonal, u_centred_gram
from localgrad.analysis.features import plain_batches, pooled, unit_features
from localgrad.analysis.probe import Probes, probe
from localgrad.analysis.projections import activation_maps, project
from localgrad.analysis.study import analyse_run, units_of
from localgrad.commands.main import main
from localgrad.config.schema import ModelConfig, MomentumConfig, ObjectiveConfig, OptimConfig, TrainConfig
from localgrad.core.units import Unit, units
from localgrad.data import config as data
from localgrad.data.loading import load_images
from localgrad.data.sets import Images
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.results.evaluation import early_exit, evaluate
from localgrad.results.finished import load_trained
from localgrad.training.trainer import fit

TINY = TrainConfig(
    name="digits-dgl-man",
    model=ModelConfig(depth=8),
    data=replace(data.digits(), image_size=8, padding=1, train_limit=60, test_limit=40),
    cuts=("layer1.0", "layer2.0"),
    objective=ObjectiveConfig(name="dgl"),
    momentum=MomentumConfig(name="man"),
    optim=OptimConfig(lr=0.1, batch_size=16, epochs=1, warmup_epochs=0),
    accelerator="cpu",
    precision="32-true",
)
DIGITS = replace(data.digits(), image_size=8, crop="none", train_limit=600)


class Take(nn.Module):
    """Some function of the features as a unit."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features)


def _unit(function: Callable[[Tensor], Tensor], *shape: int, name: str = "unit", writes_input: bool = False) -> Unit:
    return Unit(name, Take(function), torch.Size((2, *shape)), 1, writes_input)


def _vectors(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sizes, generator=generator) for _ in range(3)]


# CKA


def _hsic_by_loops(x: Tensor, y: Tensor) -> float:
    """HSIC_1 as it is written: sums over indices, in float64."""
    n = len(x)
    k, m = ((z.double() @ z.double().T).tolist() for z in (x, y))
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    trace = sum(k[i][j] * m[j][i] for i, j in pairs)
    sums = sum(k[i][j] for i, j in pairs) * sum(m[i][j] for i, j in pairs)
    chain = sum(k[i][j] * m[j][q] for i, j in pairs for q in range(n) if q != j)
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)) / (n * (n - 3))


def test_cka_is_the_formula() -> None:
    first = [_unit(lambda x: x @ torch.ones(5, 3).tril(), 3), _unit(torch.tanh, 3)]
    second = [_unit(lambda x: (x * 2 + 1).relu(), 5)]
    batches = [batch[:size] for batch, size in zip(_vectors(9, 5), (9, 9, 7), strict=True)]
    found = cka(first, second, batches)
    assert found.shape == (2, 1)
    for row in range(2):
        parts = []
        for x in batches:
            features, (other,) = list(unit_features(first, x)), list(unit_features(second, x))
            pairs = ((features[row], other), (features[row], features[row]), (other, other))
            parts.append([_hsic_by_loops(*pair) for pair in pairs])
        cross, own, others = np.mean(parts, axis=0)
        assert float(found[row, 0]) == pytest.approx(cross / math.sqrt(own * others), abs=1e-5)


def test_cka_with_itself_is_one_and_rotation_and_scale_change_nothing() -> None:
    batches = _vectors(20, 4)
    rotation, _ = torch.linalg.qr(_vectors(4, 4, seed=1)[0])
    plain = [_unit(lambda x: x, 4)]
    bent = [_unit(lambda x: x.pow(3), 4)]
    assert float(cka(plain, plain, batches)) == pytest.approx(1, abs=1e-9)
    moved = [_unit(lambda x: -7 * x.pow(3) @ rotation + 5, 4)]
    assert float(cka(plain, moved, batches)) == pytest.approx(float(cka(plain, bent, batches)), abs=1e-5)
    assert float(cka(plain, bent, batches)) < 0.95
    stretched = [_unit(lambda x: x * torch.tensor([9.0, 1, 1, 1]), 4)]
    assert float(cka(plain, stretched, batches)) < 0.9, "a linear map that is no rotation does change it"


def test_cka_of_unrelated_features_is_about_zero_in_small_batches_too() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 100, generator=generator) for _ in range(60)]
    found = cka([_unit(lambda x: x[:, :50], 50)], [_unit(lambda x: x[:, 50:], 50)], batches)
    assert abs(float(found)) < 0.1, "the biased estimator gives about 0.9 here"


def test_cka_of_the_same_network_is_symmetric() -> None:
    found = units(cifar_resnet(8), torch.zeros(2, 3, 8, 8))
    matrix = cka(found, found, [torch.randn(10, 3, 8, 8)])
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(5, dtype=torch.float64))
    assert mean_diagonal(matrix) == pytest.approx(1)


def test_cka_says_what_it_cannot_do() -> None:
    some = [_unit(lambda x: x, 4)]
    with pytest.raises(LocalGradError, match=r"a batch has 3 image\(s\): CKA needs at least 4"):
        cka(some, some, [torch.randn(3, 4)])
    with pytest.raises(LocalGradError, match="there is no batch"):
        cka(some, some, [])
    for value, n in ((1.0, 6), (0.1, 100), (0.1, 256)):  # whose mean is rounded
        constant = [_unit(lambda x, value=value: torch.full_like(x, value), 4)]
        assert cka(some, constant, [torch.randn(n, 4)]).isnan().all()
        assert cka(constant, constant, [torch.randn(n, 4)]).isnan().all()


def test_the_gram_matrix_is_centred_off_its_diagonal() -> None:
    gram = u_centred_gram(torch.randn(7, 3) + 100)
    torch.testing.assert_close(gram.sum(1), torch.zeros(7, dtype=torch.float64))
    assert (gram.diagonal() == 0).all()


# Probes


def test_losses_and_gradients_are_the_formula() -> None:
    torch.manual_seed(0)
    means, deviations = [torch.randn(3), torch.randn(5)], [torch.rand(3) + 0.5, torch.rand(5) + 0.5]
    probes = Probes(means, deviations, num_classes=4)
    for parameter in probes.parameters():
        nn.init.normal_(parameter)
    features, targets = [torch.randn(6, 3), torch.randn(6, 5)], torch.tensor([0, 1, 2, 3, 0, 1])
    losses = probes.losses(features, targets)
    losses.sum().backward()
    for index, layer in enumerate(probes.classifiers):
        assert isinstance(layer, nn.Linear)
        z = ((features[index] - means[index]) / deviations[index]).double()
        scores = z @ layer.weight.detach().double().T + layer.bias.detach().double()
        shares = scores.exp() / scores.exp().sum(1, keepdim=True)
        assert float(losses[index].detach()) == pytest.approx(float(-shares[range(6), targets].log().mean()), rel=1e-5)
        wrong = (shares - torch.eye(4, dtype=torch.float64)[targets]) / 6
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.weight.grad.double(), wrong.T @ z, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.bias.grad.double(), wrong.sum(0), rtol=1e-4, atol=1e-6)


def _two_units() -> list[Unit]:
    """Features of one network: a random linear map of the pixels, then some of its outputs squashed."""
    weight = torch.randn(3 * 8 * 8, 24, generator=torch.Generator().manual_seed(0)) / 14
    return [
        _unit(lambda x: 50 * (x.flatten(1) @ weight).relu() + 3, 24, name="first"),
        _unit(lambda x: torch.tanh(x[:, :12] / 50), 12, name="second"),
    ]


def test_probes_are_as_accurate_as_logistic_regression() -> None:
    found, (train, test) = _two_units(), load_images(replace(DIGITS, train_limit=None))
    results = probe(found, train, test, epochs=25, batch_size=50)
    assert [result.unit for result in results] == ["first", "second"]
    (x, y), (x_test, y_test) = (next(iter(part.batches(len(part), train=False))) for part in (train, test))
    for result, a, b in zip(results, unit_features(found, x), unit_features(found, x_test), strict=True):
        scaler = StandardScaler().fit(a)
        oracle = LogisticRegression(max_iter=2000).fit(scaler.transform(a), y)
        accuracy = 100 * oracle.score(scaler.transform(b), y_test)
        assert result.accuracy == pytest.approx(accuracy, abs=2.5), result
    assert results[0].accuracy > results[1].accuracy + 5 > 30


def test_each_probe_is_trained_as_if_alone() -> None:
    found, (train, test) = _two_units(), load_images(replace(DIGITS, train_limit=100, test_limit=50))
    together = probe(found, train, test, epochs=2, batch_size=50)
    alone = probe(found[:1], train, test, epochs=2, batch_size=50)
    assert together[0] == alone[0]
    assert probe(found, train, test, epochs=2, batch_size=50, seed=1) != together


def test_statistics_are_exact_and_a_constant_channel_stays() -> None:
    train, _ = load_images(replace(DIGITS, train_limit=70))
    channels = _unit(lambda x: torch.cat([x.mean(1) + 1000, torch.full((len(x), 1, 8), 3.0)], 1), 9, 8)
    (means,), (deviations,) = probing._statistics([channels], train, batch_size=32, seed=0)
    (inputs, _), *_ = list(train.batches(70, train=False))
    features = channels.module(inputs).double().mean(2)
    torch.testing.assert_close(means.double(), features.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviations[:8].double(), features[:, :8].std(0, correction=0), rtol=1e-3, atol=1e-4)
    assert deviations[8] == 1


def test_a_probed_network_is_left_as_it_was() -> None:
    model = cifar_resnet(8).train()
    found, (train, test) = units(model, torch.zeros(2, 3, 8, 8)), load_images(replace(DIGITS, train_limit=40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe(found, train, test, epochs=1, batch_size=20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_probes_refuse_what_they_cannot_train_on() -> None:
    train, test = load_images(replace(DIGITS, train_limit=20))
    with pytest.raises(LocalGradError, match=r"epochs is 0, it must be at least 1; batch_size is 1.*; lr is 0"):
        probe(_two_units(), train, test, epochs=0, batch_size=1, lr=0)


# Features


def test_a_unit_that_writes_in_place_does_not_change_the_features_before_it() -> None:
    found = [_unit(lambda x: x - 1, 4), _unit(lambda x: x.relu_(), 4, writes_input=True)]
    inputs = torch.zeros(2, 4)
    first, second = list(unit_features(found, inputs))
    assert (first == -1).all()
    assert (second == 0).all()
    assert (inputs == 0).all()


def test_features_of_a_network_end_with_its_output() -> None:
    model = cifar_resnet(8).eval()
    found, inputs = units(model, torch.zeros(2, 3, 8, 8)), torch.randn(3, 3, 8, 8)
    assert torch.equal(list(unit_features(found, inputs))[-1], model(inputs))


def test_pooling_is_over_all_but_samples_and_channels() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x, 1), x.mean((2, 3)))
    torch.testing.assert_close(pooled(x, 3), x.mean((1, 2)))
    torch.testing.assert_close(pooled(x[..., 0], -1), x[..., 0].mean(1))
    assert torch.equal(pooled(x[..., 0, 0], 1), x[..., 0, 0])


def test_plain_batches_are_mixed_and_not_augmented() -> None:
    train, _ = load_images(replace(data.digits(), image_size=8, padding=2, train_limit=50))
    inputs, targets = next(iter(plain_batches(train, 50, torch.device("cpu"))))
    as_filed, labels = next(iter(train.batches(50, train=False)))
    assert not torch.equal(targets, labels)
    order = [int((as_filed == image).flatten(1).all(1).nonzero()[0]) for image in inputs]
    assert torch.equal(labels[order], targets)


# Pictures


def test_activation_maps_are_means_over_channels() -> None:
    model = cifar_resnet(8).eval()
    inputs = torch.randn(3, 3, 16, 16)
    maps = activation_maps(units(model, inputs), inputs)
    assert [None if each is None else tuple(each.shape) for each in maps] == [
        (3, 16, 16),
        (3, 16, 16),
        (3, 8, 8),
        (3, 4, 4),
        None,
    ]
    stem = model.relu(model.bn1(model.conv1(inputs)))
    assert maps[0] is not None
    torch.testing.assert_close(maps[0], stem.detach().mean(1))


def test_activation_maps_of_tokens_lie_on_the_grid_of_patches() -> None:
    model, inputs = TinyTransformer().eval(), torch.randn(2, 3, 16, 16)
    found = units(model, inputs)
    maps = activation_maps(found, inputs)
    after_layer = maps[next(index for index, unit in enumerate(found) if unit.name == "layers.0")]
    assert after_layer is not None
    features = list(unit_features(found, inputs))[[unit.name for unit in found].index("layers.0")]
    torch.testing.assert_close(after_layer, features[:, 1:].detach().mean(2).unflatten(1, (4, 4)))
    assert maps[-1] is None


def _clusters() -> Images:
    """60 images of three colours with noise, as three classes."""
    labels = torch.arange(60) % 3
    pixels = torch.randint(0, 40, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(60), labels] += 200
    config = replace(DIGITS, train_limit=None, num_classes=3)
    return Images(labels, config, 3, pixels.to(torch.uint8))


def test_principal_components_are_those_of_the_singular_values() -> None:
    images = _clusters()
    (points,) = project([_unit(lambda x: x, 3, 8, 8)], images)
    inputs, _ = next(iter(images.batches(60, train=False)))
    centred = inputs.mean((2, 3)) - inputs.mean((0, 2, 3))
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(points.abs(), (u * s)[:, :2].abs(), rtol=1e-3, atol=1e-3)


def test_neighbours_stay_together_in_tsne() -> None:
    images = _clusters()
    (points,) = project([_unit(lambda x: x, 3, 8, 8)], images, method="tsne")
    nearest = (torch.cdist(points, points) + 1e9 * torch.eye(60)).argmin(1)
    assert (images.labels[nearest] == images.labels).all()


def test_projections_say_what_they_cannot_do() -> None:
    some: Any = "umap"
    with pytest.raises(LocalGradError, match="the projection is 'umap': it is one of pca, tsne"):
        project(_two_units(), _clusters(), method=some)
    with pytest.raises(LocalGradError, match=r"there are 3 image\(s\) to project: give at least 4"):
        project(_two_units(), _clusters().subset(torch.arange(3)))


# The commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "local"
    fit(TINY, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "end-to-end"
    end_to_end = replace(TINY, name="digits-e2e", cuts=(), objective=ObjectiveConfig(), momentum=MomentumConfig())
    fit(end_to_end, folder, quiet=True)
    return folder


def _analyse(*arguments: object) -> None:
    assert main(["analyse", *map(str, arguments), "--accelerator", "cpu"]) == 0


def test_analyse_does_everything_by_itself(run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    _analyse(run, other, "--epochs", 1, "--batch-size", 30, "--output", tmp_path / "out")
    names = ["probe.json", "probe.png", "cka-end-to-end.json", "cka-end-to-end.png", "pictures.json"]
    names += ["pictures-maps.png", "pictures-features.png"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / 'out' / name}" for name in names]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    found = {name: json.loads((tmp_path / "out" / name).read_text()) for name in names if name.endswith(".json")}
    assert all(values["units"] == ["conv1", "layer1.0", "layer2.0", "layer3.0", "fc"] for values in found.values())
    probed, compared, drawn = found.values()
    assert probed["blocks"] == drawn["blocks"] == [1, 1, 2, 3, 3]
    assert probed["settings"]["train_images"] == 60
    assert all(0 <= accuracy <= 100 and accuracy * 40 % 100 == 0 for accuracy in probed["accuracies"])
    used = [values["data"]["test_images"] for values in (probed, compared, drawn)]
    assert used == [40, 30, 40], "CKA takes whole batches"
    assert [each["name"] for each in compared["runs"]] == ["local", "end-to-end"]
    assert [each["num_blocks"] for each in compared["runs"]] == [3, 1]
    diagonal = [compared["alignment"][index][index] for index in range(5)]
    assert compared["mean_diagonal"] == pytest.approx(sum(diagonal) / 5)
    assert drawn["image_labels"] == [0, 1, 2, 3]
    assert np.array(drawn["thumbnails"]).shape == (4, 8, 8, 3)
    assert np.array(drawn["points"]).shape == (5, 40, 2)


def test_analyse_takes_other_images_and_writes_beside_the_run(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for label in range(10):
        for split in ("train", "test"):
            (tmp_path / "images" / split / str(label)).mkdir(parents=True)
            Image.new("RGB", (8, 8), (25 * label, 0, 99)).save(tmp_path / "images" / split / str(label) / "one.png")
    streamed = replace(TINY.data, source=str(tmp_path / "images"), streaming=True, train_limit=None, test_limit=None)
    for config in (streamed, replace(streamed, streaming=False)):
        some = load_images(config)[1].subset(torch.tensor([4, 9, 1]))
        inputs, labels = next(iter(some.batches(5, train=False)))
        assert labels.tolist() == [4, 9, 1]
        assert (inputs[:, 0, 0, 0] * config.std[0] + config.mean[0]).mul(255).round().tolist() == [100, 225, 25]
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    _analyse(copy, "--data", tmp_path / "images", "--pictures", "--images", 7, 2, "--points", 6)
    assert {path.suffix for path in (copy / "analysis").iterdir()} == {".json", ".png"}
    values = json.loads((copy / "analysis" / "pictures.json").read_text())
    assert values["data"] == {
        "source": str(tmp_path / "images"),
        "test_split": "test",
        "test_images": 10,
        "class_names": list(map(str, range(10))),
    }
    assert (values["kind"], values["schema"]) == ("pictures", 1)
    assert values["image_labels"] == [7, 2]
    assert [images[0][0] for images in values["thumbnails"]] == [[175, 0, 99], [50, 0, 99]]
    assert len(values["point_labels"]) == 6


def test_other_images_have_the_same_classes_in_the_same_order(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    names = [f"class {number}" for number in range(10)]
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"class_names": names}))
    for folder, given in (("same", names), ("other", [*names[1:], "class x"]), ("disjoint", list("abcdefghij"))):
        for split, name in itertools.product(("train", "test"), given):
            (tmp_path / folder / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / folder / split / name / "one.png")
    for folder in ("same", "disjoint"):
        assert evaluate(copy, data=str(tmp_path / folder), accelerator="cpu").images == 10
    with pytest.raises(LocalGradError, match=r"has the classes class 1, .* was trained on class 0, "):
        evaluate(copy, data=str(tmp_path / "other"), accelerator="cpu")


def test_what_cannot_be_done_is_said_before_anything_is_trained(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else what the probes found would be there."""
    (tmp_path / "file").touch()
    for arguments, message in (
        ((tmp_path / "missing",), "missing"),
        (("--images", 9999), "9999"),
        (("--output", tmp_path / "file"), "file cannot"),
        ((other, "--test-limit", 3), "CKA"),
    ):
        output = ["--output", str(tmp_path / "out")] if "--output" not in arguments else []
        assert main(["analyse", str(run), *map(str, arguments), *output, "--accelerator", "cpu"]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_networks_of_one_name_have_two_files(run: Path, other: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "net", tmp_path / "b" / "net"
    shutil.copytree(run, first)
    shutil.copytree(other, second)
    for other_run in (first, second, second):
        _analyse(run, other_run, "--cka", "--output", tmp_path / "out")
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("cka-net*.json")]
    assert sorted(each["runs"][1]["num_blocks"] for each in found) == [1, 3]


def test_networks_of_other_units_have_no_mean(run: Path, other: Path) -> None:
    ours, theirs = (load_trained(each, accelerator="cpu") for each in (run, other))
    assert study.study_cka(ours, theirs, batch_size=20).mean_diagonal is not None
    cuts = tuple(f"0.{name}" for name in theirs.cuts)
    renamed = replace(theirs, model=nn.Sequential(theirs.model), config=replace(theirs.config, cuts=cuts))
    assert len(units_of(renamed)) == len(units_of(ours))
    assert study.study_cka(ours, renamed, batch_size=20).mean_diagonal is None


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_features_that_are_constant_or_of_one_channel_have_a_picture(method: Any) -> None:
    images = _clusters()
    constant, single = _unit(lambda x: torch.full_like(x, 0.1), 3, 8, 8), _unit(lambda x: x.mean(1, True), 1, 8, 8)
    first, second = project([constant], images, method=method)[0], project([single], images, method=method)[0]
    assert torch.equal(first, torch.zeros(len(images), 2))
    assert second.shape == (len(images), 2)
    assert second[:, 0].std() > 0


def test_exit_at_a_block_gives_the_error_of_its_own_head(run: Path) -> None:
    local_errors = evaluate(run, local_heads=True, accelerator="cpu").local_errors
    assert local_errors is not None
    exits = [early_exit(run, block, accelerator="cpu") for block in (1, 2, 3)]
    assert [each.test_error for each in exits] == local_errors
    assert all((each.num_blocks, each.images) == (3, 40) for each in exits)
    assert (exits[2].compute, exits[2].parameters) == (1, 1)
    model = cifar_resnet(8)
    own = sum(p.numel() for part in (model.conv1, model.bn1, model.layer1) for p in part.parameters())
    head = sum(p.numel() for part in (model.layer2, model.layer2) for p in part.parameters())  # two branches
    head += 3 * (32 * 32 + 2 * 32)  # 1x1 convolutions and their norms, without bias
    head += 2 * (32 * 32 + 2 * 32) + 32 * 10 + 10  # on 1 x 1 x 32, the quarter of 4 pixels
    assert exits[0].parameters == pytest.approx((own + head) / sum(p.numel() for p in model.parameters()))
    stem_and_unit = 64 * 27 * 16 + 2 * 64 * 144 * 16  # multiply-adds: pixels x window x channels out
    branch = 16 * (144 * 32 + 288 * 32 + 16 * 32)
    head = 2 * branch + 3 * 32 * 32 + 2 * 32 * 32 + 32 * 10
    network = stem_and_unit + branch + 4 * (288 * 64 + 576 * 64 + 32 * 64) + 64 * 10
    assert exits[0].compute == pytest.approx((stem_and_unit + head) / network)


def test_exit_at_prints_what_it_saves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--exit-at", "1", "--accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    found = early_exit(run, 1, accelerator="cpu")
    assert f"test error {found.test_error:.2f}% on 40 images, after block 1 of 3: {found.compute:.1%} of" in out
    assert f"{found.parameters:.1%} of its parameters" in out


def test_a_head_without_class_scores_cannot_be_exited_at(tmp_path: Path) -> None:
    contrast = ObjectiveConfig(name="infopro", loss="contrast", task=(1.0, 1.0))
    fit(replace(TINY, objective=contrast, momentum=MomentumConfig()), tmp_path, quiet=True)
    with pytest.raises(LocalGradError, match=r"block 2 gives no class scores .* exit at another block"):
        early_exit(tmp_path, 2, accelerator="cpu")
    assert early_exit(tmp_path, 3, accelerator="cpu").images == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "RUN", "--exit-at", "0"], "has 3 block(s); give a number from 1 to 3"),
        (["evaluate", "RUN", "--exit-at", "4"], "exit-at is 4: "),
        (["evaluate", "RUN", "--exit-at", "1", "--local-heads"], "give one of the two"),
        (["analyse", "nowhere"], "nowhere"),
        (["analyse", "RUN", "--cka"], "--cka compares two networks: give another run folder"),
        (["analyse", "RUN", "RUN", "--probe"], "is for CKA, which was not asked for"),
        (["analyse", "RUN", "--epochs", "0", "--points", "1"], "epochs=0: give at least 1; points=1: give at least 4"),
        (["analyse", "RUN", "--pictures", "--images", "40"], "there is no test image 40: the set has 40; give 0 to 39"),
        (["analyse", "RUN", "--pictures", "--output", "/dev/null/x"], "give another --output"),
        (["analyse", "RUN", "RUN", "--cka", "--test-limit", "3"], "CKA on batches of 3 image(s): it needs at least 4"),
    ],
)
def test_mistakes_get_one_line(run: Path, arguments: list[str], message: str, capsys: Any) -> None:
    given = [str(run) if word == "RUN" else word for word in arguments]
    assert main([*given, "--accelerator", "cpu"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (run / "analysis").exists()


def test_networks_of_other_images_are_not_compared(run: Path, tmp_path: Path) -> None:
    fit(replace(TINY, data=replace(TINY.data, mean=(0.5, 0.5, 0.5))), tmp_path, quiet=True)
    with pytest.raises(LocalGradError, match="take images of another size or normalisation"):
        list(analyse_run(run, tmp_path, cka=True, accelerator="cpu"))
