"""Block-parallel training gives what one process gives, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localgrad
from helpers.networks import eventful_resnet
from helpers.processes import run_ranks
from helpers.runs import BLOCKS, LOCAL, assert_same_run, weights
from helpers.training import eventful, interrupt
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.schema import MomentumConfig, TrainConfig
from localgrad.core.block import Block
from localgrad.core.site import Site
from localgrad.core.step import local_step
from localgrad.errors import LocalGradError
from localgrad.models import cifar_resnet
from localgrad.parallel.pipeline import Stage
from localgrad.parallel.shards import shard
from localgrad.results.evaluation import evaluate
from localgrad.runs.folder import RunFolder
from localgrad.training.build import build_run
from localgrad.training.interrupts import noted_interrupts
from localgrad.training.trainer import fit, train, train_epoch

CUTS = ["layer1.0", "layer2.0", "layer3.0"]
SIZES = [6] * 9 + [3] + [6] * 10
STEPS = len(SIZES)


def _blocks(momentum: str, objective: str, extra: nn.Module | None = None) -> tuple[nn.Module, list[Block]]:
    torch.manual_seed(0)
    model = cifar_resnet(14).to(memory_format=torch.channels_last)
    momenta: dict[str, Any] = {
        "none": None,
        "man": localgrad.man(decay=0.9),
        "fused": localgrad.man(decay=0.9, form="fused"),
        "deep": localgrad.manpp(decay=0.9, depth=2),
    }
    objectives: dict[str, Any] = {
        "dgl": localgrad.dgl(num_classes=10),
        "infopro": localgrad.infopro(10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), task=(0.5, 0.5)),
    }
    blocks = localgrad.split(
        model, torch.empty(2, 3, 8, 8), cuts=CUTS, objective=objectives[objective], momentum=momenta[momentum]
    )
    return model, blocks


def _batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 3, 8, 8, generator=draw).to(memory_format=torch.channels_last),
            torch.randint(10, (size,), generator=draw),
        )
        for size in sizes
    ]


def _optimizers(blocks: list[Block]) -> list[torch.optim.SGD]:
    return [torch.optim.SGD(b.trainable_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) for b in blocks]


def _state(model: nn.Module, blocks: list[Block]) -> dict[str, Tensor]:
    auxiliary = {f"{i}.{k}": v for i, block in enumerate(blocks) for k, v in block.auxiliary_state_dict().items()}
    return {name: value.detach().clone() for name, value in (model.state_dict() | auxiliary).items()}


def _one_process(momentum: str, objective: str) -> tuple[dict[str, Tensor], list[list[float]]]:
    model, blocks = _blocks(momentum, objective)
    optimizers = _optimizers(blocks)
    losses = [[float(loss) for loss in local_step(blocks, optimizers, *batch)] for batch in _batches(SIZES)]
    return _state(model, blocks), losses


def _many_processes(
    momentum: str, objective: str, starts: list[int], ahead: bool
) -> tuple[dict[str, Tensor], list[list[float]]]:
    model, blocks = _blocks(momentum, objective)
    stage = Stage(blocks, starts)
    assert stage._receives_ahead, "on processors"
    stage._receives_ahead = ahead
    optimizers = _optimizers(stage.blocks)
    losses = []
    loader = _batches(SIZES) if stage.is_first else []
    for part in (slice(0, 11), slice(11, STEPS)):  # two epochs: the receives begin anew
        for inputs, targets, features in stage.batches(loader[part], SIZES[part]):
            assert ahead or stage._weights is None, "no receive is waiting while a batch is trained"
            losses.append([float(loss) for loss in stage.step(optimizers, inputs, targets, features)])
        stage.gather()
    return _state(model, blocks), losses


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("momentum", "objective", "starts", "ahead"),
    [
        ("none", "dgl", [0, 2], True),
        ("man", "dgl", [0, 1], False),
        ("man", "infopro", [0, 1, 3], True),
        ("fused", "dgl", [0, 1, 2], False),
        ("deep", "dgl", [0, 3], True),
    ],
)
def test_ranks_give_the_bits_of_one_process(momentum: str, objective: str, starts: list[int], ahead: bool) -> None:
    """Also with receives that begin only where they are waited for, as on CUDA."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, losses = _one_process(momentum, objective)
    torch.set_num_threads(threads)
    answers = run_ranks(_many_processes, len(starts), momentum, objective, starts, ahead)
    for found, _ in answers:
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert [list(chain(*parts)) for parts in zip(*(own for _, own in answers), strict=True)] == losses


