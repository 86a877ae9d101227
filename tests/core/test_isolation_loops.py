"""Isolation in the loops that people have: their trainers' weights against a plain loop's, on one process and two."""

import copy
import io
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import localgrad
from helpers.cases import IMAGE, NUM_CLASSES, batch
from helpers.examples import FOLDER, example
from helpers.processes import run_ranks
from localgrad import LocalGradError, isolate, man
from localgrad.models import cifar_resnet

DGL = localgrad.dgl(NUM_CLASSES)
EXAMPLE = torch.empty(2, 3, IMAGE, IMAGE)


def isolated(normed: bool = True, **options: Any) -> tuple[nn.Module, localgrad.Isolation]:
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    objective = DGL
    if not normed:  # so that a batch in parts is the batch
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.GroupNorm(4, module.num_features))
        objective = localgrad.classifier(NUM_CLASSES)
        model.double()  # in float32 a sum in another order puts a value on the other side of a ReLU's kink
        options |= {"example": EXAMPLE.double()}
    given = {"objective": objective, "momentum": man(0.5), "example": EXAMPLE} | options
    return model, isolate(model, ["layer1.0", "layer2.0"], **given)


def state(model: nn.Module, isolation: localgrad.Isolation) -> dict[str, Tensor]:
    pairs = (("model", model), ("isolation", isolation))
    return {f"{of}.{name}": tensor.clone() for of, each in pairs for name, tensor in each.state_dict().items()}


def loss_of(model: nn.Module, isolation: localgrad.Isolation, part: tuple[Tensor, Tensor]) -> Tensor:
    inputs, isolation.targets = part
    return F.cross_entropy(model(inputs), part[1])


def plain(parts: int, steps: int = 2) -> dict[str, Tensor]:
    """The state after steps of `parts` micro-batches of two in a plain loop."""
    model, isolation = isolated()
    isolation.backward = lambda loss: (loss / parts).backward()
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    for step in range(steps):
        for part in range(parts):
            (loss_of(model, isolation, batch(step * parts + part)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model, isolation)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=tolerance), name


def test_accelerate_with_accumulation() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, isolation = isolated()
    isolation.backward = accelerator.backward
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for part in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, isolation, batch(part)))
            optimizer.step()
            optimizer.zero_grad()
    assert_same(plain(parts=2), state(model, isolation))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_with_accumulation_and_checkpoints(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.isolation = isolated()
            self.isolation.backward = lambda loss: (loss / 2).backward()

        def training_step(self, part: tuple[Tensor, Tensor], index: int) -> Tensor:
            return loss_of(self.net, self.isolation, part)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, 0.9)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, default_root_dir=tmp_path, enable_checkpointing=False, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch(part) for part in range(4)], batch_size=None))
    assert_same(plain(parts=2), state(module.net, module.isolation))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    kept = torch.load(tmp_path / "all.ckpt", weights_only=False)["state_dict"]
    again = Module()
    again.load_state_dict(kept)
    assert_same(state(module.net, module.isolation), state(again.net, again.isolation))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_resumes_with_the_isolations_state(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    trainer = example("hf_trainer")
    flags = ["--cpu", "--steps", "4", "--save-steps", "2", "--accumulate", "2", "--layers", "2", "--width", "16"]
    whole = trainer.main(["--folder", str(tmp_path / "run"), *flags])
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    resumed = trainer.main(["--folder", str(tmp_path / "other"), "--resume", *flags])
    assert resumed.state.global_step == 4
    # weights that come out of a file lie elsewhere in memory, which changes the order of some sums
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()), 1e-6)
    kept = [
        torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt")["auxiliary_networks"] for run in ("run", "other")
    ]
    assert kept[0] and any(key.endswith("weight") for key in kept[0])
    assert_same(*kept, 1e-6)


