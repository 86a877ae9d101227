"""What a finished run learnt, for use elsewhere: `model, classes, transform = localgrad.load_run("runs/first")`."""

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
    """What `load_run` gives."""

    model: nn.Module
    """The trained network, on the CPU, in evaluation mode."""
    classes: list[str]
    """Names of the classes, in the order of its scores; their numbers where the images have no names."""
    transform: Transform
    """Makes an input of the network from an image: `model(transform("cat.jpg")[None]).softmax(1)`."""


def load_run(run_dir: str | Path, *, best: bool = False) -> LoadedRun:
    """The network that a finished run trained, its classes, and how to prepare an image for it.

    Args:
        run_dir: the run folder.
        best: take the weights of the best epoch, which `--keep-best` keeps, instead of the last one's.

    Raises:
        LocalGradError: the folder holds no finished run, or a file in it is damaged.
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
    """What `model.safetensors` says of itself, as JSON under `localgrad`, so that the file alone can be used.

    It is one text, for safetensors writes several in any order, and equal runs have equal files.

    Args:
        config: of the run.
        result: of the same run.
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
