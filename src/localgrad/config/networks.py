"""Build networks by name: built-in, torchvision's, timm's, or a user's function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from localgrad.config.schema import ModelConfig
from localgrad.config.weights import freeze, import_timm
from localgrad.errors import LocalGradError, closest
from localgrad.models import cifar_resnet, small_stem

KINDS = "cifar_resnet, torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """A network with random weights; parameters of the modules in `config.freeze` require no gradient.

    Args:
        config: name and options of the network. `package.module:factory` and `file.py:factory` are called with
            `num_classes=`, or without arguments if the function does not take it.
        num_classes: width of the output.

    Raises:
        LocalGradError: there is no network of this name, timm is needed and not installed, a user's function fails,
            or a module to freeze does not exist.
    """
    model = _fresh(config, num_classes)
    freeze(model, config.freeze)
    return model


def _fresh(config: ModelConfig, num_classes: int) -> nn.Module:
    if config.small_stem and not config.name.startswith("torchvision:"):
        raise LocalGradError(f"model.small_stem is on and model.name {config.name}: it takes a torchvision ResNet")
    if config.name == "cifar_resnet":
        return cifar_resnet(config.depth, num_classes=num_classes)
    library, colon, name = config.name.rpartition(":")
    if library == "torchvision":
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        _check_name(name, names, library)
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        return small_stem(model) if config.small_stem else model
    if library == "timm":
        timm = import_timm(config.name)
        _check_name(name.partition(".")[0], timm.list_models(), library)
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
    if not colon or not library or not name.isidentifier():
        raise LocalGradError(f"--model.name is {config.name!r}: give {KINDS}")
    return _call(_factory(library, name), config.name, num_classes)


def is_own(config: ModelConfig) -> bool:
    """Whether the network is built by a user's function."""
    return config.name.rpartition(":")[0] not in ("", "torchvision", "timm")


def _check_name(name: str, names: Sequence[str], library: str) -> None:
    if name not in names:
        raise LocalGradError(f"{library} has no model {name!r}{closest(name, names)}")


def located_model(config: ModelConfig) -> ModelConfig:
    """The config with absolute paths of files, so that it means the same in another working directory."""
    library, _, factory = config.name.rpartition(":")
    if library.endswith(".py"):
        config = replace(config, name=f"{_absolute(library)}:{factory}")
    if config.weights is not None and Path(config.weights).expanduser().exists():
        config = replace(config, weights=_absolute(config.weights))
    return config


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def _factory(where: str, name: str) -> Callable[..., Any]:
    module = _module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        have = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in have if getattr(vars(module)[key], "__module__", "") == module.__name__] or have
        raise LocalGradError(
            f"{where} has no function {name!r}{closest(name, own)}; it has {', '.join(own[:9]) or 'none'}"
        )
    return factory


def _module(where: str) -> ModuleType:
    """Import a user's module by its name (the working directory is searched too) or by its file."""
    try:
        if not where.endswith(".py"):
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            return importlib.import_module(where)
        path = Path(where).expanduser()
        if not path.is_file():
            raise LocalGradError(f"--model.name: there is no file {where}")
        name = f"_localgrad_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise LocalGradError(f"--model.name: {where} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pickle and dataclasses look the module up there
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # the file may import files beside it
        spec.loader.exec_module(module)
        return module
    except LocalGradError:
        raise
    except ModuleNotFoundError as error:
        hint = "" if where.endswith(".py") else "; run localgrad in its folder, or install it"
        raise LocalGradError(f"--model.name: {where} cannot be imported ({error}){hint}") from error
    except Exception as error:
        raise _failed(where, error) from error


def _call(factory: Callable[..., Any], name: str, num_classes: int) -> nn.Module:
    called = name
    try:
        accepted = inspect.signature(factory).parameters.values()
        takes = any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in accepted)
        called = f"{name}(num_classes={num_classes})" if takes else f"{name}()"
        model = factory(num_classes=num_classes) if takes else factory()
    except Exception as error:
        raise _failed(called, error) from error
    if not isinstance(model, nn.Module):
        raise LocalGradError(f"{name} gave a {type(model).__name__}: it must give a torch.nn.Module")
    return model


def _failed(name: str, error: Exception) -> LocalGradError:
    """The error for an exception from a user's code, with file and line where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    own = last.filename != __file__  # false if the call itself failed, before any line of the user's code ran
    return LocalGradError(f"{said} ({last.filename}, line {last.lineno})" if own else said)


def check_scores(model: nn.Module, name: str, image_size: int, num_classes: int) -> None:
    """Run a user's network on two zero images in evaluation mode, and check that its output is `(2, num_classes)`.

    Raises:
        LocalGradError: the network fails on images of this size, or returns something else.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            scores: Any = model(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        raise _failed(f"{name} on images of {image_size} x {image_size} pixels", error) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != (2, num_classes):
        raise LocalGradError(
            f"{name} gives {shape} for 2 images: it must give one score for each of the {num_classes} classes, "
            f"(2, {num_classes}); let the factory take num_classes"
        )
