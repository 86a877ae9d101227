"""Train any PyTorch network as gradient-isolated blocks, with local losses and momentum auxiliary networks."""

from localgrad.blocks import Block, Site, split
from localgrad.errors import LocalGradError as LocalGradError
from localgrad.momentum import man, manpp
from localgrad.objectives.classifier import classifier
from localgrad.objectives.dgl import dgl
from localgrad.objectives.infopro import infopro
from localgrad.objectives.predsim import predsim
from localgrad.planning import plan
from localgrad.step import local_step
from localgrad.units import units

__version__ = "0.1.0"
__all__ = [
    "units",
    "split",
    "local_step",
    "Block",
    "Site",
    "classifier",
    "predsim",
    "dgl",
    "infopro",
    "man",
    "manpp",
    "plan",
]
