"""TODO commands.demo."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import parse

DEMO_HELP = """Train one small ResNet on scikit-learn's digits end-to-end, with DGL, and with DGL+MAN, three seeds each.

Prints a table, and writes it (table.json) and the learning curves (curves.png). No download, under three minutes on
two cores.

Example:
  localgrad demo --run-dir runs/demo
  localgrad demo --seeds 0 --epochs 3
"""


def demo(arguments: Sequence[str]) -> int:
    """`localgrad demo`."""
    import tyro

    @dataclass(frozen=True)
    class Demo:
        run_dir: Path = Path("runs/demo")
        """Folder for the runs, the plot and the table; what is finished in it is not run again."""
        epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Passes over the images; the recipes' own unless given."""
        train_limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """Train on so many images only, evenly from each class."""
        seeds: tuple[int, ...] = (0, 1, 2)
        """Seeds, three runs each; a seed decides initial weights, order of the images and augmentation."""

    options = parse(Demo, arguments, "localgrad demo", DEMO_HELP)
    from localgrad.commands.demo_table import main as run

    try:
        run(options.run_dir, epochs=options.epochs, train_limit=options.train_limit, seeds=options.seeds)
    except KeyboardInterrupt as interruption:
        said = str(interruption) or "interrupted"
        print(f"localgrad: {said}; the same command goes on from there", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    return 0
