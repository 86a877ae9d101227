"""Checkpoints survive what hits a machine: kills, damaged and full disks, and links that lead elsewhere."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.networks import eventful_resnet
from helpers.runs import LOCAL, assert_same_run, read_metrics
from helpers.training import eventful, interrupt
from localgrad.commands.main import main
from localgrad.config.methods import with_defaults
from localgrad.config.schema import ModelConfig
from localgrad.data.loading import load_images
from localgrad.errors import LocalGradError
from localgrad.results import evaluation
from localgrad.runs.files import atomic_write, versions
from localgrad.runs.folder import RunFolder
from localgrad.training.trainer import fit

CONFIG = replace(LOCAL, checkpoint_every=3)  # 8 steps in 2 epochs; checkpoints after steps 3, 4, 6 and 8


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with checkpoints of steps 1 to 3, of which two are kept."""
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG, lines=0)
    for step in (1, 2, 3):
        folder.save_checkpoint({"step": step, "weights": torch.full((20,), float(step))}, keep=2)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    fit(CONFIG, run_dir, quiet=True)
    return run_dir


class _KilledError(BaseException):
    pass


# Kept, and told from damaged ones


def test_the_last_ones_are_kept_the_newest_first(folder: RunFolder) -> None:
    assert [path.name for path in versions(folder.checkpoint).values()] == ["checkpoint.pt", "checkpoint.pt.1"]
    assert [torch.load(path)["step"] for path in versions(folder.checkpoint).values()] == [3, 2]
    assert folder.newest_checkpoint()[1]["step"] == 3


