"""The weights that a network begins with: pretrained ones by name, a file, or those that a run left."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from localgrad.config.schema import ModelConfig
from localgrad.data.config import DataConfig
from localgrad.data.hub import cache_alone, hub_lacks
from localgrad.errors import LocalGradError, closest

MOST_NAMED = 5


def import_timm(name: str) -> Any:
    """timm, which `name` needs."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise LocalGradError(f"{name} needs timm: pip install 'localgrad[timm]'") from None


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Takes the modules or parameters of these names, and all within them, out of training.

    Raises:
        LocalGradError: there is none of a name.
    """
    for name in names:
        own = [each for key, each in model.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not own:
            known = [key for key, module in model.named_modules() if key and any(True for _ in module.parameters())]
            raise LocalGradError(f"--freeze {name}: the network has no parameters of that name{closest(name, known)}")
        for parameter in own:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class Weights:
    """A state dict, and where it is from."""

    state: dict[str, Tensor]
    origin: str
    mean: tuple[float, ...] | None = None
    """Mean and deviation by which the images were normalised that it was trained on; None where nobody says."""
    std: tuple[float, ...] | None = None


def load_weights(model: nn.Module, config: ModelConfig, num_classes: int, data: DataConfig | None = None) -> str | None:
    """Loads the weights that the config says, in place; the head stays new where it has other classes.

    Args:
        model: as `build_model` gave it.
        config: `weights` is `default`, `imagenet`, a name that torchvision or timm gives its weights, a file of
            safetensors or a state dict, or a run folder; None leaves the model as it is.
        num_classes: that the model was built for.
        data: how the images are normalised; None where that does not matter.

    Returns:
        What was done, in a sentence, and that the weights know other means and deviations; None if nothing.

    Raises:
        LocalGradError: there are no such weights, they cannot be had, or they are another network's.
    """
    if config.weights is None:
        return None
    found = _state(config, config.weights)
    said = f"weights of {found.origin}{_put(model, found.state, found.origin, num_classes)}"
    return said if data is None else said + _otherwise_normalised(found, data)


def _otherwise_normalised(weights: Weights, data: DataConfig) -> str:
    if weights.mean is None or weights.std is None:
        return ""
    pairs = zip([*weights.mean, *weights.std], [*data.mean, *data.std], strict=True)
    if all(abs(theirs - ours) < 0.01 for theirs, ours in pairs):
        return ""
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (weights.mean, weights.std))
    return f"; they were trained on images normalised with --data.mean {mean} --data.std {std}, yours are otherwise"


def _put(model: nn.Module, state: dict[str, Tensor], origin: str, num_classes: int) -> str:
    own = model.state_dict()
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in own]
    heads = {name.rpartition(".")[0] for name in [*other, *missing]}
    is_head = all(_is_head(model, head, num_classes) for head in heads)
    if (heads and not is_head) or any(name.rpartition(".")[0] not in heads for name in surplus if not _auxiliary(name)):
        wrong = [name for name in [*other, *missing, *surplus] if name.rpartition(".")[0] not in heads or not is_head]
        named = ", ".join(wrong[:MOST_NAMED]) + (f" and {len(wrong) - MOST_NAMED} more" if wrong[MOST_NAMED:] else "")
        raise LocalGradError(
            f"{origin} is not of this network: {len(other)} shapes differ, {len(missing)} names are missing and "
            f"{len(surplus)} are too many ({named})\n  Give the --model.name (and --model.depth) that it was made with."
        )
    kept = {name: value for name, value in state.items() if name in own and name not in other}
    model.load_state_dict(kept, strict=False)
    return f"; {' and '.join(sorted(heads))} begins anew, for {num_classes} classes" if heads else ""


def _auxiliary(name: str) -> bool:
    """Whether these are of an auxiliary classifier that torchvision's Inception and GoogLeNet have in training."""
    return name.startswith(("AuxLogits.", "aux1.", "aux2."))


def _is_head(model: nn.Module, name: str, num_classes: int) -> bool:
    """Whether a module is the last one: a linear layer or convolution with an output for each class."""
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.shape[0] == num_classes


def _state(config: ModelConfig, weights: str) -> Weights:
    path = Path(weights).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise LocalGradError(f"{weights} has no model.safetensors: give the folder of a finished run, or a file")
    if path.is_file():
        return Weights(_from_file(path), str(path))
    library, _, name = config.name.rpartition(":")
    try:
        if library == "torchvision":
            return _torchvision(name, weights)
        if library == "timm":
            return _pretrained_timm(config.name, name, weights)
    except OSError as error:  # of urllib and of the hub: no network, and not in the cache
        raise LocalGradError(
            f"--model.weights {weights}: the weights of {config.name} are not in the cache and cannot be fetched "
            f"({' '.join(str(error).split())[:160]}); give a file"
        ) from error
    raise LocalGradError(
        f"--model.weights {weights}: there is no such file, and only torchvision's and timm's networks have weights "
        "by name"
    )


def _from_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds for a broken file, or one that holds code
        if isinstance(error, UnpicklingError) and is_zipfile(path):  # PyTorch wrote it, with more than tensors in it
            raise LocalGradError(
                f"--model.weights {path} holds a whole model or other objects, which are not loaded from a file: save "
                "`model.state_dict()` instead"
            ) from error
        said = " ".join(str(error).split())[:160]
        raise LocalGradError(f"--model.weights {path} is no file of weights ({said})") from error
    for key in ("state_dict", "model"):  # as many training programs write it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LocalGradError(f"--model.weights {path} holds no state dict (a table of names and tensors)")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _torchvision(name: str, weights: str) -> Weights:
    import torchvision

    known = torchvision.models.get_model_weights(name)
    named = {each.name: each for each in known} | {"DEFAULT": known.DEFAULT}  # pyright: ignore[reportAttributeAccessIssue]
    wanted = "DEFAULT" if weights in ("default", "imagenet") else weights
    if wanted not in named:
        have = ", ".join(["default", *(each.name for each in known)])
        raise LocalGradError(f"--model.weights {weights}: torchvision:{name} has {have}; or give a file")
    chosen = named[wanted]
    prepared: Any = chosen.transforms()
    state = chosen.get_state_dict(progress=False, check_hash=True)
    mean, std = getattr(prepared, "mean", None), getattr(prepared, "std", None)
    return Weights(state, f"torchvision's {name} ({chosen.name})", mean, std)


def _pretrained_timm(full: str, name: str, weights: str) -> Weights:
    timm = import_timm(full)
    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    tagged = name if weights in ("default", "imagenet") else f"{name.partition('.')[0]}.{weights}"
    if not tags or (tagged != name and tagged not in tags):
        have = ", ".join(["default", *(tag.partition(".")[2] for tag in tags)]) if tags else "none by name"
        raise LocalGradError(f"--model.weights {weights}: {full} has {have}; or give a file")
    hub = getattr(timm.get_pretrained_cfg(tagged), "hf_hub_id", None)
    why = hub_lacks(hub, "model", "a file") if hub else None
    try:
        with cache_alone(why is not None):
            model = timm.create_model(tagged, pretrained=True)
    except OSError as error:  # not in the cache
        if why is None:
            raise
        raise LocalGradError(f"--model.weights {weights}: {hub} is not in the cache, and {why}") from error
    known = model.pretrained_cfg
    return Weights(model.state_dict(), f"timm's {tagged}", known.get("mean"), known.get("std"))
