"""Load a trained network for use elsewhere: `model, classes, transform = localgrad.load_run("runs/first")`."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import nn

from localgrad.config.networks import build_model
from localgrad.config.schema import TrainConfig
from localgrad.data.transform import Transform
from localgrad.errors import LocalGradError
from localgrad.runs.folder import RunFolder
from localgrad.runs.result import Result


class LoadedRun(NamedTuple):
    """The return value of `load_run`."""

    model: nn.Module
    """The trained network, on the CPU, in evaluation mode."""
    classes: list[str]
    """Names of the classes in the order of the network's outputs; class indices if the classes have no names."""
    transform: Transform
    """Function from an image to the network's input: `model(transform("cat.jpg")[None]).softmax(1)`."""


def load_run(run_dir: str | Path, *, best: bool = False) -> LoadedRun:
    """Load the network of a finished run, its classes, and the transform from an image to an input.

    Args:
        run_dir: the run folder.
        best: load the weights of the best epoch, which `--keep-best` saves, instead of those of the last epoch.

    Raises:
        LocalGradError: the folder holds no finished run, a file in it is damaged, or with `best` the run was trained
            without `--keep-best`.
    """
    folder = RunFolder(Path(run_dir))
    config = folder.config()
    count, names = folder.classes()
    if count is None:
        raise LocalGradError(f"{folder.path} holds no finished run that says its classes: train it to its end")
    model = build_model(config.model, count)
    folder.load_model(model, best=best)
    classes = list(names) if names else [str(number) for number in range(count)]
    return LoadedRun(model.eval(), classes, Transform(config.data))


def weights_metadata(config: TrainConfig, result: Result) -> dict[str, str]:
    """Metadata of `model.safetensors` that make the file usable alone: network, classes and preparation of images.

    They are one JSON text under the key `localgrad`. Safetensors writes several keys in any order, and equal runs shall
    have equal files.

    Args:
        config: the config of the run.
        result: the result of the run.
    """
    data = config.data
    said = {
        "version": result.versions["localgrad"],
        "network": config.model.name,
        "depth": config.model.depth if config.model.name == "cifar_resnet" else None,
        "num_classes": result.num_classes,
        "classes": result.class_names,
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "resize": data.resize,
    }
    return {"localgrad": json.dumps({name: value for name, value in said.items() if value is not None})}
