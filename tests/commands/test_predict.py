"""`predict` and `load_run`: what a run learnt, used on images outside of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import localgrad
from localgrad.commands.main import main
from localgrad.data.loading import load_images
from localgrad.runs.folder import RunFolder
from localgrad.runs.load import load_run

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ by colour, as a phone exports them: folders of classes, sizes that differ."""
    root = tmp_path_factory.mktemp("phone") / "my photographs"
    generator = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 80, (12 + i, 14, 3), dtype=np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / name / f"IMG_{i}.JPG", "JPEG")
        (root / name / "movie.mov").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a run"
    small = ["--model.name", "cifar_resnet", "--model.depth", "8", "--cuts", "layer2.0", "--objective.head", "compact"]
    shape = ["--data.image-size", "8", "--data.resize", "8", "--data.padding", "1", "--batch-size", "8", "--lr", "0.1"]
    flags = ["--epochs", "6", "--run-dir", str(folder), "--accelerator", "cpu"]
    assert main(["train", "--data", str(photographs), *small, *shape, *flags]) == 0
    return folder


def test_own_images_need_no_recipe_and_what_was_left_out_is_said(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photographs.parent)
    assert main(["train", "--data", photographs.name, "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["data"]["source"] == str(photographs) and config["name"] == "images-my photographs"
    assert (config["data"]["test_fraction"], config["model"]["name"]) == (0.2, "torchvision:resnet18")
    assert main(["train", "--data", "absent", "--run-dir", str(tmp_path / "run")]) == 2
    assert "'absent'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_keeps_its_images_apart(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, and in another place; other images in the same place are refused."""
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run)]) == 0
    assert "on 6 images" in capsys.readouterr().out
    saved = json.loads((run / "images.json").read_text())
    assert saved["train"]["images"] == 18 and saved["test"]["images"] == 6
    moved = photographs.rename(photographs.parent / "moved")
    try:
        assert main(["evaluate", str(run)]) == 2
        assert str(photographs) in capsys.readouterr().err
        other = tmp_path / "other"
        for name in CLASSES:
            (other / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (9, 9), (i, 0, 0)).save(other / name / f"IMG_{i}.JPG")
        other.rename(photographs)
        assert main(["evaluate", str(run)]) == 2
        assert "was trained with other images than those of" in capsys.readouterr().err
    finally:
        photographs.rename(tmp_path / "gone")
        moved.rename(photographs)


def test_load_run_gives_what_the_run_tested(run: Path) -> None:
    model, classes, transform = localgrad.load_run(run)
    assert classes == list(CLASSES) and not model.training
    config = RunFolder(run).config()
    _, test = load_images(config.data, say=lambda _: None)
    inputs, targets = next(test.batches(len(test), train=False))
    wrong = (model(inputs).argmax(1) != targets).double().mean()
    assert 100 * float(wrong) == pytest.approx(json.loads((run / "result.json").read_text())["test_error"])
    files = sorted(Path(config.data.source).rglob("*.JPG"))
    ours = {transform(path).numpy().tobytes() for path in files}
    assert {image.numpy().tobytes() for image in inputs} <= ours