def test_a_gradient_scaler_scales_local_losses_and_skips_for_all() -> None:
    model, isolation = isolated()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    isolation.backward = lambda loss: scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, isolation, batch(0))
        scaler.scale(loss).backward()
        if step == 1:
            model.conv1.weight.grad.fill_(float("inf"))
        before = state(model, isolation)
        scaler.step(optimizer)
        weights = {name: tensor for name, tensor in state(model, isolation).items() if "running" not in name}
        moved = [name for name, tensor in weights.items() if not torch.equal(tensor, before[name])]
        assert bool(moved) == (step != 1)
        scaler.update()
        optimizer.zero_grad()
        losses.append(torch.stack(isolation.losses))
    assert (losses[2] < losses[0]).all()
    assert scaler.get_scale() == 2.0**9
    reference, other = isolated()
    loss_of(reference, other, batch(0))
    assert torch.allclose(losses[0], torch.stack(other.losses), rtol=0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its layers"])
def test_compiled_layers_and_models_train_alike(whole: bool) -> None:
    expected = plain(parts=1)
    model, isolation = isolated()
    for module in [model] if whole else [model.layer1[0], model.layer2[0], model.layer3[0]]:
        module.compile(backend="eager")
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    for step in range(2):
        loss_of(model, isolation, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(expected, state(model, isolation), 1e-5)


def test_a_compiled_chain_runs_the_hooks_of_isolation_eagerly() -> None:
    """The compiler, which would trace into the hooks, fails at what they look at (a name that it did not define)."""
    states = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.ReLU()) for width in (3, 4)]
        model = nn.Sequential(*stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES)))
        objective = localgrad.classifier(NUM_CLASSES)
        isolation = isolate(model, ["0", "1"], objective=objective, momentum=man(0.5), example=EXAMPLE)
        if is_compiled:
            model.compile(backend="eager")
        optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1)
        for step in range(2):
            loss_of(model, isolation, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(state(model, isolation))
    assert_same(*states, 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_to_look_at_a_model_compiles_nothing() -> None:
    """A user compiles her layers before she isolates; the run that looks at each layer would compile for minutes."""
    compiled: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(len(example))
        return graph.forward

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = cifar_resnet(8, NUM_CLASSES)
        for unit in (*made.layer1, *made.layer2, *made.layer3):
            unit.compile(backend=backend)
        return made

    given = {"objective": DGL, "momentum": man(0.5)}
    localgrad.units(model(), EXAMPLE)
    localgrad.split(model(), EXAMPLE, num_blocks=3, **given)
    whole = model()
    isolation = isolate(whole, ["layer1.0", "layer2.0"], example=EXAMPLE, **given)
    assert not compiled
    loss_of(whole, isolation, batch(0)).backward()
    assert compiled


# Two processes.


def _train_on_rank(no_sync: bool, zero_between: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)  # what the processes draw differs, and DDP gives all of them the first one's
    model, isolation = isolated(normed=False)
    with torch.no_grad():
        for parameter in (*model.parameters(), *isolation.parameters()):
            parameter += rank
    isolation.backward = lambda loss: (loss / 2).backward() if no_sync else loss.backward()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    for step in range(3):
        inputs, targets = batch(step, 8)
        inputs = inputs.double()
        for part in range(2) if no_sync else (None,):
            own = slice(rank, None, 2) if part is None else slice(2 * part + rank, None, 4)
            waits = wrapped.no_sync() if part == 0 else nullcontext()
            with waits:
                isolation.targets = targets[own]
                loss = F.cross_entropy(wrapped(inputs[own]), targets[own])
                if zero_between and part in (None, 0):
                    optimizer.zero_grad()
                (loss / 2 if no_sync else loss).backward()
        optimizer.step()
        if not zero_between:
            optimizer.zero_grad()
    return state(model, isolation), isolation.losses


@pytest.mark.ranks
@pytest.mark.parametrize("zero_between", [False, True], ids=["zeroed after the step", "zeroed after forward"])
@pytest.mark.parametrize("no_sync", [False, True], ids=["", "no_sync"])
def test_ddp_on_two_ranks_is_one_process(no_sync: bool, zero_between: bool) -> None:
    model, isolation = isolated(normed=False)
    isolation.backward = lambda loss: (loss / (2 if no_sync else 1)).backward()
    optimizer = torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9)
    for step in range(3):
        inputs, targets = batch(step, 8)
        inputs = inputs.double()
        parts = [[0, 1, 4, 5], [2, 3, 6, 7]] if no_sync else [slice(None)]  # an average moves after the first of them
        for part in parts:
            loss_of(model, isolation, (inputs[part], targets[part])).div(len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (first, _), (second, _) = run_ranks(_train_on_rank, 2, no_sync, zero_between)
    assert_same(first, second)
    assert_same(state(model, isolation), first, 1e-6)


def _refusals_on_rank() -> list[str]:
    found = []
    torch.manual_seed(0)
    model = cifar_resnet(8, NUM_CLASSES)
    wrapped = DistributedDataParallel(model)
    for given in (wrapped, model):  # the model inside is refused when it runs
        try:
            isolation = isolate(given, ["layer1"], objective=DGL, example=EXAMPLE)
            isolation.targets = batch()[1]
            wrapped(batch()[0])
        except LocalGradError as error:
            found.append(str(error))
    model, isolation = isolated()
    fully_shard(model)
    try:
        loss_of(model, isolation, batch())
    except LocalGradError as error:
        found.append(str(error))
    model, isolation = isolated(reach=2)
    try:
        loss_of(DistributedDataParallel(model), isolation, batch())
    except LocalGradError as error:
        found.append(str(error))
    return found


@pytest.mark.ranks
def test_what_several_processes_cannot_do_is_refused() -> None:
    for found in run_ranks(_refusals_on_rank, 2):
        wrapped, inside, sharded, reaching = found
        assert "the model itself" in wrapped
        assert "call isolate(model, ...) first, then DistributedDataParallel(model)" in inside
        assert "FSDP" in sharded
        assert "reach is 2 under DDP" in reaching


LOOPS = {
    "plain_loop": (4, "sklearn", ["--epochs", "1", "--images", "200"]),
    "scaler_loop": (5, "sklearn", ["--epochs", "1", "--images", "200", "--device", "cpu"]),
    "compiled_loop": (4, "sklearn", ["--epochs", "1", "--images", "200", "--device", "cpu", "--backend", "eager"]),
    "accelerate_loop": (6, "accelerate", ["--epochs", "1", "--images", "200", "--cpu"]),
    "lightning_trainer": (5, "lightning", ["--epochs", "1", "--images", "200", "--accelerator", "cpu"]),
    "hf_trainer": (6, "transformers", ["--cpu", "--steps", "2", "--layers", "2", "--width", "16"]),
}


def stock(name: str) -> tuple[str, int]:
    """An example's script without `localgrad`, and how many of its lines were added or changed."""
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    kept = [
        line.replace("isolation.trainable_parameters()", "model.parameters()")
        for line in lines
        if not re.search("# added(:|$)", line)
    ]
    changed = sum("# was model.parameters()" in line for line in lines)
    return "\n".join(kept), len(lines) - len(kept) + changed


@pytest.mark.parametrize(("name", "expected"), [*((name, LOOPS[name][0]) for name in LOOPS), ("ddp_loop", 4)])
def test_a_stock_script_needs_six_lines_at_the_most(name: str, expected: int) -> None:
    script, count = stock(name)
    assert count == expected <= 6
    code = script.split('"""', 2)[2]  # the network of the examples is all that is left of this library
    assert not re.search("isolat|localgrad", code.replace("from localgrad.models import cifar_resnet", ""))
    compile(script, name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_the_examples_run_with_and_without_these_lines(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, needs, flags = LOOPS[name]
    pytest.importorskip(needs)
    flags = [*flags, "--folder", str(tmp_path / "run")] if name == "hf_trainer" else flags
    without: dict[str, Any] = {"__file__": str(FOLDER / f"{name}.py"), "__name__": name}
    exec(stock(name)[0], without)
    for main in (example(name).main, without["main"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(flags)
        assert re.search(r"\d\.\d", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        example(name).main(["--help"])
    assert "localgrad" in capsys.readouterr().out


@pytest.mark.ranks
def test_the_example_of_ddp_runs_on_two_ranks_with_and_without_these_lines(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    without = tmp_path / "ddp_loop.py"
    without.write_text(stock("ddp_loop")[0])
    for script in (FOLDER / "ddp_loop.py", without):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        flags = ["--epochs", "1", "--images", "200"]
        ran = subprocess.run([sys.executable, *command, script, *flags], capture_output=True, text=True, timeout=120)
        assert re.search(r"epoch 1: \d\.\d+ on 2 ranks", ran.stdout), ran.stderr


def test_auxiliary_networks_ride_in_the_optimizers_state() -> None:
    model, isolation = isolated()
    optimizer = isolation.save_with(torch.optim.SGD(isolation.trainable_parameters(), 0.1, 0.9))
    for step in range(2):
        loss_of(model, isolation, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    written = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), written)
    torch.manual_seed(1)
    again, other = isolated()
    with torch.no_grad():
        for parameter in (*again.parameters(), *other.parameters()):
            parameter.add_(1)
    resumed = other.save_with(torch.optim.SGD(other.trainable_parameters(), 0.1, 0.9))
    weights, kept = torch.load(io.BytesIO(written.getvalue()), weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(kept)
    assert_same(state(model, isolation), state(again, other))
    for pair, used in (((model, isolation), optimizer), ((again, other), resumed)):
        loss_of(*pair, batch(5)).backward()
        used.step()
    assert_same(state(model, isolation), state(again, other))
    assert list(copy.deepcopy(optimizer).state_dict()) == ["state", "param_groups"]  # a copy is not of these networks
    with pytest.raises(LocalGradError, match=r"holds no auxiliary networks.*saved without"):
        resumed.load_state_dict(torch.optim.SGD(other.trainable_parameters(), 0.1, 0.9).state_dict())
    with pytest.raises(LocalGradError, match="optimizer is a list: give an optimizer of PyTorch"):
        other.save_with([optimizer])
