"""The examples at tiny sizes: each method trains, writes what it found, and refuses what has no meaning."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.examples import FOLDER, example
from localgrad.runs.result import SCHEMA

torch.set_num_threads(1)

language, segmentation, selfsupervised, views = map(example, ("language", "segmentation", "selfsupervised", "views"))


def run(module: ModuleType, tmp_path: Path, data: Path, *flags: str) -> dict[str, Any]:
    out = tmp_path / "out" / "result.json"
    result = module.main(["--data", str(data), "--out", str(out), "--device", "cpu", *flags])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert (result["kind"], result["schema"]) == ("benchmark", SCHEMA)
    return result


# Language.

TINY_TEXT = "--layers 3 --heads 2 --width 16 --context 8 --batch-size 8 --steps 30 --lr 0.01 --evaluations 2"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be\n" * 60)
    return path


@pytest.mark.parametrize(
    "flags",
    [
        "--method e2e",
        "--method checkpointed",
        "--method local --blocks 2 --head private",
        "--method local --blocks 3 --momentum man",
        "--method local --blocks 3 --momentum residual",
        "--method local --blocks 2 --momentum ema --depth 1",
        "--method local --blocks 2 --momentum bias",
    ],
)
def test_language_learns_by_every_method(flags: str, text: Path, tmp_path: Path) -> None:
    result = run(language, tmp_path, text, *TINY_TEXT.split(), *flags.split())
    letters = len(set(text.read_text()))
    assert result["validation_loss"] < 0.8 * math.log(letters)
    assert result["perplexity"] == pytest.approx(math.exp(result["validation_loss"]))
    blocks = result["settings"]["blocks"] if "local" in flags else 1
    assert len(result["exits"]) == blocks - 1
    assert all(exit < math.log(letters) for exit in result["exits"])
    assert len(result["texts"]["model"]) == 300 and ("first exit" in result["texts"]) == (blocks > 1)
    assert result["trained_parameters"] >= result["parameters"]


def test_language_gives_the_same_for_a_seed_and_checkpointing_changes_nothing(text: Path, tmp_path: Path) -> None:
    losses = [
        run(language, tmp_path, text, *TINY_TEXT.split(), *flags.split())["validation_loss"]
        for flags in ("--seed 3", "--seed 3", "--seed 3 --method checkpointed", "--seed 4")
    ]
    assert losses[0] == losses[1] == losses[2] != losses[3]


def test_language_validates_on_every_character(tmp_path: Path) -> None:
    data = torch.arange(23) % 5
    scores = torch.randn(5, 5)
    loss = language.validate(lambda tokens: scores[tokens], data, context=4)
    expected = torch.nn.functional.cross_entropy(scores[data[:20]], data[1:21])
    assert loss == pytest.approx(float(expected))


def test_language_reads_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: {"text": [name, split, "x" * 8]})
    train, validation = language.read(Path("owner/name"))
    assert train + validation == "owner/name\ntrain\nxxxxxxxx" and len(validation) == 3


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    for module in (segmentation, selfsupervised):
        with pytest.raises(SystemExit, match="parquet"):
            module.read(tmp_path / "nothing", "train")


def test_language_reads_a_folder_and_refuses_flags_without_effect(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc")
    (tmp_path / "validation.txt").write_text("cab")
    assert language.read(tmp_path) == ("abc", "cab")
    with pytest.raises(SystemExit, match="nothing/here"):
        language.read(tmp_path / "nothing" / "here")
    for flags in ("--method local --blocks 7 --layers 6", "--method local --head private --depth 1"):
        with pytest.raises(SystemExit):
            language.parse(["--data", "x", "--out", "y", *flags.split()])


# Segmentation.


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Dark and bright halves, of classes 0 and 1; a column of pixels that do not count."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number in range(4):
            mask = np.repeat([0, 1], 20)[None].repeat(32, 0).astype(np.uint8)
            image = (mask[..., None] * 120 + generator.integers(0, 60, (32, 40, 3))).astype(np.uint8)
            mask[:, 0] = 255
            Image.fromarray(image).save(tmp_path / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        "--method e2e",
        "--method checkpointed --model deeplab",
        "--method local --blocks 2 --reconstruction 0.5",
        "--method local --cuts backbone.layer1.0 backbone.layer3 --momentum man --recompute",
    ],
)
def test_segmentation_runs_by_every_method(flags: str, masks: Path, tmp_path: Path) -> None:
    tiny = "--classes 2 --ignored 255 --crop 32 40 --batch-size 2 --steps 4 --lr 0.01"
    result = run(segmentation, tmp_path, masks, *tiny.split(), *flags.split())
    assert 0 <= result["mean_iou"] <= 100 and len(result["ious"]) == 2
    assert result["trained_parameters"] >= result["parameters"]
    with Image.open(tmp_path / "out" / "result.png") as picture:
        assert picture.size == (3 * 40, 4 * 32)


def test_segmentation_s_mean_iou_is_the_formula() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 2, 255]]], dtype=torch.uint8)
    guess = torch.tensor([[[0, 1, 1, 1], [2, 2, 0, 0]]])

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": torch.nn.functional.one_hot(guess, 4).permute(0, 3, 1, 2).float()}

    ious, _ = segmentation.evaluate(Fixed(), torch.zeros(1, 3, 2, 4, dtype=torch.uint8), truth, 4)
    assert ious[:3] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert math.isnan(ious[3])


def test_segmentation_moves_image_and_mask_alike() -> None:
    torch.manual_seed(0)
    mask = (torch.rand(8, 6, 8).repeat_interleave(8, 1).repeat_interleave(8, 2) > 0.5).byte()
    images = (mask[:, None] * 200).expand(-1, 3, -1, -1)
    inputs, classes = segmentation.augmented(images, mask, (40, 56), ignored=7)
    seen = classes != 7
    bright = inputs[:, 0] > 0
    assert seen.float().mean() > 0.7
    assert (bright[seen] == (classes[seen] == 1)).float().mean() > 0.95


# Self-supervision.


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Two classes of images: noise, dark or bright."""
    generator = np.random.default_rng(0)
    labels = np.arange(24) % 2
    images = (generator.integers(0, 100, (24, 32, 32, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    path = tmp_path / "arrays.npz"
    np.savez(path, train_images=images[:16], train_labels=labels[:16], test_images=images[16:], test_labels=labels[16:])
    return path


@pytest.mark.parametrize(
    "flags", ["--method e2e", "--method local --noise 0.25", "--method local --momentum man", "--method local"]
)
def test_selfsupervision_runs_by_every_method(flags: str, arrays: Path, tmp_path: Path) -> None:
    tiny = "--projector 16 16 --batch-size 4 --epochs 1 --probe-epochs 2"
    result = run(selfsupervised, tmp_path, arrays, *tiny.split(), *flags.split())
    assert len(result["probe_accuracies"]) == 4
    assert all(0 <= accuracy <= 100 for accuracy in result["probe_accuracies"])
    assert math.isfinite(result["loss"]) and result["train_images"] == 16


def test_a_probe_finds_what_is_linear() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(400, 5), torch.randint(3, (400,))
    features[:, :3] += 6 * torch.nn.functional.one_hot(labels, 3)
    assert selfsupervised.probe(features[:300], labels[:300], features[300:], labels[300:], epochs=300) > 95


def test_views_differ_and_noise_is_of_training_alone() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    assert not torch.equal(views.view(images), views.view(images))
    noise = views.Noise(0.5)
    features = 2 * torch.randn(2, 50, 10, 10)
    assert float((noise(features) - features).std()) == pytest.approx(1, rel=0.1)
    assert torch.equal(noise.eval()(features), features)


# The list of what is run on a GPU.


def test_every_job_is_a_command_that_its_example_takes() -> None:
    spec = importlib.util.spec_from_file_location("task_jobs", FOLDER.parent / "benchmarks" / "task_jobs.py")
    assert spec is not None and spec.loader is not None
    task_jobs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task_jobs)
    jobs = task_jobs.jobs(Path("data"), Path("out"))
    assert len({job.name for job in jobs}) == len(jobs)
    assert [job.priority for job in jobs] == sorted(job.priority for job in jobs)
    modules = {"language": language, "segmentation": segmentation, "selfsupervised": selfsupervised}
    settings = set()
    for job in jobs:
        task = job.name.split("/")[0]
        options = modules[task].parse(job.arguments[2:])
        assert options.out == Path("out") / f"{job.name}.json"
        settings.add((task, tuple(sorted((k, str(v)) for k, v in vars(options).items() if k != "out"))))
    assert len(settings) == len(jobs)  # none is run twice
    assert {job.name for job in jobs if job.priority == 0} >= {"language/small-e2e-seed0", "segmentation/e2e-seed0"}


def test_an_order_shows_every_image_once_before_the_next_begins() -> None:
    order = views.Order(10, 3, seed=0)
    first, second = (torch.cat([order.next() for _ in range(3)]).tolist() for _ in range(2))
    assert len(set(first)) == len(set(second)) == 9 and first != second
