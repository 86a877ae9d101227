"""Names in the report: data sets, networks and runs, and the command that repeats a run."""

import re
import shlex
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from localgrad.config.methods import method_label, with_defaults
from localgrad.config.saved import flat, to_dict
from localgrad.config.schema import TrainConfig
from localgrad.recipes import RECIPES, Recipe

DATASETS = {
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
    "stl10": "STL-10",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "digits": "Digits",
}
"""Data sets of the recipes, by the first word of the recipe's name."""


def dataset_label(config: TrainConfig) -> str:
    """The data set of the recipe if the name of the source matches it, otherwise the last part of the source."""
    recipes_set, own = config.name.partition("-")[0], config.data.name or last_part(config.data.source)
    if recipes_set in DATASETS and _is_called(recipes_set, config.data.name or config.data.source):
        return DATASETS[recipes_set]
    if recipes_set == own == "digits":
        return "digits (own images)"
    return DATASETS.get(own, own)


def _is_called(recipes_set: str, source: str) -> bool:
    """Whether a path or hub name matches a recipe's set: `data/cifar-10-python` matches `cifar10`, not `cifar100`."""
    if recipes_set == "digits":  # these images come with scikit-learn, not from a folder
        return source == "digits"
    word = re.sub(r"(?<=[a-z])(?=\d)", "[-_ ]?", recipes_set)
    end = "(?![0-9])" if recipes_set[-1].isdigit() else "(?![a-z])"
    return re.search(word + end, last_part(source).lower()) is not None


def last_part(path: str) -> str:
    """The last part of a path or hub name."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or path


def network_label(config: TrainConfig) -> str:
    """Name of the network, with the depth of a `cifar_resnet`."""
    name = config.model.name
    return f"ResNet-{config.model.depth}" if name == "cifar_resnet" else name.partition(":")[2] or name


def where(config: TrainConfig) -> str:
    """Data set and network."""
    return f"{dataset_label(config)}, {network_label(config)}"


def run_label(config: TrainConfig, num_blocks: int) -> str:
    """Method and number of blocks."""
    return method_label(config) + (f", {num_blocks} blocks" if num_blocks > 1 else "")


@cache
def recipe_of(config: TrainConfig) -> Recipe | None:
    """The recipe with the config's name; None if this version has no such recipe."""
    make = RECIPES.get(config.name)
    return make() if make else None


def command(config: TrainConfig) -> str:
    """The `localgrad train` command that repeats a run. An absolute path is written as `path/to/NAME`."""
    made = recipe_of(config)
    name, start = (config.name, made.config) if made else ("RECIPE", TrainConfig())
    ours, theirs = (flat(to_dict(with_defaults(each))) for each in (config, start))
    flags = [_flag(field, value) for field, value in ours.items() if value != theirs.get(field) and field != "name"]
    return " ".join(["localgrad train", name, *flags])


def _flag(name: str, value: Any) -> str:
    """A field of the config as a command-line flag."""
    parent, _, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{parent}{'.' * bool(parent)}{'' if value else 'no-'}{last}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name.replace('_', '-')}", *(shlex.quote(_without_folder(str(each))) for each in values)])


def without_paths(command: str) -> str:
    """A command with every absolute path, which is valid on one machine only, replaced by `path/to/NAME`."""
    try:
        return shlex.join(map(_without_folder, shlex.split(command)))
    except ValueError:  # an unclosed quotation mark
        return command


def _without_folder(word: str) -> str:
    """`path/to/NAME` for an absolute path of any operating system; other words unchanged."""
    absolute = PurePosixPath(word).is_absolute() or PureWindowsPath(word).is_absolute()
    return f"path/to/{last_part(word)}" if absolute else word


def device_text(device: str) -> str:
    """The name of a device for the page: `2 threads` for `2 thread(s)` in the file."""
    return device.replace("1 thread(s)", "1 thread") if device.endswith(" 1 thread(s)") else device.replace("(s)", "s")
