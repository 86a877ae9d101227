"""Units: the smallest pieces that a model can be cut into, in the order of its forward pass."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from localgrad.core.tracing import check_composition, seeded, traced, two_samples
from localgrad.core.wrapped import unwrapped
from localgrad.errors import LocalGradError


@dataclass(frozen=True, eq=False)
class Unit:
    """One piece of a model.

    Attributes:
        name: dotted name of the submodule that the unit consists of or, where it consists of several,
            of the first one with a weight.
        module: takes the features before the unit to the features after it. Its parameters are the model's own.
        features: shape of the output for the example batch, `(N, C, H, W)`, `(N, H, W, C)`, `(N, C, L)`, `(N, L, D)`
            or `(N, D)`.
        channel_dim: the dimension of `features` that holds channels, 1 or the last.
        writes_input: whether the unit changes its input in place (it starts with an in-place activation, say).
        inputs: shape of what it takes, for the example batch.
        dtype: of the output for the example batch.
    """

    name: str
    module: nn.Module
    features: torch.Size
    channel_dim: int
    writes_input: bool
    inputs: torch.Size = field(default_factory=torch.Size)
    dtype: torch.dtype = torch.float32


def units(model: nn.Module, example: Tensor, names: Sequence[str] | None = None) -> list[Unit]:
    """List the units of `model`, in order; applied one after another they are `model(inputs)`, bit for bit.

    The forward pass is traced with `torch.fx`, with blocks (the children of `nn.Sequential` and `nn.ModuleList`)
    as leaves. A unit may start where exactly one tensor is alive and a weight of two or more dimensions follows:
    norms, activations and pooling stay with the unit before them, the pooling of a classifier's head with the head.
    Nothing is changed in the model: the units hold its own submodules and parameters.

    Args:
        model: any classification model with one tensor in and one tensor out. If it returns a tuple while training
            (auxiliary heads), its first element is the output and the rest is left out.
        example: a batch `(N, ...)` of the shape that will be trained on; only its shape, dtype and device count.
        names: dotted names of submodules which, applied in this order, are the model. The way out for a model that
            cannot be traced; compared with `model` on random inputs.

    Returns:
        One `Unit` a piece.

    Raises:
        LocalGradError: the model cannot be traced or run on the example, or `names` do not compose to it.
    """
    check_model(model)
    model = unwrapped(model)
    check_example(example)
    with _left_as_it_is(model), torch.no_grad():
        inputs = example
        if not example.is_meta:
            inputs = torch.randn(example.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(example)
        pieces = traced(model, inputs) if names is None else _named(model, inputs, names)
        found = _measured(pieces, inputs, check_composition(model, pieces, inputs))
    match_mode((unit.module for unit in found), model)
    return found


def match_mode(wrappers: Iterable[nn.Module], model: nn.Module) -> None:
    """Put what is not the model's own in its mode; its own modules may be frozen one by one, and stay as they are."""
    own = set(model.modules())
    for module in (part for wrapper in wrappers for part in wrapper.modules()):
        if module not in own:
            module.training = model.training


def _measured(pieces: Sequence[tuple[str, nn.Module]], features: Tensor, writes: Sequence[bool] | None) -> list[Unit]:
    """Run the pieces in evaluation mode and note what each gives; `writes` says which change their input in place."""
    found = []
    for position, (name, module) in enumerate(pieces):
        following = pieces[position + 1][1] if position + 1 < len(pieces) else None
        writes_input = _writes_input(module, features) if writes is None else writes[position]
        taken, features = features.shape, module.eval()(features)
        channel_dim = _channel_dim(features.shape, module, following)
        found.append(Unit(name, module, features.shape, channel_dim, writes_input, taken, features.dtype))
    return found