class _Nested(nn.Module):
    """A loss of targets in a dict, on pooled features."""

    reads_inputs = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.classifier = nn.Linear(site.features[site.channel_dim], 10)

    def forward(self, features: Tensor, targets: dict[str, Any], inputs: Tensor) -> Tensor:
        losses = F.cross_entropy(self.classifier(features.mean((2, 3))), targets["classes"], reduction="none")
        return (losses * targets["weights"][0]).mean()


def _nested(starts: list[int] | None) -> tuple[dict[str, Tensor], list[tuple[int, bool]]]:
    """Train with targets in a dict, in one process or on ranks; also what a rank gets as inputs."""
    torch.manual_seed(0)
    model = cifar_resnet(14)
    blocks = localgrad.split(
        model,
        torch.empty(2, 3, 8, 8),
        cuts=CUTS,
        objective=_Nested,
        criterion=lambda scores, targets: F.cross_entropy(scores, targets["classes"]),
    )
    sizes = [6, 6, 4]
    batches = [
        (inputs, {"classes": classes, "weights": (torch.rand(len(classes)), None)})
        for inputs, classes in _batches(sizes)
    ]
    if starts is None:
        optimizers = _optimizers(blocks)
        for inputs, targets in batches:
            local_step(blocks, optimizers, inputs, targets)
        return _state(model, blocks), []
    stage = Stage(blocks, starts)
    optimizers, seen = _optimizers(stage.blocks), []
    for inputs, targets, features in stage.batches(batches if stage.is_first else [], sizes):
        seen.append((inputs.shape[1], inputs is features))
        stage.step(optimizers, inputs, targets, features)
    stage.gather()
    return _state(model, blocks), seen


@pytest.mark.ranks
def test_targets_may_be_nested_and_inputs_travel_only_where_they_are_read() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    expected, _ = _nested(None)
    torch.set_rng_state(state)
    answers = run_ranks(_nested, 2, [0, 2])
    for found, _ in answers:
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert [seen for _, seen in answers] == [[(3, True)] * 3, [(32, True)] * 3], "features stand in on the second rank"


def _channels_of_inputs(objective: str, starts: list[int]) -> int:
    _, blocks = _blocks("none", objective)
    stage = Stage(blocks, starts)
    optimizers, channels = _optimizers(stage.blocks), 0
    for inputs, targets, features in stage.batches(_batches([4, 4]) if stage.is_first else [], [4, 4]):
        channels = inputs.shape[1]
        stage.step(optimizers, inputs, targets, features)
    return channels


@pytest.mark.ranks
def test_inputs_travel_as_far_as_an_objective_reads_them() -> None:
    """The last block has none, so its rank gets no images even after InfoPro's blocks."""
    assert run_ranks(_channels_of_inputs, 3, "infopro", [0, 1, 3]) == [3, 3, 64]
    assert run_ranks(_channels_of_inputs, 3, "dgl", [0, 1, 3]) == [3, 16, 64]


def _send_a_temperature() -> str:
    _, blocks = _blocks("none", "dgl")
    stage = Stage(blocks, [0, 2])
    if stage.is_first:
        batches = [(inputs, (classes, 0.5)) for inputs, classes in _batches([4])]
        for _, _, features in stage.batches(batches, [4]):
            try:
                stage.send(features)
            except LocalGradError as error:
                return str(error)
    return "sent"


@pytest.mark.ranks
def test_targets_that_cannot_travel_are_refused() -> None:
    assert "targets hold a float with a batch of 4 samples" in run_ranks(_send_a_temperature, 2)[0]


# The trainer


def _fit(config: TrainConfig, run_dir: Path, interrupt_at: int, resume: bool) -> Any:
    """Train on a rank; with a step to interrupt at, as Ctrl-C would on the first rank."""
    events = {interrupt_at: interrupt} if os.environ["RANK"] == "0" else {}
    return fit(config, run_dir, quiet=True, resume=resume, images=eventful(config, events)).test_error


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_on_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    fit(LOCAL, tmp_path / "one", quiet=True)
    run_ranks(_fit, 2, BLOCKS, tmp_path / "two", 0, False)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    with pytest.raises(KeyboardInterrupt, match=" 3;"):
        run_ranks(_fit, 2, BLOCKS, tmp_path / "resumed", 3, False)
    run_ranks(_fit, 2, BLOCKS, tmp_path / "resumed", 0, True)
    assert_same_run(tmp_path / "one", tmp_path / "resumed")


