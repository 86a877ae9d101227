"""A table of bad input: every row is one line that says what to do, and nothing is written, lost or half-written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localgrad
from helpers.cases import IMAGE, MEAN, NUM_CLASSES, STD, batch
from localgrad import LocalGradError, classifier, dgl, infopro, local_step, man, manpp, plan, predsim, split, units
from localgrad.commands.main import main
from localgrad.config.schema import TrainConfig
from localgrad.errors import closest
from localgrad.models import cifar_resnet
from localgrad.results.evaluation import evaluate
from localgrad.training.trainer import fit

EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)
INPUTS, TARGETS = batch()


def _net() -> nn.Module:
    return cifar_resnet(8, NUM_CLASSES)


def _split(**changes: Any) -> list[localgrad.Block]:
    arguments = {"model": _net(), "example": EXAMPLE, "cuts": ["layer1"], "objective": dgl(NUM_CLASSES), **changes}
    return split(**arguments)


def _count(num_blocks: Any) -> list[localgrad.Block]:
    return _split(cuts=None, num_blocks=num_blocks)


def _step(inputs: Any = INPUTS, targets: Any = TARGETS, blocks: Any = None, optimizers: Any = None) -> list[Tensor]:
    blocks = _split() if blocks is None else blocks
    if optimizers is None:
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    return local_step(blocks, optimizers, inputs, targets)


def _info(**changes: Any) -> Any:
    return infopro(NUM_CLASSES, **{"mean": MEAN, "std": STD, **changes})


def _plan(**changes: Any) -> Any:
    return plan(_net(), EXAMPLE, **{"objective": dgl(NUM_CLASSES), **changes})


API: dict[str, tuple[Callable[[], Any], str]] = {
    # a batch
    "numpy inputs": (lambda: _step(INPUTS.numpy()), r"inputs are a ndarray: give a tensor"),
    "a list of targets": (
        lambda: _step(targets=[0] * 6),
        r"^targets .*\blist\b.*\(N, 5\)",
    ),
    "float64 inputs": (lambda: _step(INPUTS.double()), r"inputs are torch.float64 .* give inputs.to\(torch.float32\)"),
    "float16 inputs": (lambda: _step(INPUTS.half()), r"inputs are torch.float16 and the weights of block 0"),
    "uint8 inputs": (lambda: _step(INPUTS.byte()), r"inputs are torch.uint8 and the weights of block 0"),
    "inputs elsewhere": (lambda: _step(INPUTS.to("meta")), r"inputs are on meta and block 0 is on cpu: move them"),
    "targets elsewhere": (lambda: _step(targets=TARGETS.to("meta")), r"targets are on meta .*targets.to\('cpu'\)"),
    "one channel": (
        lambda: _step(INPUTS[:, :1]),
        r"inputs are \(6, 1, 16, 16\) and the model was split for \(N, 3, 16, 16\): block 0",
    ),
    "flat inputs": (
        lambda: _step(INPUTS.flatten(1)),
        r"inputs are \(6, 768\) and the model was split for .*block 0 \(conv1",
    ),
    "an empty batch": (lambda: _step(INPUTS[:0], TARGETS[:0]), r"inputs are \(0, 3, 16, 16\): an empty batch"),
    "float targets": (lambda: _step(targets=TARGETS.float()), r"targets are torch.float32 .*targets.long\(\)"),
    "int32 targets": (lambda: _step(targets=TARGETS.int()), r"targets are torch.int32 .*targets.long\(\)"),
    "targets in a column": (
        lambda: _step(targets=TARGETS[:, None]),
        r"targets are .*\(6, 1\).*\(N, 5\)",
    ),
    "too few targets": (lambda: _step(targets=TARGETS[:4]), r"targets \(4,\): give one target a sample"),
    "one target for all": (
        lambda: _step(targets=torch.tensor(1)),
        r"targets are torch.int64 .*\(\) .*\(N, 5\)",
    ),
    "a class too many": (lambda: _step(targets=TARGETS + 1), r"targets .* 1 to 5.*num_classes "),
    "a negative class": (lambda: _step(targets=TARGETS - 1), r"targets .* -1 to 3.*num_classes "),
    # blocks and optimizers
    "no blocks": (lambda: _step(blocks=[]), r"blocks is empty: give the list that `split` gave"),
    "one block alone": (lambda: _step(blocks=_split()[0], optimizers=[]), r"blocks is a Block .*give two lists"),
    "one optimizer": (
        lambda: _step(optimizers=torch.optim.SGD(_net().parameters())),
        r"optimizers a SGD: give two lists",
    ),
    "optimizers used up": (lambda: _step(optimizers=iter([])), r"optimizers a list_iterator: give two lists"),
    # split
    "no model": (lambda: _split(model=None), r"model is None: give an instance of a network"),
    "a class of models": (lambda: _split(model=nn.Linear), r"model is <class .*: give an instance"),
    "a function": (lambda: _split(model=lambda x: x), r"model is <function .*: give an instance"),
    "an empty model": (lambda: _split(model=nn.Sequential()), r"model is a Sequential: give an instance"),
    "an integer example": (lambda: _split(example=EXAMPLE.int()), "CifarResNet .*int32"),
    "a numpy example": (lambda: _split(example=EXAMPLE.numpy()), r"example is a ndarray: it must be one batch"),
    "a shape as example": (lambda: _split(example=(2, 3, 16, 16)), r"example is a tuple: it must be"),
    "an example that does not fit": (lambda: _split(example=EXAMPLE[:, :1]), r"CifarResNet"),
    "cuts as text": (lambda: _split(cuts="layer1"), r"cuts is 'layer1': give a list of names"),
    "cuts as numbers": (lambda: _split(cuts=[1]), r"cuts is \[1\]: give a list of names"),
    "cuts as a number": (lambda: _split(cuts=3), r"cuts is 3: give a list of names"),
    "a fraction of a block": (lambda: _count(2.5), "num_blocks is 2.5"),
    "a truth of blocks": (lambda: _count(True), "num_blocks is True"),
    "blocks as text": (lambda: _count("2"), "num_blocks is '2'"),
    "an unfinished objective": (lambda: _split(objective=dgl), r"num_classes is a Site.*as objective=localgrad.dgl\("),
    "an unfinished momentum": (lambda: _split(momentum=man), r"decay is a list: .* try momentum=man\(0.995\)"),
    "a criterion as text": (lambda: _split(criterion="ce"), r"criterion is 'ce': give a function"),
    "names that are not all": (lambda: _split(names=["conv1", "layer1"]), "conv1, layer1,.*CifarResNet"),
    "units of a list": (lambda: units([1], EXAMPLE), r"model is \[1\]: give an instance"),  # type: ignore[arg-type]
    # factories
    "no classes": (lambda: dgl(0), r"num_classes is 0: a local head gives a whole number"),
    "classes as text": (lambda: classifier("10"), r"num_classes is '10'"),  # type: ignore[arg-type]
    "half a class": (lambda: dgl(10.5), r"num_classes is 10.5"),  # type: ignore[arg-type]
    "similarity above all": (lambda: predsim(10, beta=2.0), r"beta is 2.0: it is the weight .* from 0 to 1"),
    "similarity as text": (lambda: predsim(10, beta="x"), r"beta is 'x'"),  # type: ignore[arg-type]
    "a deviation of zero": (lambda: _info(std=(0, 1, 1)), r"std \(0.0, 1.0, 1.0\): give one of each a channel"),
    "one weight": (lambda: _info(task=1.0), r"task is 1.0: give its weight at the first and the last local block"),
    "a weight that is nan": (lambda: _info(reconstruction=(float("nan"), 1)), r"reconstruction is \(nan, 1\)"),
    "decay as text": (lambda: man("x"), r"decay is 'x': it is from 0"),  # type: ignore[arg-type]
    "decay nan": (lambda: manpp(float("nan")), r"decay is nan: it is from 0"),
    "half a unit": (lambda: man(depth=1.5), r"depth is 1.5: copy at least the first unit"),  # type: ignore[arg-type]
    "a depth that is none": (lambda: cifar_resnet("8"), r"depth is '8': a CIFAR ResNet"),  # type: ignore[arg-type]
    # plan, fit, evaluate
    "a budget as text": (lambda: _plan(budget="8GiB"), "budget is '8GiB'"),
    "one number to plan": (lambda: _plan(num_blocks=4), r"num_blocks is 4: give the numbers to try"),
    "a plan for nothing": (lambda: _plan(objective=None), r"objective is None: give a factory"),
    "a config as a table": (lambda: fit({}, "run"), r"config is a dict: give a TrainConfig"),  # type: ignore[arg-type]
    "null in --run-dir": (lambda: fit(TrainConfig(num_blocks=1), "a\0b", quiet=True), r"run folder 'a\\x00b'"),
    "nothing to evaluate": (lambda: evaluate("nowhere"), "^nowhere .*config.json"),
}


@pytest.mark.parametrize("row", API)
def test_the_library_refuses(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = API[row]
    with pytest.raises(LocalGradError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert list(tmp_path.iterdir()) == []


def test_a_refused_batch_moves_no_weight() -> None:
    blocks = _split()
    before = [parameter.clone() for block in blocks for parameter in block.parameters()]
    for inputs, targets in ((INPUTS[:, :1], TARGETS), (INPUTS.double(), TARGETS), (INPUTS[:0], TARGETS[:0])):
        with pytest.raises(LocalGradError):
            _step(inputs, targets, blocks)
    assert all(map(torch.equal, before, (parameter for block in blocks for parameter in block.parameters())))


def test_an_error_of_an_objectives_own_is_left_alone() -> None:
    """What is not the input's fault is not blamed on the input."""

    class Broken(nn.Module):
        def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
            raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match=r"^my own\nin block 0 of 2"):
        _step(blocks=_split(objective=lambda site: Broken()))


