"""TODO commands.reproduce."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import parse

REPRODUCE_HELP = """Run the rows of a table, each for every seed, and print them beside the paper's values.

Without a table it lists them. What is done is not run again and what is half done goes on, after Ctrl-C too. The output
folder gets one ROW-seedN.json a run; the run folders are in its subfolder runs/.

Examples:
  localgrad reproduce
  localgrad reproduce digits --seeds 0 1 2 --jobs 2
  localgrad reproduce first --data path/to/cifar10 --epochs 10 --warmup-epochs 2 --output results/first-10
  localgrad reproduce first --rows cifar10-resnet32-k16-dgl --dry-run
"""


def reproduce(arguments: Sequence[str]) -> int:
    """`localgrad reproduce [TABLE]`."""
    import tyro

    number = tyro.conf.arg(metavar="INT")

    @dataclass(frozen=True)
    class Reproduce:
        table: tyro.conf.Positional[str] = ""
        """Name of the table; without one, the tables are listed."""
        seeds: tuple[int, ...] = (0,)
        """Seeds, one run each of every row."""
        rows: tuple[str, ...] = ()
        """Only these rows of the table, by their full names."""
        output: Path | None = None
        """Folder for results and runs; results/TABLE unless given."""
        jobs: int = 1
        """Runs at the same time; the processor's threads are divided between them, and GPUs given out in turn."""
        dry_run: bool = False
        """Print what would be run, and stop."""
        data: str | None = None
        """Hub name or folder of the images, instead of the recipes'."""
        train_limit: Annotated[int | None, number] = None
        """Train on so many images only, evenly from each class."""
        test_limit: Annotated[int | None, number] = None
        """Test on so many images only, evenly from each class."""
        test_split: str | None = None
        """Split to test on, instead of the recipes'."""
        epochs: Annotated[int | None, number] = None
        """Passes over the images, instead of the recipes'."""
        warmup_epochs: Annotated[int | None, number] = None
        """Epochs of warm-up, instead of the recipes'; a short run wants fewer."""
        batch_size: Annotated[int | None, number] = None
        """Images an optimizer step, instead of the recipes'."""
        lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
        """Learning rate at the top of the cosine, instead of the recipes'."""
        evaluate_every: Annotated[int | None, number] = None
        """Epochs between two evaluations, instead of every one."""
        checkpoint_every: Annotated[int | None, number] = None
        """Optimizer steps between two checkpoints, besides the one after each epoch."""
        local_heads: bool = False
        """Evaluate each block's own head too."""
        accelerator: str | None = None
        """Device: auto, cpu, cuda or mps."""
        precision: str | None = None
        """Precision: auto, 32-true or bf16-mixed."""

    options = parse(Reproduce, arguments, "localgrad reproduce", REPRODUCE_HELP)
    from localgrad.recipes.tables import TABLES

    if not options.table:
        from localgrad.results.terminal import print_table

        listed = [(name, str(len(each.rows)), each.title) for name, each in TABLES.items()]
        print_table(["table", "rows", "what is compared"], listed, left=[0, 2])
        return 0
    from localgrad.results.reproduce import plan_cells, run_cells, show_table

    changes = {
        "data.source": options.data,
        "data.train_limit": options.train_limit,
        "data.test_limit": options.test_limit,
        "data.test_split": options.test_split,
        "optim.epochs": options.epochs,
        "optim.warmup_epochs": options.warmup_epochs,
        "optim.batch_size": options.batch_size,
        "optim.lr": options.lr,
        "evaluate_every": options.evaluate_every,
        "checkpoint_every": options.checkpoint_every,
        "local_heads": options.local_heads or None,
        "accelerator": options.accelerator,
        "precision": options.precision,
    }
    output = options.output or Path("results", options.table)
    given = {name: value for name, value in changes.items() if value is not None}
    cells = plan_cells(options.table, seeds=options.seeds, changes=given, output=output, rows=options.rows)
    if options.dry_run:
        for cell in cells:
            print(f"{cell.state:7}  localgrad {shlex.join(cell.command)}")
        return 0
    failures = run_cells(cells, jobs=options.jobs)
    show_table(options.table, output)
    for name, reason in failures.items():
        print(f"localgrad: {name} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0
