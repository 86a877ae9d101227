"""The methods that a config can name: objectives and momentum networks, with their options and labels."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from localgrad.config.networks import located_model
from localgrad.config.schema import MomentumConfig, ObjectiveConfig, TrainConfig
from localgrad.core.man import man, manpp
from localgrad.data.sources import located
from localgrad.errors import closest
from localgrad.objectives.auglocal import auglocal
from localgrad.objectives.classifier import classifier
from localgrad.objectives.dgl import dgl
from localgrad.objectives.infopro import infopro
from localgrad.objectives.predsim import predsim

LARGE_IMAGES = 96
"""Image size in pixels above which planning assumes an ImageNet network, whose features are wide."""


@dataclass(frozen=True)
class Method:
    """An objective or a momentum network: its factory, its label, and its options for planning.

    Attributes:
        factory: function of the options that returns the objective or the momentum network.
        label: name in tables and charts.
        planned: options without a default, with the values that planning uses.
        large_images: options that planning uses above `LARGE_IMAGES` pixels, where features are wide.
    """

    factory: Callable[..., Any]
    label: str
    planned: dict[str, Any] = field(default_factory=dict)
    large_images: dict[str, Any] = field(default_factory=dict)


OBJECTIVES: dict[str, Method] = {
    "classifier": Method(classifier, "Greedy"),
    "predsim": Method(predsim, "PredSim"),
    "dgl": Method(dgl, "DGL", large_images={"head": "light"}),
    "infopro": Method(infopro, "InfoPro", planned={"task": (0.5, 0.5)}, large_images={"head": "imagenet"}),
    "auglocal": Method(auglocal, "AugLocal"),
}
"""The objectives by their names in a config, in the order of tables."""

MOMENTA: dict[str, Method] = {"man": Method(man, "MAN"), "manpp": Method(manpp, "MAN++")}
"""The momentum auxiliary networks by their names in a config, in the order of tables."""

DEFAULT_OBJECTIVE = "dgl"
"""The local loss that plans and memory advice use if the user names none."""

_CHOICES: dict[str, dict[str, Method]] = {"objective": OBJECTIVES, "momentum": MOMENTA}


_FROM_DATA = ("num_classes", "mean", "std", "criterion")


def option_problems(kind: str, chosen: ObjectiveConfig | MomentumConfig) -> list[str]:
    """Problems with the name of an objective or momentum network and its options, one sentence each.

    Args:
        kind: "objective" or "momentum".
        chosen: its part of the config.
    """
    given = [name for name, value in vars(chosen).items() if value is not None and name != "name"]
    if chosen.name == "none":
        return [f"{kind}.{name} is given, but {kind}.name is none" for name in given]
    choices = _CHOICES[kind]
    if chosen.name not in choices:
        allowed = ", ".join(["none", *choices])
        return [f"{kind}.name is {chosen.name!r}{closest(chosen.name, list(choices))}, it must be one of {allowed}"]
    allowed_options = _options(choices[chosen.name].factory)
    return [
        f"{kind}.{name} is given, but {chosen.name} has no such option, it has {', '.join(allowed_options) or 'none'}"
        for name in given
        if name not in allowed_options
    ]


def _options(factory: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(factory).parameters if name not in _FROM_DATA]


def with_defaults(config: TrainConfig) -> TrainConfig:
    """The config with defaults filled in for options of objective and momentum, and with absolute paths."""
    return replace(
        config,
        data=located(config.data),
        model=located_model(config.model),
        objective=_with_defaults(config.objective, OBJECTIVES),
        momentum=_with_defaults(config.momentum, MOMENTA),
    )


def _with_defaults(chosen: Any, choices: dict[str, Method]) -> Any:
    if chosen.name not in choices:  # "none", or a method of another version
        return chosen
    parameters = inspect.signature(choices[chosen.name].factory).parameters
    missing = [name for name, value in vars(chosen).items() if value is None and name in parameters]
    defaults = {name: parameters[name].default for name in missing}
    return replace(chosen, **{name: value for name, value in defaults.items() if value is not inspect.Parameter.empty})


def planned_objective(name: str, image_size: int) -> ObjectiveConfig:
    """The config of an objective for planning: its default options, and the head for this image size."""
    method = OBJECTIVES[name]
    large = method.large_images if image_size > LARGE_IMAGES else {}
    return _with_defaults(ObjectiveConfig(name, **method.planned, **large), OBJECTIVES)


def method_label(config: TrainConfig) -> str:
    """Name of a config's method as in the papers, such as `DGL + MAN (EMA only)`; `End-to-end` without an objective."""
    objective, momentum = config.objective, config.momentum
    name = OBJECTIVES[objective.name].label if objective.name in OBJECTIVES else objective.name
    name = "End-to-end" if objective.name == "none" else name
    if momentum.name != "none":
        name += f" + {MOMENTA[momentum.name].label if momentum.name in MOMENTA else momentum.name}"
    decay, parts = momentum.decay, config.optim.accumulate
    details = [
        "bias only" if momentum.ema is False else "",
        "EMA only" if momentum.bias is False else "",
        momentum.form if momentum.form in ("fused", "residual") else "",
        "direct use" if decay == 0 else "" if decay in (None, 0.995) else f"decay {decay:g}",
        "random start" if momentum.initial == "random" else "",
        f"depth {momentum.depth}" if (momentum.depth or 1) > 1 else "",
        "1x1 bias" if momentum.bias_form == "conv1x1" else "",
        f"pooled {momentum.pool}" if (momentum.pool or 1) > 1 else "",
        f"d={objective.depth}" if objective.depth else "",
        f"head pooled {objective.pool}" if (objective.pool or 1) > 1 else "",
        f"reach {config.reach}" if config.reach > 1 else "",
        "checkpointed" if config.recompute else "",
        "auxiliary networks checkpointed" if momentum.recompute else "",
        f"{parts} micro-batches" if parts > 1 else "",
        "block by block" if config.step_each_block else "",
        "CUDA graph" if config.cuda_graph else "",
    ]
    said = ", ".join(filter(None, details))
    return f"{name} ({said})" if said else name


def method_order(config: TrainConfig) -> tuple[int, int]:
    """Sort key of a method in tables: end-to-end first, then the order of the methods above, unknown methods last."""
    objectives, momenta = ["none", *OBJECTIVES], ["none", *MOMENTA]
    objective, momentum = config.objective.name, config.momentum.name
    return (
        objectives.index(objective) if objective in objectives else len(objectives),
        momenta.index(momentum) if momentum in momenta else len(momenta),
    )
