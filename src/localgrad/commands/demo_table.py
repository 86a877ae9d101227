"""The demo: one small network trained end-to-end, with DGL, and with DGL+MAN, compared in a table."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from localgrad.commands.demo_time import predicted_seconds
from localgrad.commands.parse import tell
from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.recipes import recipe
from localgrad.results.cells import check_seeds
from localgrad.results.names import network_label
from localgrad.results.read import FinishedRun, read_results
from localgrad.results.tables import Row, Table, mean_std, mebibytes_text, parameters_text, seconds_text, tables
from localgrad.results.terminal import print_table
from localgrad.runs.files import write_json
from localgrad.runs.folder import RunFolder
from localgrad.training.outlook import duration

RECIPES = ("digits-e2e", "digits-dgl", "digits-dgl-man")


def run_demo(
    folder: Path,
    *,
    epochs: int | None,
    train_limit: int | None,
    seeds: Sequence[int],
    say: Callable[[str], None] = print,
) -> Table:
    """Train the three rows with every seed. Finished runs in the folder are kept, unfinished runs are resumed.

    Args:
        folder: folder for the run folders, such as `digits-dgl-seed0`.
        epochs: training epochs; None takes those of the recipes.
        train_limit: number of training images; None takes that of the recipes.
        seeds: every row runs once with each seed.
        say: called with the predicted time.

    Returns:
        The table of three rows, with one run for each seed.

    Raises:
        LocalGradError: the folder holds a demo with other settings.
        KeyboardInterrupt: interrupted; the same call continues from the checkpoint.
    """
    configs = [validate(_config(name, epochs, train_limit, seed)) for seed in seeds for name in RECIPES]
    folders = [folder / f"{config.name}-seed{config.seed}" for config in configs]
    waiting = [config for config, path in zip(configs, folders, strict=True) if not RunFolder(path).is_finished]
    if waiting:
        say("times a few steps of each training first, to say how long they take here")
        say(f"about {duration(predicted_seconds(waiting))} to the end on this machine")
    runs = [_finished(path, config) for config, path in zip(configs, folders, strict=True)]
    return Table(tuple(row for table in tables(runs) for row in table.rows))


def _config(name: str, epochs: int | None, train_limit: int | None, seed: int) -> TrainConfig:
    config = recipe(name).config
    data = replace(config.data, train_limit=train_limit or config.data.train_limit)
    return replace(config, seed=seed, data=data, optim=replace(config.optim, epochs=epochs or config.optim.epochs))


def _finished(folder: Path, config: TrainConfig) -> FinishedRun:
    """The finished run in this folder; trains it, or resumes it, if it is not finished."""
    from localgrad.training.trainer import fit

    run = RunFolder(folder)
    if not run.is_finished:
        fit(config, folder, resume=(folder / "config.json").exists())
    elif to_dict(run.config()) != to_dict(with_defaults(config)):
        raise LocalGradError(f"{folder} holds a demo of other settings; give another --run-dir, or remove it")
    found = read_results(folder, lambda problem: print(f"localgrad: {problem}", file=sys.stderr)).runs
    if not found:
        raise LocalGradError(f"{folder} has no result that can be read; remove it, or give another --run-dir")
    return found[0]


def show(table: Table) -> None:
    """Print the table of the demo."""
    print_table(
        ["training", "blocks", "test error %", "peak memory", "s/step", "parameters"],
        [_cells(row) for row in table.rows],
        title=f"scikit-learn's digits, the same {network_label(table.config)} three times",
        note="It shows that it works, not which method is better: 360 test images are too few for that. "
        "Test error: mean ± standard deviation (number of seeds). Peak memory: tensors that one step makes, "
        "mostly activations. Parameters: of the network, + of auxiliary networks, there only during training.",
        narrow=[0, 2, 3],
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        str(row.num_blocks),
        f"{mean_std(row.values('test_error'))} ({len(row.runs)})",
        f"{mebibytes_text(row.peak_memory_bytes)} MiB",
        seconds_text(row.seconds_per_step),
        parameters_text(row),
    )


def main(
    folder: Path, *, epochs: int | None = None, train_limit: int | None = None, seeds: Sequence[int] = (0, 1, 2)
) -> None:
    """Train, print the table, write `curves.png` and `table.json` into the folder."""
    for name, value in (("epochs", epochs), ("train_limit", train_limit)):
        if value is not None and value < 1:
            raise LocalGradError(f"{name} is {value}: it must be at least 1")
    check_seeds(seeds)
    from localgrad.results.figures import learning_curves, save_png

    table = run_demo(folder, epochs=epochs, train_limit=train_limit, seeds=seeds, say=tell)
    results = {row.label: [asdict(run.result) for run in row.runs] for row in table.rows}
    write_json(folder / "table.json", results)
    if drawn := learning_curves(table):
        save_png(drawn.figure, folder / "curves.png")
    show(table)
    print(f"learning curves: {folder / 'curves.png'}")