def test_predict_prints_classes_and_probabilities(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((photographs / "bee").glob("*.JPG"))[:2]
    assert main(["predict", str(run), *map(str, files), "--top", "2"]) == 0
    said = capsys.readouterr().out
    for file in files:
        (line,) = [line for line in said.splitlines() if str(file) in line]
        assert line.count("%") == 2
    assert main(["predict", str(run), str(photographs), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 24 and {*found[0]["probabilities"]} == {*CLASSES}
    model, classes, transform = load_run(run)
    for said in found[::7]:
        scores = model(transform(said["image"])[None]).softmax(1)[0]
        expected = dict(zip(classes, scores.tolist(), strict=True))
        assert said["probabilities"] == pytest.approx(expected, abs=1e-5) and said["class"] == max(
            expected, key=expected.get
        )


def test_predict_refuses_all_broken_images_at_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no image")
    assert main(["predict", str(run), str(tmp_path), str(tmp_path / "absent.jpg")]) == 2
    said = capsys.readouterr().err
    assert "3 of 3 given images" in said and "a.jpg" in said and "absent.jpg (not there)" in said
    assert main(["predict", str(run)]) == 2
    assert "predict takes images" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "a.jpg"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_predict_goes_on_past_broken_images_and_says_what_it_does_to_others(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    whole = (photographs / "ant" / "IMG_0.JPG").read_bytes()
    (folder / "a.jpg").write_bytes(whole)
    (folder / "cut.jpg").write_bytes(whole[:200])
    (folder / "._a.jpg").write_bytes(b"a system's own")
    Image.new("RGBA", (9, 9), (9, 9, 9, 0)).save(folder / "sticker.png")
    assert main(["predict", str(run), str(folder)]) == 1
    said = capsys.readouterr()
    assert "1 of 3 given images" in said.err and "cut.jpg" in said.err and "._a" not in said.err
    assert "given: 1 of 2 images" in said.err
    assert "a.jpg" in said.out and "sticker.png" in said.out


def test_images_of_another_size_are_resized_where_the_run_takes_squares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits"
    flags = ["--train-limit", "20", "--test-limit", "10", "--batch-size", "10", "--epochs", "1", "--model.depth", "8"]
    small = ["--data.image-size", "8", "--data.padding", "1", "--quiet"]
    assert main(["train", "digits-e2e", *flags, *small, "--run-dir", str(folder)]) == 0
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "wide.png")]) == 0
    said = capsys.readouterr()
    assert "1 of 1 images are resized to 8 x 8" in said.err and said.out.count("%") == 3
    assert load_run(folder).classes == [str(number) for number in range(10)]
    assert torch.isfinite(load_run(folder).transform(Image.new("RGBA", (8, 8)))).all()


def test_the_weights_say_what_they_are(run: Path) -> None:
    with safe_open(run / "model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["localgrad"])
    assert (said["version"], said["network"], said["depth"]) == (localgrad.__version__, "cifar_resnet", 8)
    assert (said["classes"], said["image_size"], said["resize"]) == (list(CLASSES), 8, 8)
    assert len(said["mean"]) == len(said["std"]) == 3


def test_a_run_goes_on_from_another_ones_weights_and_with_frozen_modules(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fine tuned"
    flags = ["--init-from", str(run), "--freeze", "conv1", "layer1", "--epochs", "1", "--lr", "0.05"]
    assert main(["train", str(run), *flags, "--run-dir", str(folder)]) == 0
    assert f"weights of {run / 'model.safetensors'}" in capsys.readouterr().err
    before, after = load_run(run).model.state_dict(), load_run(folder).model.state_dict()
    assert torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert not torch.equal(before["layer3.0.conv1.weight"], after["layer3.0.conv1.weight"])


@pytest.mark.filterwarnings("ignore:block 0 .* trains nothing")  # what `split` says of it
def test_a_block_with_nothing_to_train_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--freeze", "conv1", "bn1", "layer1", "layer2", "--run-dir", str(tmp_path / "frozen")]
    assert main(["train", str(run), *flags]) == 2
    said = capsys.readouterr().err
    assert "block 1 of 2 (conv1 to layer2.0) has nothing to train" in said and not (tmp_path / "frozen").exists()


def test_a_network_in_a_file_trains_and_a_wrong_one_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
        "def narrow(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    flags = ["--cuts", "0", "--epochs", "1", "--run-dir", "own run"]
    assert main(["train", str(run), "--model.name", "mine.py:narrow", *flags]) == 2
    assert "gives (2, 2) for 2 images" in capsys.readouterr().err and not Path("own run").exists()
    assert main(["train", str(run), "--model.name", "mine.py:net", *flags]) == 0, capsys.readouterr().err
    monkeypatch.chdir("/")
    assert len(load_run(tmp_path / "own run").classes) == 3
