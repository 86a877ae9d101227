"""What a trace would lose is run, refused or noticed; nothing is left on the model."""

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localgrad import LocalGradError, classifier, dgl, local_step, split, units
from localgrad.core.units import Unit
from localgrad.errors import LocalGradWarning

torch.set_num_threads(1)
INPUTS, TARGETS = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


class Chain(nn.Module):
    """Three linear layers and what happens between them."""

    def __init__(self, between: Callable[["Chain", Tensor], Tensor] = lambda self, x: x) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.alpha, self.config, self.steps = 1.0, SimpleNamespace(scale=1.0), 0
        self.register_buffer("centre", torch.zeros(16))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self, self.a(x).relu())).relu())


def composed(found: list[Unit], inputs: Tensor) -> Tensor:
    for unit in found:
        inputs = unit.module(inputs)
    return inputs


def step(model: nn.Module, blocks: list[Any]) -> None:
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    local_step(blocks, optimizers, INPUTS, TARGETS)


def two_blocks(model: nn.Module) -> list[Any]:
    return split(model, INPUTS, cuts=["a"], objective=classifier(5))


# attributes, hooks, assignments


def test_a_number_that_the_forward_pass_reads_is_not_changed_in_silence() -> None:
    model = Chain(lambda self, x: self.alpha * x)
    blocks = two_blocks(model)
    step(model, blocks)
    model.alpha = 0.0
    with pytest.raises(LocalGradError, match=r"Chain.alpha was 1.0 .* is 0.0 now.*split again"):
        step(model, blocks)
    step(model, two_blocks(model))


def test_a_number_in_a_config_counts_too_and_one_without_effect_does_not() -> None:
    model = Chain(lambda self, x: x * self.config.scale if self.steps >= 0 else x)
    blocks = two_blocks(model)
    model.steps = 7  # read, but the branch is the same
    step(model, blocks)
    model.config.scale = 2.0
    with pytest.raises(LocalGradError, match=r"Chain\.config\.scale "):
        step(model, blocks)


def test_copied_blocks_have_no_model_to_follow() -> None:
    model = Chain(lambda self, x: self.alpha * x)
    blocks = copy.deepcopy(two_blocks(model))
    model.alpha = 0.0
    step(model, blocks)


def test_a_hook_on_a_module_that_blocks_call_is_run() -> None:
    model, calls = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 5)), []
    model[0].register_forward_hook(lambda *_: calls.append("stage"))
    model[1].register_forward_hook(lambda *_: calls.append("head"))
    blocks = split(model, INPUTS, cuts=["0"], objective=classifier(5))
    calls.clear()
    step(model, blocks)
    assert calls == ["stage", "head"]


def test_a_hook_that_blocks_would_not_run_is_refused_before_and_after() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 5))
    handle = model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(LocalGradError, match=r"Sequential itself has hooks.*localgrad.isolate"):
        units(model, INPUTS)
    handle.remove()
    blocks = split(model, INPUTS, cuts=["0"], objective=classifier(5))
    model[0].register_forward_hook(lambda module, args, output: 0 * output)
    with pytest.raises(LocalGradError, match="a forward hook was registered on 0 after the model was split"):
        step(model, blocks)


def _keep(self: Chain, x: Tensor) -> Tensor:
    self.kept = x
    return x


class Keeping(nn.Module):
    """A layer that keeps its features, made of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x)
        return self.second(self.kept)


def test_assignments_in_a_submodule_are_run_and_those_of_the_model_are_said() -> None:
    with pytest.warns(LocalGradWarning, match=r"Chain assigns self.kept .*localgrad.isolate"):
        units(Chain(_keep), INPUTS)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle, self.head = Keeping(), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(x))

    model = Model()
    found = units(model, INPUTS)
    assert [unit.name for unit in found] == ["middle", "head"]
    assert "it assigns self.kept" in found[0].whole
    assert not hasattr(model.middle, "kept")
    composed(found, INPUTS)
    assert model.middle.kept.shape == (8, 16)


def _assign_buffer(self: Chain, x: Tensor) -> Tensor:
    if self.training:
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
    return x - self.centre


def _fail(self: Chain, x: Tensor) -> Tensor:
    self.kept = x
    raise ValueError("no")


@pytest.mark.parametrize("between", [_keep, _assign_buffer, _fail, lambda self, x: x + torch.arange(16.0)])
@pytest.mark.filterwarnings("ignore::localgrad.errors.LocalGradWarning")
def test_nothing_is_left_on_the_model(between: Any) -> None:
    model = Chain(between)
    attributes = [dict(vars(module)) for module in model.modules()]
    buffer, values = model.centre, model.centre.clone()
    try:
        units(model, INPUTS)
    except LocalGradError:
        assert between in (_assign_buffer, _fail)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert model.centre is buffer
    assert torch.equal(buffer, values)


class Growing(nn.Module):
    """A layer that exchanges a buffer, and resizes another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("queue", torch.ones(3, 16))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training:
            self.queue = torch.cat([self.queue, x.detach()])
            self.seen.resize_(len(x)).fill_(1.0)
        return x