@pytest.mark.ranks
@pytest.mark.slow
def test_replicas_of_a_pipeline_are_data_parallel(tmp_path: Path) -> None:
    data = replace(LOCAL, devices=2)
    run_ranks(_fit, 2, data, tmp_path / "data", 0, False)
    with pytest.raises(KeyboardInterrupt, match=" 2;"):
        run_ranks(_fit, 2, data, tmp_path / "resumed", 2, False)
    run_ranks(_fit, 2, data, tmp_path / "resumed", 0, True)
    assert_same_run(tmp_path / "data", tmp_path / "resumed")
    run_ranks(_fit, 4, replace(BLOCKS, devices=4, replicas=2), tmp_path / "both", 0, False)
    assert_same_run(tmp_path / "data", tmp_path / "both")


@pytest.mark.ranks
@pytest.mark.slow
def test_synchronised_norms_see_the_whole_batch(tmp_path: Path) -> None:
    """The last batch of 7 images gives one process 4 of them and the other 3."""
    config = replace(LOCAL, data=replace(LOCAL.data, train_limit=55))
    fit(config, tmp_path / "one", quiet=True)
    run_ranks(_fit, 2, replace(config, devices=2, sync_batchnorm=True), tmp_path / "two", 0, False)
    both = replace(config, devices=4, parallel="blocks", replicas=2, sync_batchnorm=True)
    run_ranks(_fit, 4, both, tmp_path / "four", 0, False)
    for name in ("two", "four"):
        torch.testing.assert_close(weights(tmp_path / name), weights(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    run_ranks(_fit, 2, replace(config, devices=2), tmp_path / "apart", 0, False)
    assert not torch.allclose(weights(tmp_path / "apart")["fc.weight"], weights(tmp_path / "one")["fc.weight"], 1e-4)


@pytest.mark.ranks
@pytest.mark.slow
def test_shards_of_the_weights_train_like_whole_ones(tmp_path: Path) -> None:
    """MAN++ has a parameter of a single number, which is in one of the shards."""
    local = replace(LOCAL, devices=2, momentum=MomentumConfig("manpp"))
    run_ranks(_fit, 2, local, tmp_path / "whole", 0, False)
    config = replace(local, parallel="shards")
    with pytest.raises(KeyboardInterrupt, match=" 3;"):
        run_ranks(_fit, 2, config, tmp_path / "sharded", 3, False)
    run_ranks(_fit, 2, config, tmp_path / "sharded", 0, True)
    torch.testing.assert_close(weights(tmp_path / "sharded"), weights(tmp_path / "whole"), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::localgrad.errors.DefaultsWarning")
def test_weights_outside_of_layers_are_not_lost_in_shards() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    blocks = localgrad.split(
        model, torch.empty(2, 3, 32, 32), num_blocks=2, objective=localgrad.classifier(num_classes=10)
    )
    with pytest.raises(LocalGradError, match=r"the weights cls_token, pos_embed are in no layer of a unit.*--parallel"):
        shard(model, blocks, torch.device("cpu"), 2)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("shared", [{}, {"parallel": "shards"}, {"parallel": "blocks", "devices": 4, "replicas": 2}])
def test_the_network_that_is_tested_is_the_one_that_is_saved(shared: dict[str, Any], tmp_path: Path) -> None:
    """Each process has seen images of its own, and so has running statistics of its own."""
    config = replace(LOCAL, data=replace(LOCAL.data, test_limit=360), local_heads=True, **{"devices": 2, **shared})
    errors = run_ranks(_fit, config.devices, config, tmp_path, 0, False)
    again = evaluate(tmp_path, local_heads=True)
    assert errors == [again.test_error] * config.devices
    assert json.loads((tmp_path / "result.json").read_text())["local_errors"] == again.local_errors


# A rank that dies

DYING = """
import sys
from dataclasses import replace
from helpers.runs import BLOCKS, LOCAL
from localgrad.config.schema import ModelConfig
from localgrad.training.trainer import fit

_, run_dir, parallel, network = sys.argv
config = BLOCKS if parallel == "blocks" else replace(LOCAL, devices=2)
fit(replace(config, model=ModelConfig(network)), run_dir, quiet=True)
"""


def _dying(folder: Path, parallel: str) -> list[str]:
    """A script, and its arguments, of which the second rank dies once, in the second batch of the second epoch."""
    (folder / "script.py").write_text(DYING)
    once = str(folder / "died")
    is_time = f"os.environ.get('LOCAL_RANK') == '1' and not os.path.exists({once!r})"
    event = f"if {is_time}: open({once!r}, 'w').close(); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    network = eventful_resnet(folder / "network.py", step=5, event=event, unit="fc")  # the last batch has two images
    return [str(folder / "script.py"), str(folder / "run"), parallel, network]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a script; a hang would end with the timeouts of the process groups, half an hour, and so fails here."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["blocks", "data"])
def test_the_other_ranks_leave_when_one_dies(tmp_path: Path, parallel: str) -> None:
    done = _run(_dying(tmp_path, parallel))
    assert done.returncode != 0
    assert (tmp_path / "died").exists()
    assert "another process of this run has ended" in done.stderr


@pytest.mark.ranks
@pytest.mark.slow
def test_torchrun_starts_again_where_the_run_was(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = _run([*torchrun, *_dying(tmp_path, "blocks")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    fit(LOCAL, tmp_path / "one", quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "run")


# Starting and stopping together


@pytest.mark.ranks
@pytest.mark.slow
def test_metrics_of_three_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    fit(LOCAL, tmp_path / "one", quiet=True)
    three = replace(BLOCKS, devices=3)
    with pytest.raises(KeyboardInterrupt, match=" 3;"):
        run_ranks(_fit, 3, three, tmp_path / "three", 3, False)
    run_ranks(_fit, 3, three, tmp_path / "three", 0, True)
    assert_same_run(tmp_path / "one", tmp_path / "three")


class Shown:
    """A display that is due after each batch and keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def is_due(self) -> bool:
        return True

    def step(self, *, losses: list[float], **_: Any) -> None:
        self.losses.extend(losses)


def _losses_shown(config: TrainConfig) -> list[float]:
    run, display = build_run(with_defaults(validate(config))), Shown()
    with noted_interrupts() as interrupted:
        train_epoch(run, RunFolder(Path("nothing-is-written")), cast(Any, display), interrupted)
    return display.losses[: 2 * len(config.cuts or ()) + 2]


@pytest.mark.ranks
def test_losses_are_shown_as_they_are_on_several_ranks() -> None:
    """What rank 0 shows after its first two batches are the losses of its own blocks."""
    (one,) = run_ranks(_losses_shown, 1, LOCAL)
    two, _ = run_ranks(_losses_shown, 2, replace(BLOCKS, checkpoint_every=0))
    assert two[0] == one[0]


class SlowFolder(RunFolder):
    """On a disk that takes a second to write a checkpoint."""

    def save_checkpoint(self, *arguments: Any) -> None:
        time.sleep(1)
        super().save_checkpoint(*arguments)
        (self.path.parent / "written").write_text(str(time.time()))


def _stop_with_a_slow_disk(config: TrainConfig, run_dir: Path) -> float:
    """When this rank has ended, after Ctrl-C on the first one in the first step."""
    events = {1: interrupt} if os.environ["RANK"] == "0" else {}
    run = build_run(with_defaults(validate(config)), eventful(config, events))
    with pytest.raises(KeyboardInterrupt):
        train(run, SlowFolder(run_dir), quiet=True)
    return time.time()


@pytest.mark.ranks
@pytest.mark.parametrize("config", [replace(LOCAL, devices=2), BLOCKS])
def test_no_rank_ends_before_the_checkpoint_is_written(config: TrainConfig, tmp_path: Path) -> None:
    ended = run_ranks(_stop_with_a_slow_disk, 2, config, tmp_path / "run")
    assert min(ended) > float((tmp_path / "written").read_text())


def _fit_apart(config: TrainConfig, folder: Path) -> str:
    """Each rank with a folder of its own, as on nodes that share none."""
    try:
        fit(config, folder / os.environ["RANK"], quiet=True, resume=True)
    except localgrad.LocalGradError as error:
        return str(error)
    return "trained"


@pytest.mark.ranks
def test_ranks_that_begin_at_other_steps_are_refused(tmp_path: Path) -> None:
    config = replace(LOCAL, devices=2)
    with pytest.raises(KeyboardInterrupt):
        run_ranks(_fit, 2, config, tmp_path / "0", 2, False)
    said = run_ranks(_fit_apart, 2, config, tmp_path)
    assert all("the run folder" in each and "must be the same for all processes" in each for each in said)


@pytest.mark.ranks
def test_shares_are_cut_into_as_many_parts(tmp_path: Path) -> None:
    """The last batch leaves 16 images to one rank and 15 to the other, in five parts each."""
    optim = replace(LOCAL.optim, batch_size=40, accumulate=5, epochs=1)
    config = replace(LOCAL, data=replace(LOCAL.data, train_limit=71), optim=optim, sync_batchnorm=True, devices=2)
    run_ranks(_fit, 2, config, tmp_path / "two", 0, False)
    assert (tmp_path / "two" / "result.json").exists()


def _fit_restarted(run_dir: Path) -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    fit(LOCAL, run_dir, quiet=True)


@pytest.mark.ranks
def test_a_run_that_failed_before_its_first_checkpoint_is_started_again(tmp_path: Path) -> None:
    RunFolder(tmp_path).start(with_defaults(LOCAL), 0)
    run_ranks(_fit_restarted, 1, tmp_path)
    assert (tmp_path / "result.json").exists()
