"""Train every row of a table with every seed, and print the results beside the paper's values.

Without a table, it lists the tables. Run the same command again to continue, also after Ctrl-C: finished runs are not
repeated, unfinished runs are resumed. Each finished run writes ROW-seedN.json into the output folder. The run folders
are in its subfolder runs/.

Examples:
  localgrad reproduce
  localgrad reproduce digits --seeds 0 1 2 --jobs 2
  localgrad reproduce first --data path/to/cifar10 --epochs 10 --warmup-epochs 2 --output results/first-10
  localgrad reproduce first --rows cifar10-resnet32-k16-dgl --dry-run
"""

import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from localgrad.commands.parse import Output, call, loading, tell
from localgrad.runs.files import check_writable


def reproduce(
    table: Positional[str] = "",
    *,
    seeds: tuple[int, ...] = (0,),
    rows: tuple[str, ...] = (),
    output: Output = None,
    jobs: int = 1,
    dry_run: bool = False,
    data: str | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    test_split: str | None = None,
    epochs: int | None = None,
    warmup_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    local_heads: bool = False,
    accelerator: str | None = None,
    precision: str | None = None,
) -> int:
    """Run and print the table.

    Args:
        table: Name of the table; without it, the tables are listed.
        seeds: Seeds; every row runs once with each seed.
        rows: Run only these rows of the table, given by their full names.
        output: Folder for results and runs; by default results/TABLE.
        jobs: Number of runs at the same time. They share the CPU threads, and GPUs are assigned in turn.
        dry_run: Print the state and the command of each run, and stop.
        data: Folder or hub name of the images, instead of the recipes'.
        train_limit: Number of training images, balanced over the classes.
        test_limit: Number of test images, balanced over the classes.
        test_split: Split to test on, instead of the recipes'.
        epochs: Training epochs, instead of the recipes'.
        warmup_epochs: Epochs of warm-up, instead of the recipes'; a short run needs fewer.
        batch_size: Images per optimizer step, instead of the recipes'.
        lr: Peak learning rate of the cosine schedule, instead of the recipes'.
        evaluate_every: Evaluate after every so many epochs; by default after every epoch.
        checkpoint_every: Also save a checkpoint after every so many optimizer steps, besides the one after each epoch.
        local_heads: Evaluate each block's own head too.
        accelerator: Device: auto, cpu, cuda or mps.
        precision: Precision: auto, 32-true or bf16-mixed.
    """
    if not table:
        return _list()
    folder = output or Path("results", table)
    if not dry_run:
        check_writable(folder)
    with loading():
        from localgrad.results.cells import plan_cells
        from localgrad.results.reproduce import run_cells
        from localgrad.results.reproduce_table import show_table

    changes = {
        "data.source": data,
        "data.train_limit": train_limit,
        "data.test_limit": test_limit,
        "data.test_split": test_split,
        "optim.epochs": epochs,
        "optim.warmup_epochs": warmup_epochs,
        "optim.batch_size": batch_size,
        "optim.lr": lr,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "local_heads": local_heads or None,
        "accelerator": accelerator,
        "precision": precision,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    cells = plan_cells(table, seeds=seeds, changes=given, output=folder, rows=rows)
    if dry_run:
        for cell in cells:
            print(f"{cell.state:7}  localgrad {shlex.join(cell.command)}")
        return 0
    failures = run_cells(cells, jobs=jobs)
    show_table(table, folder)
    _tell_failures(failures)
    return 1 if failures else 0


def _list() -> int:
    from localgrad.recipes.tables import TABLES
    from localgrad.results.terminal import print_table

    listed = [(name, str(len(each.rows)), each.title) for name, each in TABLES.items()]
    print_table(["table", "rows", "what is compared"], listed, left=[0, 2])
    return 0


def _tell_failures(failures: dict[str, str]) -> None:
    """Print why runs failed, each reason once."""
    by_reason = defaultdict[str, list[str]](list)
    for name, reason in failures.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        tell(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} failed: {reason}")


def main(arguments: Sequence[str]) -> int:
    """`localgrad reproduce [TABLE]`."""
    return call(reproduce, arguments, "localgrad reproduce", __doc__)