# The command line: arguments, and what stderr says

SMALL = [
    *("--data.image-size", "8", "--data.padding", "1", "--train-limit", "40", "--test-limit", "20"),
    *("--batch-size", "20", "--precision", "32-true", "--quiet"),
]
HERE = ["--run-dir", "run", *SMALL]

COMMANDS: dict[str, tuple[list[str], str]] = {
    "a file as run folder": (["train", "digits-dgl", *SMALL, "--run-dir", "file"], "run folder 'file'"),
    "a file above it": (["train", "digits-dgl", *SMALL, "--run-dir", "file/x"], "--run-dir"),
    "a name too long": (["train", "digits-dgl", *SMALL, "--run-dir", "x" * 300], "File name too long; give another"),
    "nothing to resume": (["train", "digits-dgl", "--resume", *HERE], "leave out --resume"),
    "an absent folder": (["train", "digits-dgl", "--data", "./nowhere", *HERE], "--data './nowhere'"),
    "no such user": (["train", "digits-dgl", "--data", "~nobody-here/x", *HERE], "cannot be a folder"),
    "a path too long": (["train", "digits-dgl", "--data", "./" + "x" * 5000, *HERE], "cannot be a folder"),
    "an empty folder": (
        ["train", "digits-dgl", "--data", "empty", *HERE],
        "empty",
    ),
    "a rate too large": (["train", "digits-dgl", "--lr", "1e400"], "optim.lr is inf, it must be a finite number"),
    "an infinite decay": (["train", "digits-dgl", "--optim.weight-decay", "inf"], "optim.weight_decay is inf"),
    "epochs without end": (["train", "digits-dgl", "--epochs", "9" * 30], "it must be from 1 to 2**31 - 1"),
    "a single image": (["train", "digits-dgl", *HERE, "--train-limit", "1"], " 1 images"),
    "batches of one": (["train", "digits-dgl", *HERE, "--batch-size", "1"], "give two or more for each device"),
    "a model for larger images": (["train", "digits-dgl", *HERE, "--model.name", "torchvision:alexnet"], "AlexNet"),
    "a network as a path": (
        ["train", "digits-dgl", *HERE, "--model.name", "../evil"],
        "--model.name is '../evil'",
    ),
    "no such objective": (["train", "digits-dgl", "--objective.name", "dlg"], closest("dlg", ["dgl"])),
    "a decay above one": (["train", "digits-dgl-man", *HERE, "--momentum.decay", "7"], "decay is 7.0: it is from 0"),
    "more parts than images": (["train", "digits-dgl", *HERE, "--optim.accumulate", "99"], "from 1 to the batch size"),
    "too few classes": (
        ["train", "digits-dgl", *HERE, "--data.num-classes", "3"],
        "set --data.num-classes, or leave such",
    ),
    "a device that is not here": (["train", "digits-dgl", *HERE, "--accelerator", "tpu"], "accelerator is 'tpu'"),
    "no checkpoint kept": (["train", "digits-dgl", "--keep-checkpoints", "0"], "keep_checkpoints is 0, it must be 1"),
    "a folder without a run": (["evaluate", "empty"], "config.json"),
    "a file to evaluate": (["evaluate", "file"], "file"),
    "units of an image of 0": (
        ["units", "cifar_resnet", "--image-size", "0"],
        "image_size is 0 and batch_size 128: image_size is from 1 to 4096",
    ),
    "units of a huge image": (["units", "cifar_resnet", "--image-size", "99999999"], "image_size is from 1 to 4096"),
    "a plan of a huge image": (["plan", "cifar_resnet", "--image-size", "99999999999"], "it must be from 1 to 4096"),
    "a budget beyond numbers": (["plan", "cifar_resnet", "--budget", "9" * 400 + "GiB"], "give a size with its unit"),
    "a budget of nothing": (["plan", "cifar_resnet", "--budget", "0GiB"], "give a size with its unit"),
    "a plan of no reach": (["plan", "cifar_resnet", "--reach", "0"], "reach is 0"),
    "a plan with reach in bf16": (
        ["plan", "cifar_resnet", "--reach", "2", "--precision", "bf16-mixed"],
        "give precision='32-true'",
    ),
    "a demo of no epoch": (["demo", "--epochs", "0"], "epochs is 0: it must be at least 1"),
    "a demo of no seed": (["demo", "--seeds", "-1"], "seed is -1, it must be from 0"),
    "a demo of one seed twice": (["demo", "--seeds", "1", "1"], "(1, 1)"),
}


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("row", COMMANDS)
def test_the_command_line_refuses(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("file").write_text("not a run\n")
    Path("empty").mkdir()
    before = _tree(tmp_path)
    arguments, message = COMMANDS[row]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("localgrad: ")
    assert said.err.count("\n") <= 3, said.err
    assert message in said.err
    assert _tree(tmp_path) == before


# Saved configs, as `localgrad train FOLDER` reads them

CONFIGS: dict[str, tuple[str, str]] = {
    "empty": ("", "JSON"),
    "cut short": ('{"seed": 1', "JSON"),
    "nested without end": ("[" * 100_000, "JSON"),
    "a number without end": ('{"seed": ' + "9" * 5000 + "}", "JSON"),
    "a rate without end": ('{"optim": {"lr": ' + "9" * 400 + "}}", "config.optim.lr is 9"),
    "a list": ("[]", "config is []"),
    "an unknown field": ('{"sede": 1}', closest("sede", ["seed"])),
    "code as a number": ('{"seed": "__import__(\'os\').abort()"}', "config.seed is"),
    "code as cuts": ('{"cuts": "__import__(\'os\').abort()"}', "config.cuts is"),
    "nan as a mean": ('{"data": {"mean": [NaN, 0, 0]}}', "data.mean.0 is nan; it should be a finite number"),
    "nan as a deviation": ('{"data": {"std": [1, NaN, 1]}}', "data.std.1 is nan; it should be a finite number"),
    "an infinite decay": ('{"cuts": [], "optim": {"weight_decay": Infinity}}', "optim.weight_decay is inf"),
    "a null byte": ('{"cuts": [], "data": {"source": "a\\u0000b"}}', "'a\\x00b'"),
    "no source": ('{"data": {"source": ""}}', "give digits, a folder or a hub name"),
    "a huge image": ('{"data": {"image_size": 1000000}}', "give at most 4096"),
    "a huge padding": ('{"data": {"padding": 99999999999999999999}}', "give at most 4096"),
    "a huge batch": ('{"cuts": [], "optim": {"batch_size": 1' + "0" * 30 + "}}", "optim.batch_size is 1" + "0" * 30),
}


@pytest.mark.parametrize("row", CONFIGS)
def test_a_saved_config_is_refused(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, message = CONFIGS[row]
    (tmp_path / "config.json").write_text(text)
    assert main(["train", str(tmp_path), "--resume", "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("localgrad: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert _tree(tmp_path) == {str(tmp_path / "config.json"): text.encode()}


# Finished runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two blocks."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", "digits-dgl", "--run-dir", str(run_dir), *SMALL, "--epochs", "1", "--cuts", "layer2"]) == 0
    return run_dir


def _colours(folder: Path, count: int) -> None:
    """A folder of images, one a class, in a split called test."""
    from PIL import Image

    for number in range(count):
        (folder / "test" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / "test" / f"class{number}" / "0.png")


def _spoiled(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], list[str]]:
    def spoil(run_dir: Path) -> list[str]:
        (run_dir / name).write_bytes(change((run_dir / name).read_bytes()))
        return []

    return spoil


def _other_classes(run_dir: Path) -> list[str]:
    _colours(run_dir / "images", 3)
    return ["--data", str(run_dir / "images")]


EVALUATED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "weights cut short": (_spoiled("model.safetensors", lambda whole: whole[:-10]), "model.safetensors"),
    "weights of zeros": (_spoiled("model.safetensors", lambda whole: bytes(len(whole))), "model.safetensors"),
    "no weights": (_spoiled("model.safetensors", lambda whole: b""), "train --resume writes it again"),
    "a result that is none": (_spoiled("result.json", lambda whole: b"\xff"), "result.json"),
    "another depth": (
        _spoiled("config.json", lambda whole: whole.replace(b'"depth": 14', b'"depth": 20')),
        "layer1.2",
    ),
    "other classes": (_other_classes, "has 3 classes and the network of"),
    "no such split": (
        lambda run_dir: [*_other_classes(run_dir), "--test-split", "dev"],
        "test-split dev",
    ),
    "no such device": (lambda run_dir: ["--accelerator", "tpu"], "cannot be used on this machine"),
    "heads of no checkpoint": (
        lambda run_dir: [(run_dir / name).unlink() for name in ("checkpoint.pt",)] and ["--local-heads"],
        "checkpoint.pt",
    ),
}


@pytest.mark.parametrize("row", EVALUATED)
def test_a_run_that_cannot_be_evaluated(
    row: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil, message = EVALUATED[row]
    flags = spoil(tmp_path)
    before = _tree(tmp_path)
    assert main(["evaluate", str(tmp_path), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("localgrad: ")
    assert said.err.count("\n") <= 3, said.err
    assert message in said.err
    assert _tree(tmp_path) == before


def test_weights_that_are_lost_come_back_from_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    """As the message says."""
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "result.json"):
        (tmp_path / name).unlink()
    assert main(["train", str(tmp_path), "--resume", "--quiet"]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_run_of_one_step_shows_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its only step measured the memory, so nothing was timed."""
    arguments = ["train", "digits-dgl", *SMALL[:-1], "--epochs", "1", "--batch-size", "40", "--run-dir", str(tmp_path)]
    assert main(arguments) == 0
    assert "img/s" not in capsys.readouterr().err
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["images_per_second"], line["seconds_per_step"]) == (None, None)
    assert json.loads((tmp_path / "result.json").read_text())["seconds_per_step"] is None


def test_there_are_at_least_sixty_rows() -> None:
    assert len(API) + len(COMMANDS) + len(CONFIGS) + len(EVALUATED) >= 60
