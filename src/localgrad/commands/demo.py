"""Train one small ResNet on scikit-learn's digits end-to-end, with DGL, and with DGL+MAN, three seeds each.

Prints a table, and writes it to table.json and the learning curves to curves.png. It downloads nothing and takes less
than three minutes on two cores.

Examples:
  localgrad demo --run-dir runs/demo
  localgrad demo --seeds 0 --epochs 3
"""

from collections.abc import Sequence
from pathlib import Path

from localgrad.commands.parse import call, loading, tell
from localgrad.runs.files import check_writable


def demo(
    *,
    run_dir: Path = Path("runs/demo"),
    epochs: int | None = None,
    train_limit: int | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> int:
    """Train the networks, print the table and draw the curves.

    Args:
        run_dir: Folder for the runs, the plot and the table; runs that are finished in it are not repeated.
        epochs: Training epochs; by default those of the recipes.
        train_limit: Number of training images, balanced over the classes.
        seeds: Seeds of the initial weights, the order of the images and the augmentation; three runs for each seed.
    """
    check_writable(run_dir, "--run-dir")
    tell(
        f"trains one small network three ways, {len(seeds)} seed{'s' * (len(seeds) != 1)} each, on digits that need no "
        f"download; about {_minutes(epochs, len(seeds))} on two cores"
    )
    with loading():
        from localgrad.commands.demo_table import main as run

    try:
        run(run_dir, epochs=epochs, train_limit=train_limit, seeds=seeds)
    except KeyboardInterrupt as interruption:
        tell(f"{str(interruption) or 'interrupted'}; the same command goes on from there")
        return getattr(interruption, "exit_code", 130)
    return 0


SECONDS_PER_EPOCH = 2.2
"""Seconds per epoch of one run on two cores: 3 seeds of 3 runs of 8 epochs take less than three minutes."""
DEMO_EPOCHS = 8


def _minutes(epochs: int | None, seeds: int) -> str:
    seconds = SECONDS_PER_EPOCH * (epochs or DEMO_EPOCHS) * 3 * seeds
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(10, 10 * round(seconds / 10))} seconds"


def main(arguments: Sequence[str]) -> int:
    """`localgrad demo`."""
    return call(demo, arguments, "localgrad demo", __doc__)
