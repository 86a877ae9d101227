"""Units: the smallest pieces that a model can be cut into, in the order of its forward pass."""

# pyright: reportUnnecessaryIsInstance=false

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from localgrad.core.channels import channel_dim_of, usual_channel_dim
from localgrad.core.composition import check_composition, seeded, two_samples
from localgrad.core.modules import named_children, named_modules
from localgrad.core.pieces import Piece, pieces_of
from localgrad.core.restore import restored
from localgrad.core.tracing import Frozen, first_line, refuse_hooks, trace
from localgrad.core.versions import version
from localgrad.core.wrapped import unwrapped
from localgrad.errors import LocalGradError, NotTraceableError, SettingsError, warn


@dataclass(frozen=True, eq=False)
class Unit:
    """One piece of a model.

    Attributes:
        name: dotted name of the submodule that has all of the unit's weights and no others, else of the first submodule
            with a weight.
        module: takes the features before the unit to the features after it. Its parameters are the model's own.
        features: shape of the output for the example batch, `(N, C, H, W)`, `(N, H, W, C)`, `(N, C, L)`, `(N, L, D)`,
            `(N, D)`, or with one dimension more for videos and volumes.
        channel_dim: the dimension of `features` that holds channels, 1 or the last.
        writes_input: whether the unit changes its input in place (for example, it starts with an in-place activation).
        inputs: shape of the unit's input for the example batch.
        dtype: dtype of the output.
        whole: why the unit is not cut further, in words: the values that are alive between its layers. Empty if it is
            one layer or one block.
        frozen: values of the model that its units hold as constants.
    """

    name: str
    module: nn.Module
    features: torch.Size
    channel_dim: int
    writes_input: bool
    inputs: torch.Size = field(default_factory=torch.Size)
    dtype: torch.dtype = torch.float32
    whole: str = ""
    frozen: Frozen = field(default_factory=Frozen, repr=False)


def units(
    model: nn.Module,
    example: Tensor,
    names: Sequence[str] | None = None,
    *,
    channel_dim: int | Mapping[str, int] | None = None,
) -> list[Unit]:
    """List the units of `model`, in order. Applied one after another they compute `model(inputs)`, bit for bit.

    The forward pass is traced with `torch.fx`, with blocks (the children of `nn.Sequential` and `nn.ModuleList`)
    as leaves. A unit may start where exactly one tensor is alive, whose first dimension is that of the samples, and
    where a weight of two or more dimensions follows. So norms, activations and pooling stay with the unit before them;
    the pooling of a classifier's head stays with the head. Sizes, and values computed from sizes and constants alone
    (tables of rotary embeddings), are computed again in each unit that needs them.

    Nothing is changed in the model: the units hold its own submodules and parameters. They hold a snapshot of its
    forward pass, with the numbers that it read and the branches that it took. `local_step` refuses to train when these
    change, or when hooks are added to modules that the units do not call.

    Args:
        model: any model with one tensor in and one tensor out. If it returns a tuple while training (auxiliary heads),
            its first element is the output and the rest is left out, with a warning. Optional arguments of its forward
            pass stay at their defaults, with a warning.
        example: a batch `(N, ...)` of the shape that will be trained on, of floats or integers (token ids, 8-bit
            images). The model runs on its first two samples if they look like data, else on normal random numbers.
        names: dotted names of submodules which, applied in this order, compute what the model computes. Give them for a
            model that cannot be traced. They are compared with `model` on the same samples.
        channel_dim: the dimension of the features that holds channels, 1 or -1, for all units, or a dictionary by name
            of a unit or of a submodule that holds several. By default it is found: the one of the two dimensions whose
            size the next layers do not accept doubled, or else that of the nearest layers with channels.

    Returns:
        The units, as a list of `Unit`.

    Raises:
        LocalGradError: the model cannot be traced or run on the example, the submodules `names` do not compute what it
            computes, it has hooks that units would not run, or it checkpoints its activations itself.

    Warns:
        LocalGradWarning: an output, an argument or an assignment is left out, or the channel dimension is not found.
    """
    check_model(model)
    model = unwrapped(model)
    check_example(example)
    check_arguments(model)
    with restored(model) as put_back, torch.no_grad():
        samples = _samples(model.eval(), example)
        put_back()
        if names is None:
            traced = trace(model)
            with seeded(example.device):
                pieces = pieces_of(model, traced, samples)
            frozen = Frozen(model, traced, traced.through)
        else:
            pieces = _named(model, samples, names)
            inside = {module for piece in pieces for module in piece.module.modules()}
            uncalled = {name: module for name, module in named_modules(model) if module not in inside}
            for name, module in uncalled.items():
                refuse_hooks(module, name or type(model).__name__)
            frozen = Frozen(model, None, uncalled)
        put_back()
        writes = check_composition(model, pieces, samples)
        found = _measured(pieces, samples, len(example), writes, channel_dim, frozen)
    match_mode((unit.module for unit in found), model)
    return found


