"""Load initial weights of a network: pretrained ones by name, from a file, or from a run folder."""

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
    """Import timm, or raise a LocalGradError that says how to install it for the network `name`."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise LocalGradError(f"{name} needs timm: pip install 'localgrad[timm]'") from None


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Turn `requires_grad` off for the named parameters and for all parameters of the named modules.

    Raises:
        LocalGradError: the model has no module or parameter of a name.
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
    """A state dict, its origin in words, and the normalisation of the images that it was trained on."""

    state: dict[str, Tensor]
    origin: str
    mean: tuple[float, ...] | None = None
    """Mean of each channel that the training images were normalised by; None if unknown."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; None if unknown."""


def load_weights(model: nn.Module, config: ModelConfig, num_classes: int, data: DataConfig | None = None) -> str | None:
    """Load the config's initial weights into a model; a head for other classes keeps its random weights.

    Args:
        model: a model from `build_model`, changed in place.
        config: `weights` is `default`, `imagenet`, torchvision's or timm's name of weights, a file (safetensors, or a
            state dict from `torch.save`), or a run folder; None loads nothing.
        num_classes: number of classes that the model was built for.
        data: normalisation of the images, which is compared with that of the weights; None compares nothing.

    Returns:
        A sentence about what was loaded, and about a different normalisation; None if nothing was loaded.

    Raises:
        LocalGradError: the weights do not exist, cannot be downloaded or read, or belong to another network.
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
    """Whether a weight belongs to an auxiliary classifier of torchvision's Inception or GoogLeNet."""
    return name.startswith(("AuxLogits.", "aux1.", "aux2."))


def _is_head(model: nn.Module, name: str, num_classes: int) -> bool:
    """Whether a module has a weight with one row per class, as the head (a linear layer or convolution) has."""
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
    except OSError as error:  # from urllib or the hub's client: no network, and not in the cache
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
    except Exception as error:  # of many classes, for a broken file or one that holds code
        if isinstance(error, UnpicklingError) and is_zipfile(path):  # written by PyTorch, with more than tensors in it
            raise LocalGradError(
                f"--model.weights {path} holds a whole model or other objects, which are not loaded from a file: save "
                "`model.state_dict()` instead"
            ) from error
        said = " ".join(str(error).split())[:160]
        raise LocalGradError(f"--model.weights {path} is no file of weights ({said})") from error
    for key in ("state_dict", "model"):  # many training programs wrap the state dict under such a key
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
