"""What the report calls things: sets of images, networks, runs, and the command that makes a run again."""

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
"""The recipes' sets of images by the first word of a recipe's name."""


def dataset_label(config: TrainConfig) -> str:
    """The recipe's set of images where the source is called like it; otherwise the source's last part."""
    recipes_set, own = config.name.partition("-")[0], config.data.name or last_part(config.data.source)
    if recipes_set in DATASETS and _is_called(recipes_set, config.data.name or config.data.source):
        return DATASETS[recipes_set]
    if recipes_set == own == "digits":
        return "digits (own images)"
    return DATASETS.get(own, own)


def _is_called(recipes_set: str, source: str) -> bool:
    """Whether a path or hub name is that of a recipe's set: `data/cifar-10-python` of `cifar10`, but not `cifar100`."""
    if recipes_set == "digits":  # they come with scikit-learn and are nowhere else
        return source == "digits"
    word = re.sub(r"(?<=[a-z])(?=\d)", "[-_ ]?", recipes_set)
    end = "(?![0-9])" if recipes_set[-1].isdigit() else "(?![a-z])"
    return re.search(word + end, last_part(source).lower()) is not None


def last_part(path: str) -> str:
    """The last part of a path or hub name."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or path


def network_label(config: TrainConfig) -> str:
    """The network's name, with its depth where that is no part of it."""
    name = config.model.name
    return f"ResNet-{config.model.depth}" if name == "cifar_resnet" else name.partition(":")[2] or name


def where(config: TrainConfig) -> str:
    """Images and network."""
    return f"{dataset_label(config)}, {network_label(config)}"


def run_label(config: TrainConfig, num_blocks: int) -> str:
    """Method and number of blocks."""
    return method_label(config) + (f", {num_blocks} blocks" if num_blocks > 1 else "")


@cache
def recipe_of(config: TrainConfig) -> Recipe | None:
    """The recipe that a config came from; None where that is no recipe of this version."""
    make = RECIPES.get(config.name)
    return make() if make else None


def command(config: TrainConfig) -> str:
    """The `localgrad train` that makes a run again; a folder of images is `path/to/NAME` in it."""
    made = recipe_of(config)
    name, start = (config.name, made.config) if made else ("RECIPE", TrainConfig())
    ours, theirs = (flat(to_dict(with_defaults(each))) for each in (config, start))
    flags = [_flag(field, value) for field, value in ours.items() if value != theirs.get(field) and field != "name"]
    return " ".join(["localgrad train", name, *flags])


def _flag(name: str, value: Any) -> str:
    """A field as a flag of the command line."""
    parent, _, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{parent}{'.' * bool(parent)}{'' if value else 'no-'}{last}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name.replace('_', '-')}", *(shlex.quote(_without_folder(str(each))) for each in values)])


def without_paths(command: str) -> str:
    """A command with `path/to/NAME` for every absolute path, which means nothing on another machine."""
    try:
        return shlex.join(map(_without_folder, shlex.split(command)))
    except ValueError:  # an unfinished quotation
        return command


def _without_folder(word: str) -> str:
    """`path/to/NAME` for an absolute path of any system."""
    absolute = PurePosixPath(word).is_absolute() or PureWindowsPath(word).is_absolute()
    return f"path/to/{last_part(word)}" if absolute else word


def device_text(device: str) -> str:
    """A device as a page calls it: `2 threads` where the file has `2 thread(s)`."""
    return device.replace("1 thread(s)", "1 thread") if device.endswith(" 1 thread(s)") else device.replace("(s)", "s")
