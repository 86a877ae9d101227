"""Train any PyTorch network as gradient-isolated blocks, with local losses and momentum auxiliary networks."""

from typing import TYPE_CHECKING, Any

from localgrad.core.block import Block
from localgrad.core.isolation import Isolation, isolate
from localgrad.core.momentum import man, manpp
from localgrad.core.site import Site
from localgrad.core.split import split
from localgrad.core.step import local_step
from localgrad.core.units import units
from localgrad.errors import LocalGradError as LocalGradError
from localgrad.objectives.auglocal import auglocal
from localgrad.objectives.barlow import barlow
from localgrad.objectives.classifier import classifier
from localgrad.objectives.dense import dense
from localgrad.objectives.dgl import dgl
from localgrad.objectives.infopro import infopro
from localgrad.objectives.predsim import predsim
from localgrad.objectives.readout import readout

if TYPE_CHECKING:
    from localgrad.planning.plan import plan

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
]


def __getattr__(name: str) -> Any:
    """`plan`, which is imported when it is first asked for: it brings the counters of torch, half a second."""
    if name == "plan":
        from localgrad.planning.plan import plan

        return plan
    raise AttributeError(f"module 'localgrad' has no attribute {name!r}")