def test_buffers_that_are_assigned_or_resized_come_back_themselves() -> None:
    model = nn.Sequential(Growing(), nn.ReLU(), Growing(), nn.ReLU(), nn.Linear(16, 5))
    queue, seen = model[0].queue, model[0].seen
    found = units(model, INPUTS)
    assert len(found) == 3
    assert model[0].queue is queue
    assert model[0].seen is seen
    assert (queue.shape, seen.shape) == ((3, 16), (0,))


# checkpointing


class Checkpointed(Chain):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x: Any = checkpoint(lambda x: self.b(torch.tanh(x)), x, use_reentrant=self.reentrant)
        return self.c(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_models_own_checkpointing_is_not_taken_away_in_silence(reentrant: bool) -> None:
    with pytest.raises(LocalGradError, match=r"checkpoints its activations itself.*split\(recompute=True\)"):
        units(Checkpointed(reentrant), INPUTS)


# arguments and inputs


def test_optional_arguments_stay_at_their_defaults_with_a_word() -> None:
    class Masked(Chain):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    with pytest.warns(LocalGradWarning, match=r"optional arguments .*mask=None"):
        units(Masked(), INPUTS)


def test_token_ids_and_pictures_of_bytes() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
    found = units(nn.Sequential(nn.Embedding(50, 16), *layers, nn.Linear(16, 50)), torch.zeros(2, 6, dtype=torch.long))
    assert [unit.channel_dim for unit in found[:-1]] == [2, 2, 2]

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 255

    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    net = nn.Sequential(Scaled(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    blocks = split(net, pictures, num_blocks=2, objective=dgl(5))
    optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
    assert len(local_step(blocks, optimizers, pictures.random_(0, 255), torch.tensor([0, 1]))) == 2
    with pytest.raises(LocalGradError, match=r"targets .*classes") as refused:  # not the fault of the bytes
        local_step(blocks, optimizers, pictures, torch.tensor([0, 5]))
    assert "uint8" not in str(refused.value)


class Log(Chain):
    """A model of positive inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.log(x))


def test_the_examples_own_values_are_run_where_it_holds_data() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(10, 4), nn.Linear(7, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x[:, :3], self.embedding(x[:, 3:].long()).flatten(1)], 1)
            return self.second(self.first(x))

    example = torch.cat([torch.randn(8, 3), torch.randint(0, 10, (8, 1)).float()], 1)
    assert [unit.name for unit in units(Table(), example)] == ["embedding", "first", "second"]
    assert len(units(Log(), torch.rand(8, 16) + 0.1)) == 3
    for example in (torch.empty(2, 16), torch.full((2, 16), float("nan")), torch.zeros(2, 16)):
        assert len(units(Chain(), example)) == 3


# where channels and samples lie


class Recurrent(nn.Module):
    """Convolutions, then a recurrent layer over their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 5, 2), nn.Conv1d(16, 24, 5, 2)
        self.rnn, self.head = nn.LSTM(24, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu().transpose(1, 2)
        return self.head(self.rnn(x)[0][:, -1])


class ChannelsLast(nn.Module):
    """Maps with channels last, a norm without a class of torch, and as many rows as channels."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.weight = nn.Parameter(torch.ones(8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.scale) @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixers = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(self.Mixer() for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for mixer in self.mixers:
            x = mixer(x)
        return self.head(x.mean((1, 2)))


def test_channels_are_where_the_next_weights_fix_the_size() -> None:
    assert [unit.channel_dim for unit in units(Recurrent(), torch.empty(2, 3, 200))] == [1, 2, 2, 1]
    assert [unit.channel_dim for unit in units(ChannelsLast(), torch.empty(2, 3, 32, 32))] == [3, 3, 3, 1]


def test_where_nothing_tells_it_is_said_and_the_user_may_tell() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 6)), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.v((x + x).flatten(1))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = nn.Sequential(Own(), Flat())
    with pytest.warns(LocalGradWarning, match=r"nothing near the unit '0' tells .*channel_dim="):
        assert units(model, torch.empty(2, 6, 6))[0].channel_dim == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert units(model, torch.empty(2, 6, 6), channel_dim={"0": 1})[0].channel_dim == 1
        assert units(model, torch.empty(2, 6, 6), channel_dim=-1)[0].channel_dim == 2
    for wrong in ({"7": 1}, 3, {"0": 2}):
        with pytest.raises(LocalGradError, match=r"channel_dim is .*the units are 0, 1"):
            units(model, torch.empty(2, 6, 6), channel_dim=wrong)


class SequenceFirst(nn.Module):
    """Layers between which samples lie along the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


def test_no_cut_where_samples_do_not_lie_first_and_the_reason_is_given() -> None:
    found = units(SequenceFirst(), torch.empty(2, 6, 8))
    assert [unit.name for unit in found] == ["embed", "layers", "head"]
    assert "has not one entry a sample along its first dimension" in found[1].whole


# what is alive at a cut


class Resized(nn.Module):
    """A map that is brought to the size of the inputs at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, samples = x.shape[-2:], x.shape[0]
        maps = self.c(self.b(self.a(x).relu()).relu())
        return F.interpolate(maps, size=size).reshape(samples, 5, size[0], size[1])


def test_a_size_is_no_live_value_and_inputs_of_another_size_are_refused() -> None:
    model, inputs = Resized(), torch.randn(4, 3, 16, 16)
    found = units(model, torch.empty(2, 3, 16, 16))
    assert [unit.name for unit in found] == ["a", "b", "c"]
    assert torch.equal(composed(found, inputs), model(inputs))
    with pytest.raises(LocalGradError, match=r"inputs .*\(2, 3, 20, 20\).*\(2, 3, 16, 16\)"):
        composed(found, torch.randn(2, 3, 20, 20))


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x) * table


class Rotary(nn.Module):
    """A table made of a buffer, which every layer gets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.layers = nn.ModuleList(Rotated() for _ in range(3))
        self.register_buffer("angles", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.cos(self.angles)[None]
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, table)
        return self.head(x)


def test_what_is_made_of_constants_is_made_again_in_each_unit() -> None:
    model, inputs = Rotary(), torch.randn(5, 8)
    found = units(model, torch.empty(2, 8))
    assert [unit.name for unit in found] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert torch.equal(composed(found, inputs), model(inputs))


class Skips(nn.Module):
    """A U-Net of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deeper = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.deepest, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        second = self.deeper(skip)
        up = self.up(torch.cat([second, F.interpolate(self.deepest(second), scale_factor=2.0)], 1))
        return self.head(torch.cat([skip, F.interpolate(up, scale_factor=2.0)], 1))


def test_why_there_are_few_units_is_said_by_name() -> None:
    model, example = Skips(), torch.empty(2, 3, 16, 16)
    found = units(model, example)
    assert [unit.name for unit in found] == ["down", "deeper", "head"]
    assert "between deeper and deepest" in found[1].whole
    for options in ({"num_blocks": 4}, {"cuts": ["up"]}):
        with pytest.raises(
            LocalGradError, match=r"deeper holds together .*relu, deeper are read again later.*localgrad.isolate"
        ):
            split(model, example, objective=dgl(5), **options)


def test_a_submodule_that_ends_in_the_middle_of_a_unit_is_no_cut() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(3)))
            self.after, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stage[0](x)
            return self.head(self.after(self.stage[2](self.stage[1](x))) + x)

    model, example = Model(), torch.empty(2, 3, 8, 8)
    assert [unit.name for unit in units(model, example)] == ["stage.0", "stage.1", "head"]
    with pytest.raises(LocalGradError, match=r"'stage' is in the middle of the unit 'stage.1'.*stage.0, stage.1, head"):
        split(model, example, cuts=["stage"], objective=dgl(5))
    assert len(split(model, example, cuts=["stage.1"], objective=dgl(5))) == 2


class DropPath(nn.Module):
    """The mask of stochastic depth in the middle of a chain, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        if self.training:
            x = x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8)
        return self.head(x.relu().mean((2, 3)))


def test_both_modes_are_cut_at_the_same_places() -> None:
    found = units(DropPath(), torch.empty(2, 3, 12, 12))
    assert [unit.name for unit in found] == ["a", "b", "head"]
    for training in (True, False):
        features = torch.randn(2, 3, 12, 12)
        for unit in found:
            features = unit.module.train(training)(features)
            assert features.shape == unit.features


@pytest.mark.parametrize("last", [False, True])
def test_heads_take_videos_and_volumes(last: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(3, 6, 3, 2, 1), nn.Conv3d(6, 7, 1)
            self.mix, self.head = nn.Linear(7, 7), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu())
            return self.head((self.mix(x.movedim(1, -1)) if last else x.movedim(1, -1)).mean((1, 2, 3)))

    inputs = torch.randn(4, 3, 4, 8, 8)
    for objective in (classifier(5), dgl(5)):
        blocks = split(Model(), inputs, cuts=["a", "b"], objective=objective)
        optimizers = [torch.optim.SGD(block.trainable_parameters(), lr=0.1) for block in blocks]
        assert all(loss.isfinite() for loss in local_step(blocks, optimizers, inputs, torch.arange(4)))
