"""The methods by name: objectives and momentum networks, with their options."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from localgrad.config.schema import MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.core.momentum import man, manpp
from localgrad.errors import closest
from localgrad.objectives.auglocal import auglocal
from localgrad.objectives.classifier import classifier
from localgrad.objectives.dgl import dgl
from localgrad.objectives.infopro import infopro
from localgrad.objectives.predsim import predsim

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "classifier": classifier,
    "predsim": predsim,
    "dgl": dgl,
    "infopro": infopro,
    "auglocal": auglocal,
}


MOMENTA: dict[str, Callable[..., Any]] = {"man": man, "manpp": manpp}


_CHOICES: dict[str, dict[str, Callable[..., Any]]] = {"objective": OBJECTIVES, "momentum": MOMENTA}


_FROM_DATA = ("num_classes", "mean", "std")


def option_problems(kind: str, chosen: ObjectiveConfig | MomentumConfig) -> list[str]:
    """What is wrong with the choice of an objective or momentum network and its options, a sentence each."""
    given = [name for name, value in vars(chosen).items() if value is not None and name != "name"]
    if chosen.name == "none":
        return [f"{kind}.{name} is given, but {kind}.name is none" for name in given]
    choices = _CHOICES[kind]
    if chosen.name not in choices:
        allowed = ", ".join(["none", *choices])
        return [f"{kind}.name is {chosen.name!r}{closest(chosen.name, list(choices))}, it must be one of {allowed}"]
    allowed_options = _options(choices[chosen.name])
    return [
        f"{kind}.{name} is given, but {chosen.name} has no such option, it has {', '.join(allowed_options) or 'none'}"
        for name in given
        if name not in allowed_options
    ]


def _options(factory: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(factory).parameters if name not in _FROM_DATA]


def with_defaults(config: TrainConfig) -> TrainConfig:
    """The config with every option of its objective and momentum network written out."""
    return replace(
        config,
        objective=_with_defaults(config.objective, OBJECTIVES),
        momentum=_with_defaults(config.momentum, MOMENTA),
    )


def _with_defaults(chosen: Any, choices: dict[str, Callable[..., Any]]) -> Any:
    if chosen.name == "none":
        return chosen
    parameters = inspect.signature(choices[chosen.name]).parameters
    missing = [name for name, value in vars(chosen).items() if value is None and name in parameters]
    defaults = {name: parameters[name].default for name in missing}
    return replace(chosen, **{name: value for name, value in defaults.items() if value is not inspect.Parameter.empty})