def _writes_input(module: nn.Module, features: Tensor) -> bool:
    """Whether the unit changes its input in place while training; found by running it, on copies of its buffers."""
    inputs = two_samples(features)
    version = inputs._version
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with seeded(features.device):
        torch.func.functional_call(module.train(), buffers, inputs)
    return inputs._version != version


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, or has no layer to cut at."""
    if not isinstance(model, nn.Module) or not any(True for _ in model.children()):
        given = f"a {type(model).__name__}" if isinstance(model, nn.Module) else " ".join(repr(model).split())[:80]
        raise LocalGradError(f"model is {given}: give an instance of a network, such as torchvision.models.resnet18()")


def check_example(example: Tensor) -> None:
    """Refuse an example that is no batch of floating-point inputs."""
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.ndim < 2 or example.numel() == 0:
        given = (
            f"{tuple(example.shape)} {example.dtype}"
            if isinstance(example, Tensor)
            else " ".join(repr(example).split())[:80]
        )
        raise LocalGradError(
            f"example is {given}: it must be a floating-point batch (N, ...), such as torch.empty(2, 3, 32, 32)"
        )


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Restore every training flag and every buffer on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def find_unit(found: Sequence[Unit], name: str) -> int:
    """Index of the unit called `name`, or of the last unit inside the submodule `name` ("layer1" is its last block)."""
    inside = [i for i, unit in enumerate(found) if unit.name == name or unit.name.startswith(f"{name}.")]
    if not inside:
        raise LocalGradError(
            f"cut {name!r} is not a unit: the units are {', '.join(unit.name for unit in found)}; "
            "see localgrad.units(model, example)"
        )
    return inside[-1]


def _named(model: nn.Module, inputs: Tensor, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    unknown = [name for name in names if not name or name not in modules]
    if unknown or not names:
        raise LocalGradError(
            f"names {unknown or list(names)} are no submodules of {type(model).__name__}: "
            f"its children are {', '.join(name for name, _ in model.named_children())}; give dotted names, in order"
        )
    model.eval()
    expected, features = model(inputs.clone()), inputs.clone()
    try:
        for name in names:
            features = modules[name](features)
    except Exception as error:
        raise LocalGradError(
            f"the submodules {', '.join(names)} do not run one after another on an example of shape "
            f"{tuple(inputs.shape)} ({str(error).strip().splitlines()[0]}); each must take the output of the one before"
        ) from error
    tensors = isinstance(features, Tensor) and isinstance(expected, Tensor)
    if not tensors or not (features.shape == expected.shape if inputs.is_meta else torch.equal(features, expected)):
        raise LocalGradError(
            f"the submodules {', '.join(names)}, applied in order, do not give what {type(model).__name__} gives: name "
            "every submodule of its forward pass, and move what the forward pass does between them into a submodule"
        )
    return [(name, modules[name]) for name in names]


def _channel_dim(features: torch.Size, module: nn.Module, following: nn.Module | None) -> int:
    """The dimension that holds channels: told by the first layer of the next unit that fixes their number."""
    last = len(features) - 1
    if len(features) == 5:
        near = [layer for each in (module, following) if each for layer in each.modules()]
        return 1 if any(isinstance(layer, nn.Conv3d | nn.BatchNorm3d) for layer in near) else last
    if len(features) not in (3, 4):
        return last
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if len(features) == 3 else (nn.Conv2d, nn.BatchNorm2d)
    near = [*module.modules(), *(following.modules() if following else ())]
    if len(features) == 3 and not any(isinstance(layer, conv) for layer in near):
        return last  # tokens, where no convolution tells otherwise
    guess = None
    for layer in following.modules() if following else ():
        if isinstance(layer, conv):
            channels, here = layer.in_channels, 1
        elif isinstance(layer, norm):
            channels, here = layer.num_features, 1
        elif isinstance(layer, nn.Linear):  # of a sequence that is pooled, or of a map that may be
            channels, here = layer.in_features, 1 if len(features) == 3 or _convolves(module) else last
        elif isinstance(layer, nn.LayerNorm):
            channels, here = layer.normalized_shape[-1], 1 if type(layer).__name__.endswith("2d") else last
        else:
            continue
        dims = [dim for dim in (1, last) if features[dim] == channels]
        if dims:
            return here if here in dims else dims[0]
        guess = guess or here
    return 1 if guess is None or following is None or _flattens(features, following) else guess


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv2d | nn.BatchNorm2d) for layer in module.modules())


def _flattens(features: torch.Size, following: nn.Module) -> bool:
    """Whether the next unit is a linear layer on the flattened map, as in VGG."""
    return any(isinstance(m, nn.Linear) and m.in_features == features[1:].numel() for m in following.modules())
