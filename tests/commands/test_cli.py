"""The command line: every command, its help, and what a mistake gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import localgrad
from helpers.networks import eventful_resnet
from localgrad.commands.main import COMMANDS, main
from localgrad.commands.parse import SHORT
from localgrad.errors import closest
from localgrad.models import cifar_resnet

SMALL = [
    "--train-limit",
    "40",
    "--test-limit",
    "20",
    "--batch-size",
    "20",
    "--data.image-size",
    "8",
    "--data.padding",
    "1",
]


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("localgrad: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return _error(capsys)


def _resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["train", *arguments, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_alone_it_prints_its_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"localgrad {command}" in out for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"localgrad {localgrad.__version__}\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "analyse", "time", "report", "recipes", "reproduce"])
def test_help_of_a_command_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as leaving:
        assert leaving.code == 0
    assert f"  localgrad {command} " in capsys.readouterr().out


def test_help_of_a_recipe_has_a_sentence_for_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "digits-dgl-man", "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--momentum.decay", "--optim.lr", "--seed", "--run-dir", "--resume", "--dry-run", *SHORT.values()):
        assert flag in out
    assert "Share of the moving average kept" in out


def test_dry_run_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = _resolved(capsys, "cifar10-resnet32-k16-dgl-man")
    assert config["name"] == "cifar10-resnet32-k16-dgl-man"
    assert len(config["cuts"]) == 14
    assert config["momentum"]["bias"] is True


def test_flags_long_and_short_change_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    short = "--data here --epochs 3 --train-limit=5 --batch-size 7 --lr 0.5 --warmup-epochs 1 --test-limit 6"
    long = "--seed 9 --momentum.decay 0.9 --optim.no-nesterov --cuts layer1.0 layer2.0"
    config = _resolved(capsys, "digits-dgl-man", *short.split(), *long.split())
    data, optim = config["data"], config["optim"]
    assert (data["source"], data["train_limit"], data["test_limit"]) == ("here", 5, 6)
    assert (optim["epochs"], optim["batch_size"], optim["lr"], optim["warmup_epochs"]) == (3, 7, 0.5, 1)
    assert (config["seed"], config["momentum"]["decay"], optim["nesterov"]) == (9, 0.9, False)
    assert config["cuts"] == ["layer1.0", "layer2.0"]


def test_a_recipe_can_be_made_end_to_end_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    changes = "--cuts --objective.name none --objective.head None --momentum.name none --momentum.decay None"
    assert _resolved(capsys, "digits-dgl-man", *changes.split())["cuts"] == []


def test_train_then_evaluate_then_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ["--model.depth", "8", "--cuts", "layer1.0", "layer2.0"]
    arguments = ["train", "digits-dgl-man", "--epochs", "1", "--seed", "3", *SMALL, *shape]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith("test error ")
    assert "3 blocks" in said.err
    run = Path("runs", "digits-dgl-man-seed3")
    error = json.loads((run / "result.json").read_text())["test_error"]

    assert main(["evaluate", str(run), "--local-heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test error {error:.2f}% on 20 images"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"block {number}" for number in range(1, 4)]

    assert main(arguments) == 2
    assert "--resume --epochs MORE" in _error(capsys)
    (run / "result.json").unlink()
    assert main(arguments) == 2
    assert "--resume" in _error(capsys)
    assert main(["train", str(run), "--resume", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads((run / "result.json").read_text())["test_error"] == error
    assert list(Path().iterdir()) == [Path("runs")]


def test_an_interrupt_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = eventful_resnet(tmp_path / "network.py", event="raise KeyboardInterrupt")
    flags = ["--run-dir", str(tmp_path / "run"), "--quiet", *SMALL, "--model.name", network]
    assert main(["train", "digits-dgl", *flags]) == 130
    assert _error(capsys) == "localgrad: interrupted\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], f"there is no command 'trian'{closest('trian', ['train'])}"),
        (["train", "digits-dgl-mam"], "'digits-dgl-mam' ("),
        (["train", "--epochs", "3"], "train takes the recipe first, as `localgrad train digits-dgl-man --epochs"),
        (["train", "digits-dgl", "--lr", "-1", "--seed", "-1"], "optim.lr is -1.0"),
        (["train", "digits-dgl", "--quiet", "--cuts", "layer9.0", "--run-dir", "nowhere"], "layer9.0"),
        (["recipes", "imagnet"], "no recipe has imagnet in its name"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in _error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--epoch", "3"], "--epoch"), (["--seed", "many"], "--seed"), (["--data.padding", "-1"], "--data.padding -1")],
)
def test_a_flag_that_cannot_be_read_is_named(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "digits-dgl", *flags])
    assert leaving.value.code == 2
    assert named in capsys.readouterr().err


def test_recipes_lists_blocks_and_the_papers_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cifar10", "k16-dgl"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[3:5] == [
        ["cifar10-resnet32-k16-dgl", "K=16", "15", "14", "14.08%"],
        ["cifar10-resnet32-k16-dgl-man", "K=16", "15", "14", "9.11%"],
    ]


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "localgrad", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("localgrad: ") and "'trian'" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_the_table_of_plan_keeps_its_figures_at_any_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    options = ["--depth", "8", "--batch-size", "2", "--num-blocks", "2", "--momentum", "none"]
    assert main(["plan", "cifar_resnet", *options]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert "MiB" in said
    assert "0.00" not in said


def test_a_plan_with_reach_is_that_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--depth", "8", "--batch-size", "2", "--num-blocks", "3", "--momentum", "none", "--reach", "2"]
    assert main(["plan", "cifar_resnet", *options, "-o", str(tmp_path / "plan")]) == 0
    assert "reach 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())["rows"]
    example = torch.empty(2, 3, 32, 32, device="meta")
    objective = localgrad.dgl(10, head="compact")
    rows = localgrad.plan(cifar_resnet(8), example, objective=objective, num_blocks=[3], reach=2)
    assert [(row["cuts"], row["peak"], row["recompute"]) for row in found] == [
        (list(row.cuts), row.peak, row.recompute) for row in rows
    ]


def test_a_batch_of_one_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch_size at least 2" in _refused(capsys, "units", "cifar_resnet", "--depth", "8", "--batch-size", "1")
    arguments = ("plan", "cifar_resnet", "--depth", "8", "--batch-size", "1", "--num-blocks", "2")
    assert "two samples" in _refused(capsys, *arguments)
    assert "image_size is 1000000, it must be" in _refused(capsys, "plan", "cifar_resnet", "--image-size", "1000000")


def test_a_test_split_without_one_of_the_classes_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The labels of a folder are those of both splits, so that d is not taken for c."""
    for split, names in (("train", "abcd"), ("test", "abd")):
        for name in names:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                color = (60 * "abcd".index(name), 40 * number, 90)
                Image.new("RGB", (16, 16), color).save(folder / f"{number}.png")
    flags = ["--data", str(tmp_path / "images"), "--data.image-size", "16", "--data.num-classes", "None"]
    flags += ["--epochs", "1", "--batch-size", "8", "--accelerator", "cpu", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "digits-dgl", *flags]) == 0
    trained = json.loads((tmp_path / "run" / "result.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--local-heads", "--accelerator", "cpu"]) == 0
    assert f"{trained['test_error']:.2f}" in capsys.readouterr().out


def test_underscores_in_flags_are_hyphens(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--num_blocks", "3", "--batch_size=64", "--optim.warmup_epochs", "0", "--dry_run"
    assert main(["train", "cifar10-resnet32-k16-dgl", *flags]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["num_blocks"], config["cuts"], config["optim"]["batch_size"]) == (3, None, 64)


def test_replicas_are_shared_by_the_processes_that_torchrun_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "digits-dgl", "--parallel", "blocks", "--replicas", "2", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 4


@pytest.mark.parametrize(
    ("flags", "cuts", "num_blocks"),
    [
        ((), ["layer2.0", "layer3.0", "layer4.0"], None),
        (("--model.name", "timm:resnet10t"), None, 4),
        (("--model.name=timm:resnet10t", "--num-blocks", "2"), None, 2),
        (("--model.name", "timm:resnet10t", "--cuts", "layer1"), ["layer1"], None),
    ],
)
def test_another_network_is_cut_into_as_many_blocks_not_at_the_recipes_units(
    flags: tuple[str, ...], cuts: list[str] | None, num_blocks: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", "FOLDER", *flags, "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["cuts"], config["num_blocks"]) == (cuts, num_blocks)