def match_mode(wrappers: Iterable[nn.Module], model: nn.Module) -> None:
    """Give modules that are not the model's own its training mode; norms of the model may be frozen one by one."""
    own = set(model.modules())
    for module in (part for wrapper in wrappers for part in wrapper.modules()):
        if module not in own:
            module.training = model.training


def _samples(model: nn.Module, example: Tensor) -> Tensor:
    """Two samples that the model runs on, of the example or normal random ones; a finite output is preferred.

    Raises:
        LocalGradError: the model runs on neither.
    """
    own = two_samples(example.detach())
    candidates = [own]
    if own.is_floating_point() and not own.is_meta:
        random = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(own)
        candidates = [own, random] if _holds_data(own) else [random, own]
    ran: list[Tensor] = []
    failures: list[Exception] = []
    for samples in candidates:
        with seeded(own.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                output = model(samples.clone())
            except Exception as error:  # of any class: the model refuses these samples
                failures.append(error)
                continue
        values = cast(Any, output[0] if isinstance(output, tuple | list) and output else output)
        if not isinstance(values, Tensor) or values.is_meta or bool(values.isfinite().all()):
            return samples
        ran.append(samples)
    if ran:
        return ran[0]
    name, reason = type(model).__name__, first_line(failures[0])
    if own.is_meta:
        raise LocalGradError(
            f"{name} does not run without data ({reason}), so its memory cannot be planned: measure a step with "
            "localgrad.planning.step_peak, or give a real example"
        ) from failures[0]
    raise LocalGradError(
        f"{name} does not run on the example of shape {tuple(example.shape)} and {example.dtype} ({reason}); give an "
        "example of the size, dtype and device that the model takes"
    ) from failures[0]


def _holds_data(samples: Tensor) -> bool:
    """Whether values look like data: not all equal, and not like uninitialised memory."""
    sizes = samples.double().abs()
    usual = (sizes == 0) | ((sizes > 1e-30) & (sizes < 1e9))
    return bool(usual.all()) and bool((samples != samples.flatten()[0]).any())


def _measured(
    pieces: Sequence[Piece],
    features: Tensor,
    samples: int,
    writes: Sequence[bool] | None,
    channel_dim: int | Mapping[str, int] | None,
    frozen: Frozen,
) -> list[Unit]:
    """Run the pieces in evaluation mode and describe each as a unit.

    `writes` says whether each piece changes its input in place; with None each piece runs in training mode for this.
    """
    told = _given_channel_dims([piece.name for piece in pieces], channel_dim)
    modules = [piece.module for piece in pieces]
    found: list[Unit] = []
    for position, piece in enumerate(pieces):
        writes_input = _writes_input(piece.module, features) if writes is None else writes[position]
        taken, features = features, piece.module.eval()(features)
        inputs, size = (torch.Size([samples, *each.shape[1:]]) for each in (taken, features))
        last = len(size) - 1
        dim = 1 if told[position] == 1 else last
        if told[position] is None and position + 1 < len(pieces):
            guess = channel_dim_of(features, modules[: position + 1], modules[position + 1 :])
            dim = usual_channel_dim(len(size)) if guess is None else guess
            if guess is None:
                warn(
                    f"nothing near the unit {piece.name!r} tells which dimension of its features {tuple(size)} holds "
                    f"channels; {dim} is taken: give channel_dim={{{piece.name!r}: 1}} or -1 to say it"
                )
        found.append(
            Unit(piece.name, piece.module, size, dim, writes_input, inputs, features.dtype, piece.whole, frozen)
        )
    return found


def _given_channel_dims(names: Sequence[str], channel_dim: int | Mapping[str, int] | None) -> list[int | None]:
    """The channel dimension that the user gives for each unit, or None."""
    given = {"": channel_dim} if isinstance(channel_dim, int) else dict(channel_dim or {})
    told: list[int | None] = [None] * len(names)
    for key, dim in given.items():
        inside = [i for i, name in enumerate(names) if not key or name == key or name.startswith(f"{key}.")]
        if dim not in (1, -1) or not inside:
            raise SettingsError(
                f"channel_dim is {channel_dim!r}: give 1 (first) or -1 (last), or a dictionary of these by unit; the "
                f"units are {', '.join(names)}"
            )
        for i in inside:
            told[i] = dim
    return told


def _writes_input(module: nn.Module, features: Tensor) -> bool:
    """Whether the unit changes its input in place while training. It runs the unit on copies of its buffers."""
    inputs = features.clone()
    before = version(inputs)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with seeded(features.device):
        torch.func.functional_call(module.train(), buffers, inputs)
    return version(inputs) != before


def check_model(model: nn.Module) -> None:
    """Refuse objects that are no modules, and modules without children."""
    if not isinstance(model, nn.Module) or not any(True for _ in model.children()):
        given = f"a {type(model).__name__}" if isinstance(model, nn.Module) else " ".join(repr(model).split())[:80]
        raise SettingsError(f"model is {given}: give an instance of a network, such as torchvision.models.resnet18()")


def check_example(example: Tensor) -> None:
    """Refuse an example that is no batch `(N, ...)` of real numbers."""
    if not isinstance(example, Tensor) or example.is_complex() or example.ndim < 2 or example.numel() == 0:
        is_tensor = isinstance(example, Tensor)
        given = f"{tuple(example.shape)} {example.dtype}" if is_tensor else f"a {type(example).__name__}"
        raise SettingsError(
            f"example is {given}: it must be one batch (N, ...), such as torch.empty(2, 3, 32, 32); a model of several "
            "inputs goes to localgrad.isolate"
        )


def check_arguments(model: nn.Module) -> None:
    """Refuse a model whose forward pass needs more than one argument."""
    kinds = inspect.Parameter
    needed = [
        argument.name
        for argument in inspect.signature(model.forward).parameters.values()
        if argument.default is kinds.empty and argument.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise NotTraceableError(
            f"{type(model).__name__}.forward uses more than one argument ({', '.join(needed)}): units are cut for one "
            "tensor; wrap the model so that it takes one, or use localgrad.isolate, which takes any arguments"
        )


def find_unit(found: Sequence[Unit], name: str) -> int:
    """Index of the unit called `name`, or of the last unit inside the submodule `name` ("layer1" is its last block).

    Raises:
        LocalGradError: there is no such unit, or the last unit inside the submodule also holds layers after it.
    """
    inside = [i for i, unit in enumerate(found) if unit.name == name or unit.name.startswith(f"{name}.")]
    if not inside:
        raise SettingsError(
            f"cut {name!r} is not a unit: the units are {', '.join(unit.name for unit in found)}; "
            f"see localgrad.units(model, example){why_whole(found)}"
        )
    last, model = found[inside[-1]], found[0].frozen.model
    if last.name != name and model is not None and name in dict(named_modules(model)):
        own = set(model.get_submodule(name).parameters())
        beyond = [p for p in last.module.parameters() if p.ndim > 1 and p not in own]
        if beyond:
            raise SettingsError(
                f"cut {name!r} is in the middle of the unit {last.name!r}, which holds layers after it, too: cut after "
                f"another unit ({', '.join(unit.name for unit in found)}){why_whole([last])}"
            )
    return inside[-1]


def why_whole(found: Sequence[Unit]) -> str:
    """Why units are not cut further, as the end of a message; empty if all units are single layers or blocks."""
    reasons = [f"{unit.name} holds together ({unit.whole[:160]})" for unit in found if unit.whole]
    if not reasons:
        return ""
    more = f", and {len(reasons) - 2} more" if len(reasons) > 2 else ""
    return f". {'; '.join(reasons[:2])}{more}; localgrad.isolate cuts at any module by name"


def _named(model: nn.Module, samples: Tensor, names: Sequence[str]) -> list[Piece]:
    """The submodules as pieces. One whose output does not have samples along its first dimension goes with the next.

    Raises:
        LocalGradError: a name is no submodule, or the submodules do not compute what the model computes.
    """
    modules = dict(named_modules(model))
    unknown = [name for name in names if not name or name not in modules]
    if unknown or not names:
        raise SettingsError(
            f"names {unknown or list(names)} are no submodules of {type(model).__name__}: "
            f"its children are {', '.join(name for name, _ in named_children(model))}; give dotted names, in order"
        )
    model.eval()
    expected, features = model(samples.clone()), samples.clone()
    more = torch.cat([samples, samples[:1]])
    ends: list[int] = []
    try:
        for position, name in enumerate(names, start=1):
            features, more = modules[name](features), modules[name](more)
            if isinstance(features, Tensor) and features.ndim > 1 and (len(features), len(more)) == (2, 3):
                ends.append(position)
    except Exception as error:
        raise NotTraceableError(
            f"the submodules {', '.join(names)} do not run one after another on an example of shape "
            f"{tuple(samples.shape)} ({first_line(error)}); each must take the output of the one before"
        ) from error
    tensors = isinstance(features, Tensor) and isinstance(expected, Tensor)
    if not tensors or not (features.shape == expected.shape if samples.is_meta else torch.equal(features, expected)):
        raise NotTraceableError(
            f"the submodules {', '.join(names)}, applied in order, do not give what {type(model).__name__} gives: name "
            "every submodule of its forward pass, and move what the forward pass does between them into a submodule"
        )
    ends = ends if ends and ends[-1] == len(names) else [*ends, len(names)]
    pieces: list[Piece] = []
    for start, stop in zip([0, *ends], ends, strict=False):
        inside = [modules[name] for name in names[start:stop]]
        whole = "" if len(inside) == 1 else "samples do not lie along the first dimension in between"
        pieces.append(Piece(names[start], inside[0] if len(inside) == 1 else nn.Sequential(*inside), whole))
    return pieces