def test_a_single_one_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        with atomic_write(tmp_path / "file") as file:
            file.write(content)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_kill_at_any_moment_of_saving_loses_no_checkpoint(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk is the last one, in turn; then the next save works as if nothing had been."""
    calls = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink")]
    moment = 0
    while True:
        copy = RunFolder(tmp_path / str(moment))
        shutil.copytree(folder.path, copy.path)
        left = [moment]

        def dying(original: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise _KilledError
                return original(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in calls:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                copy.save_checkpoint({"step": 4}, keep=2)
                killed = False
            except _KilledError:
                killed = True
        steps = [torch.load(path)["step"] for path in versions(copy.checkpoint).values()]
        assert steps in ([3, 2], [4, 3, 2], [4, 3]), f"{steps} after {moment} calls"
        copy.start(CONFIG, lines=0)
        assert len(versions(copy.checkpoint)) == 2
        copy.save_checkpoint({"step": 5}, keep=2)
        assert copy.newest_checkpoint()[1]["step"] == 5
        assert list(versions(copy.checkpoint)) == [0, 1], "a gap is closed"
        assert not list(copy.path.glob(".*"))
        if not killed:
            break
        moment += 1
    assert moment >= 6, "write, shift twice, rename, flush the folder, remove the oldest"


def test_any_damaged_byte_is_noticed_or_harmless(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    whole = folder.checkpoint.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        folder.checkpoint.write_bytes(broken)
        caplog.clear()
        found = folder.newest_checkpoint()[1]
        noticed += bool(caplog.records)
        assert found["step"] == (2 if caplog.records else 3)
        assert torch.equal(found["weights"], torch.full((20,), float(found["step"])))
    assert noticed > len(whole) / 7 / 3, "the rest is the padding between the parts of the file"


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: bytes(len(whole)),
        lambda whole: os.urandom(len(whole)),
        lambda whole: whole.replace(torch.full((20,), 3.0).numpy().tobytes(), torch.full((20,), 5.0).numpy().tobytes()),
    ],
    ids=["empty", "one byte", "half", "all but one", "zeros", "noise", "other weights"],
)
def test_a_damaged_one_is_passed_over_with_a_warning(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    whole = folder.checkpoint.read_bytes()
    assert damage(whole) != whole
    folder.checkpoint.write_bytes(damage(whole))
    assert folder.newest_checkpoint()[1]["step"] == 2
    (record,) = caplog.records
    said = record.getMessage()
    assert "checkpoint.pt is " in said
    assert "damaged" in said
    assert said.endswith("checkpoint.pt.1 is taken, the one before")
    assert "weights_only" not in said


def test_none_whole_is_an_error_that_names_all(folder: RunFolder) -> None:
    for path in versions(folder.checkpoint).values():
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt is .*checkpoint\.pt\.1 is .*no intact one is left"):
        folder.newest_checkpoint()[1]


def test_a_damaged_one_is_set_aside_and_does_not_push_out_a_whole_one(folder: RunFolder) -> None:
    folder.checkpoint.write_bytes(b"damaged")
    folder.set_aside_newer(folder.newest_checkpoint()[0])
    assert (folder.path / "checkpoint.pt.damaged").read_bytes() == b"damaged"
    folder.save_checkpoint({"step": 4}, keep=2)
    assert [torch.load(path)["step"] for path in versions(folder.checkpoint).values()] == [4, 2]


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(
    straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The damaged one is of the end: with it the second line of the metrics goes, and is written again."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes()[:1000])
    fit(CONFIG, run_dir, resume=True, quiet=True)
    assert "checkpoint.pt.1 is taken" in caplog.text
    assert len(read_metrics(run_dir)) == 2
    assert_same_run(straight, run_dir)
    assert [torch.load(path)["state"]["step"] for path in versions(run_dir / "checkpoint.pt").values()] == [8, 6]


def _changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A file of a run, JSON or checkpoint, with other content."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = torch.load(path)
        change(content)
        torch.save(content, path)


def test_files_say_what_they_are(straight: Path) -> None:
    for name, kind in (("config.json", "config"), ("images.json", "images"), ("result.json", "run")):
        saved = json.loads((straight / name).read_text())
        assert (saved["kind"], saved["schema"]) == (kind, 1)
    saved = torch.load(straight / "checkpoint.pt")
    assert (saved["kind"], saved["schema"]) == ("checkpoint", 1)


def test_a_folder_of_the_first_version_whose_files_say_no_kind_goes_on_to_the_same_bits(
    straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "checkpoint.pt.1").rename(run_dir / "checkpoint.pt")
    for name in ("config.json", "images.json", "checkpoint.pt"):
        _changed(run_dir / name, lambda content: [content.pop(key) for key in ("kind", "schema")])
    fit(CONFIG, run_dir, resume=True, quiet=True)
    assert_same_run(straight, run_dir)


READERS: dict[str, Callable[[RunFolder], Any]] = {
    "config.json": RunFolder.config,
    "images.json": lambda folder: folder.check_images(train=load_images(CONFIG.data)[0]),
    "checkpoint.pt": RunFolder.newest_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("key", "value"), [("kind", "plan"), ("schema", 2), ("schema", None)])
def test_a_file_of_another_kind_or_of_a_later_version_is_refused(
    straight: Path, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    _changed(run_dir / name, lambda content: content.update({key: value}))
    with pytest.raises(LocalGradError, match=rf"{name} has (the kind|schema) {value!r}"):
        READERS[name](RunFolder(run_dir))


def test_with_no_whole_checkpoint_nothing_is_lost(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "result.json").unlink()
    for path in versions(run_dir / "checkpoint.pt").values():
        path.write_bytes(b"")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt is .*checkpoint\.pt\.1 is "):
        fit(CONFIG, run_dir, resume=True, quiet=True)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_metrics_that_are_lost_are_missed(straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").write_text("")
    fit(CONFIG, run_dir, resume=True, quiet=True)
    assert "metrics.jsonl has lost 2 of its first 2 lines" in caplog.text


def test_local_heads_are_not_taken_from_an_earlier_checkpoint(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt\.1 is not of the end of the run"):
        evaluation.evaluate(run_dir, local_heads=True, accelerator="cpu")
    assert evaluation.evaluate(run_dir, accelerator="cpu").images == 40


# Signals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_leaves_with_its_code(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    run_dir, network = tmp_path / "run", tmp_path / "network.py"
    model = eventful_resnet(network, step=2, event=f"os.kill(os.getpid(), {getattr(signal, name):d})")
    RunFolder(run_dir).start(with_defaults(replace(CONFIG, model=ModelConfig(model))), lines=0)
    arguments = ["train", str(run_dir), "--resume", "--quiet"]
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "localgrad: interrupted in epoch 1 after step 2; everything is saved; "
        f"continue with `localgrad train {run_dir} --resume`\n"
    )
    assert torch.load(run_dir / "checkpoint.pt")["state"]["step"] == 2
    eventful_resnet(network)
    assert main(arguments) == 0
    assert_same_run(straight, run_dir)


@pytest.mark.slow
def test_kills_at_random_moments_end_in_the_same_bits() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "6", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 6
    assert found["runs_finished_bit_identical"] >= 1
    assert found["most_steps_lost"] <= found["checkpoint_every"]


# Full disks


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Sets the largest size that a file of this process may grow to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_finds_no_room_is_an_error_and_the_run_goes_on_later(
    straight: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    limit = (straight / "checkpoint.pt").stat().st_size - 100
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt .*\(File too large\)"):
        fit(CONFIG, tmp_path, quiet=True, images=eventful(CONFIG, {5: lambda inputs: small_files(limit)}))
    small_files(resource.RLIM_INFINITY)
    assert [torch.load(path)["state"]["step"] for path in versions(tmp_path / "checkpoint.pt").values()] == [4, 3]
    assert not list(tmp_path.glob(".*.tmp"))
    fit(CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(straight, tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here; the test above limits the size of files instead")
    try:
        folder = RunFolder(disk / "run")
        folder.start(CONFIG, lines=0)
        folder.save_checkpoint({"step": 1, "weights": torch.zeros(10_000)}, keep=2)
        folder.save_checkpoint({"step": 2, "weights": torch.zeros(10_000)}, keep=2)
        with pytest.raises(LocalGradError, match=r"checkpoint\.pt .*\(No space left on device\)"):
            folder.save_checkpoint({"step": 3, "weights": torch.zeros(100_000)}, keep=2)
        assert [torch.load(path)["step"] for path in versions(folder.checkpoint).values()] == [2, 1]
        assert not list(folder.path.glob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# What does not belong in a run folder


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.jsonl", "result.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(straight: Path, tmp_path: Path, name: str) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(straight, run_dir)
    (run_dir / "result.json").unlink()
    outside.write_bytes((straight / name).read_bytes())
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(outside)
    kept = outside.read_bytes()
    with pytest.raises(LocalGradError, match=rf"{name} is a link to .*outside: a run folder holds its files itself"):
        fit(CONFIG, run_dir, resume=True, quiet=True)
        evaluation.evaluate(run_dir, accelerator="cpu")
    assert outside.read_bytes() == kept


def test_code_in_the_data_folder_of_a_config_is_not_run(straight: Path, tmp_path: Path) -> None:
    """A loading script beside the images, as older versions of `datasets` ran it."""
    images, run_dir = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    (images / "images.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')\n")
    (images / "data.pkl").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "attacked").encode() + b"'\ntR.")
    shutil.copytree(straight, run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["source"] = str(images)
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(LocalGradError, match=re.escape(str(images))):
        evaluation.evaluate(run_dir, accelerator="cpu")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.name", "timm:../../evil"),
        ("model.name", "torchvision:__import__('os').mkdir('attacked')"),
        ("cuts", ["__import__('os').mkdir('attacked')"]),
        ("objective.name", "../objectives/dgl"),
        ("data.train_split", "train[:__import__('os').mkdir('attacked')]"),
        ("name", "../../outside"),
    ],
)
def test_names_with_code_and_paths_in_a_config_do_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = json.loads((straight / "config.json").read_text())
    group, _, name = field.rpartition(".")
    (config[group] if group else config)[name] = value
    (run_dir / "config.json").write_text(json.dumps(config))
    arguments = ["train", "run", "--resume", "--quiet", "--optim.epochs", "1"]
    assert main(arguments) == 2, "of another number of epochs, or refused before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]


# Two processes and one folder

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("held")
print("got it", flush=True)
sys.stdin.read()
"""


def _holder(run_dir: Path) -> "subprocess.Popen[str]":
    """A process that trains in a folder, as far as the lock can tell."""
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(run_dir / ".lock")], text=True, **pipes)


