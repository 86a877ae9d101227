"""Train any PyTorch network as gradient-isolated blocks, with local losses and momentum auxiliary networks."""

from __future__ import annotations

from importlib import import_module

from localgrad.errors import LocalGradError as LocalGradError

TYPE_CHECKING = False  # type checkers know this name; importing `typing` takes longer than the rest of this file
if TYPE_CHECKING:
    from typing import Any

    from localgrad.core.block import Block
    from localgrad.core.isolation import Isolation, isolate
    from localgrad.core.man import man, manpp
    from localgrad.core.site import Site
    from localgrad.core.split import split
    from localgrad.core.step import local_step
    from localgrad.core.units import units
    from localgrad.objectives.auglocal import auglocal
    from localgrad.objectives.barlow import barlow
    from localgrad.objectives.classifier import classifier
    from localgrad.objectives.dense import dense
    from localgrad.objectives.dgl import dgl
    from localgrad.objectives.infopro import infopro
    from localgrad.objectives.predsim import predsim
    from localgrad.objectives.readout import readout
    from localgrad.planning.plan import plan
    from localgrad.runs.load import load_run

__version__ = "0.1.0"


__all__ = [
    "units",
    "split",
    "isolate",
    "local_step",
    "Block",
    "Isolation",
    "Site",
    "classifier",
    "predsim",
    "dgl",
    "infopro",
    "auglocal",
    "dense",
    "readout",
    "barlow",
    "man",
    "manpp",
    "plan",
    "load_run",
]

_HOMES = {
    "core.block": "Block",
    "core.isolation": "Isolation isolate",
    "core.man": "man manpp",
    "core.site": "Site",
    "core.split": "split",
    "core.step": "local_step",
    "core.units": "units",
    "planning.plan": "plan",
    "runs.load": "load_run",
    **{
        f"objectives.{name}": name
        for name in ["auglocal", "barlow", "classifier", "dense", "dgl", "infopro", "predsim", "readout"]
    },
}
"""Module of each public name, imported at the first access: importing PyTorch takes seconds, a help text needs none."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            value = getattr(import_module(f"localgrad.{home}"), name)
            globals()[name] = value
            return value
    if name == "models":
        return import_module("localgrad.models")
    raise AttributeError(f"module 'localgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "models"})