def test_a_folder_where_another_process_trains_is_refused_until_that_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(seconds=0.0):
        pass
    with _holder(folder.path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "got it\n", "it was left free"
        with (
            pytest.raises(LocalGradError, match=r"another process is training in .*run; wait for it, or give another"),
            folder.locked(seconds=0.3),
        ):
            pytest.fail("two processes have it")
        other.kill()
    with folder.locked(seconds=5.0):
        pass


def test_a_run_waits_for_another_process_and_goes_on_from_what_that_has_saved(straight: Path, tmp_path: Path) -> None:
    run_dir, later = tmp_path / "run", tmp_path / "later"
    for path, step in ((run_dir, 3), (later, 7)):
        with pytest.raises(KeyboardInterrupt):
            fit(CONFIG, path, quiet=True, images=eventful(CONFIG, {step: interrupt}))
    before, steps = {path.name: path.read_bytes() for path in run_dir.iterdir()}, list[int]()
    read = {step: lambda inputs, step=step: steps.append(step) for step in range(1, 9)}
    with _holder(run_dir) as other, ThreadPoolExecutor() as pool:
        assert other.stdout is not None and other.stdout.readline() == "got it\n"
        lock = run_dir / ".lock"
        opened, give_up = lock.stat().st_mtime_ns, time.monotonic() + 60
        waiting = pool.submit(fit, CONFIG, run_dir, resume=True, quiet=True, images=eventful(CONFIG, read))
        while lock.stat().st_mtime_ns == opened:
            assert not waiting.done() and time.monotonic() < give_up, "it is opened to be locked"
            time.sleep(0.01)
        time.sleep(0.5)
        assert not waiting.done() and not steps
        assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before, "nothing is written meanwhile"
        shutil.copytree(later, run_dir, dirs_exist_ok=True)
        other.kill()
        waiting.result()
    assert steps == [8]
    assert_same_run(straight, run_dir)


def test_a_run_keeps_its_folder_until_it_ends(tmp_path: Path) -> None:
    answers: list[str] = []

    def knock(inputs: Tensor | None = None) -> None:
        answers.append(_holder(tmp_path / "run").communicate("")[1])

    fit(CONFIG, tmp_path / "run", quiet=True, images=eventful(CONFIG, {2: knock}))
    assert set(answers) == {"held\n"}
    knock()
    assert answers[-1] == ""


def test_a_run_that_another_one_has_begun_meanwhile_is_not_started(tmp_path: Path) -> None:
    """Begun while the network is made: after the folder was looked at, before it is locked."""
    run_dir = tmp_path / "run"
    begin = f"import shutil; shutil.copytree({str(tmp_path / 'begun')!r}, {str(run_dir)!r})"
    config = replace(CONFIG, model=ModelConfig(eventful_resnet(tmp_path / "network.py", event=begin)))
    RunFolder(tmp_path / "begun").start(with_defaults(config), lines=0)
    with pytest.raises(LocalGradError, match=re.escape(str(run_dir))):
        fit(config, run_dir, quiet=True)
    assert {path.name for path in run_dir.iterdir()} == {"config.json", "metrics.jsonl", ".lock"}


# The state in a checkpoint


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", "1"), ("epoch", True), ("step", None), ("sums", [0.0]), ("sums", "0000"), ("test_error", [1])],
)
def test_a_state_of_wrong_types_is_refused(straight: Path, tmp_path: Path, field: str, value: Any) -> None:
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    saved = torch.load(tmp_path / "checkpoint.pt")
    saved["state"][field] = value
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(LocalGradError, match=r"checkpoint\.pt .*state"):
        fit(CONFIG, tmp_path, resume=True, quiet=True)


def test_the_config_says_how_many_are_kept(tmp_path: Path) -> None:
    for keep in (1, 3):
        run_dir = tmp_path / str(keep)
        fit(dataclasses.replace(CONFIG, keep_checkpoints=keep), run_dir, quiet=True)
        steps = [torch.load(path)["state"]["step"] for path in versions(run_dir / "checkpoint.pt").values()]
        assert steps == [8, 6, 4][:keep]
    assert RunFolder(tmp_path / "1").newest_checkpoint()[1]["state"]["step"] == 8


def test_a_run_of_a_version_with_fewer_options_goes_on(straight: Path, tmp_path: Path) -> None:
    """Its config lacks what a later version has written out with its default."""
    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, tmp_path, quiet=True, images=eventful(CONFIG, {5: interrupt}))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["momentum"]["pool"], config["objective"]["head"], config["reach"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fit(CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(straight, tmp_path)
