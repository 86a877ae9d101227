"""The parts of the report about one table: errors, curves, memory and time, local heads, commands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localgrad.results import figures
from localgrad.results.kinds import StepTimes
from localgrad.results.names import command, device_text, without_paths
from localgrad.results.page import Cell, Grid, Part, Picture, Studio, plain
from localgrad.results.read import File
from localgrad.results.tables import Row, Table, mebibytes_text, parameters_text, seconds_text, spread, step_key


def _paths(rows: Sequence[Row]) -> list[Path]:
    return [run.path for row in rows for run in row.runs]


def described(table: Table) -> str:
    """Data set, network and budget."""
    return f"{table.title} ({table.budget})"


def error_cell(row: Row) -> Cell:
    """Mean of the test error, with the standard deviation if there are several runs."""
    return Cell(
        spread(row.values("test_error")), strong=f"{row.mean('test_error'):.2f}", small=(f"n = {len(row.runs)}",)
    )


def command_id(detail: str, position: int) -> str:
    """Id of the cell with the command of a row."""
    return f"{detail}-command-{position}"


def errors(table: Table, detail: str) -> Part:
    """Mean error, standard deviation and number of runs of each row, beside the paper's value."""
    own, theirs = table.config.optim.epochs, table.paper_epochs
    rows = []
    for position, row in enumerate(table.rows):
        head = Cell(row.label, small=(", ".join([row.name, *row.changes]),), link=command_id(detail, position))
        cells = [head, _blocks(row), error_cell(row), Cell(f"{row.mean('best_test_error'):.2f}")]
        paper = "" if row.paper_error is None else f"{row.paper_error:.2f}"
        rows.append([*cells, *([Cell(paper)] if theirs else [])])
    head = ["training", "blocks", "test error, %", "best, %", *(["paper, %"] if theirs else [])]
    note = (
        "Test error: after the last epoch, mean ± standard deviation over n seeds. Best: at the epoch with the "
        "smallest error on the same test images, mean."
    )
    if theirs:
        epochs = " and ".join(f"{each:,}" for each in theirs)
        note += f" Paper: after {epochs} epochs" + ("." if theirs == [own] else f", these runs after {own:,}.")
    return Part("Test errors", grids=[Grid(head, rows, note)])


def _blocks(row: Row) -> Cell:
    """The number of blocks, with the paper's K if it differs."""
    label = row.recipe.label if row.recipe else ""
    differs = label.startswith("K=") and label != f"K={row.num_blocks}"
    return Cell(str(row.num_blocks), small=(f"{label} in the paper",) if differs else ())


def curves(table: Table, studio: Studio) -> Part:
    """Learning curves, in one picture or, if there are many, one for each objective."""
    several = any(len(row.runs) > 1 for row in table.rows)
    band = " Lines are means over seeds, bands reach from the best to the worst seed." if several else ""
    caption = f"Test error of the whole network after each epoch: {described(table)}.{band}"
    with_metrics = [position for position, row in enumerate(table.rows) if any(run.metrics for run in row.runs)]
    return Part(
        "Learning curves", pictures=list(_grouped(table, with_metrics, figures.learning_curves, caption, studio))
    )


def local_heads(table: Table, studio: Studio) -> Part:
    """Test errors of the blocks' own heads."""
    caption = (
        f"Test error of each block's own head after the last epoch, if the network ended there: {described(table)}."
    )
    with_heads = [
        position
        for position, row in enumerate(table.rows)
        if row.is_local and any(run.result.local_errors for run in row.runs)
    ]
    return Part("Local heads", pictures=list(_grouped(table, with_heads, figures.local_heads, caption, studio)))


def _grouped(
    table: Table, positions: Sequence[int], draw: Callable[..., figures.Drawn | None], caption: str, studio: Studio
) -> Iterator[Picture]:
    """One picture for each group of rows, all with the same scale."""
    every = [(group, draw(table, group)) for group in figures.groups(table, positions)]
    pictures = [(group, drawn) for group, drawn in every if drawn is not None]
    top = max((drawn.figure.axes[0].get_ylim()[1] for _, drawn in pictures), default=1.0)
    for group, drawn in pictures:
        drawn.figure.axes[0].set_ylim(0, top)
        yield studio.picture(drawn, caption, _paths([table.rows[position] for position in group]))


# Memory and time


@dataclass(frozen=True)
class Seconds:
    """Seconds per step of the rows of a table on one device."""

    values: Mapping[int, float | None]
    """By position of the row."""
    source: File[StepTimes] | None
    """File of `localgrad time`; None if the seconds are from the runs, where other processes may slow a step down."""


def seconds_of(table: Table, device: str, speeds: Sequence[File[StepTimes]]) -> Seconds:
    """Seconds per step from a file of `localgrad time` that has all rows of the table, otherwise from the runs.

    Runs were timed at different moments, so their seconds compare less well.
    """
    rows = table.on(device)
    for file in speeds:
        measured = {
            step_key(row.config, row.num_blocks, row.num_classes, row.precision): row.seconds_per_step
            for row in file.values.rows
            if row.config and row.num_blocks and row.num_classes and row.precision
        }
        keys = {p: step_key(row.config, row.num_blocks, row.num_classes, row.precision) for p, row in rows.items()}
        if file.values.device == device and {*keys.values()} <= {*measured}:
            return Seconds({position: measured[key] for position, key in keys.items()}, file)
    return Seconds({position: row.seconds_per_step for position, row in rows.items()}, None)


def costs(table: Table, speeds: Sequence[File[StepTimes]], studio: Studio) -> Iterator[Part]:
    """Memory, time and parameters of each row, one part per device, with the picture of error against memory."""
    for device in table.devices:
        seconds = seconds_of(table, device, speeds)
        pictures = [trade_off(table, device, seconds, studio)] if len(table.peaks_on(device)) > 1 else []
        yield Part(
            "Memory and time", f"On {device_text(device)}.", [_cost_grid(table, device, seconds, studio)], pictures
        )


def _cost_grid(table: Table, device: str, seconds: Seconds, studio: Studio) -> Grid:
    rows = table.on(device)
    own = seconds.source is None
    head = ["training", "memory, MiB", "s a step", *(["hours"] if own else []), "parameters"]
    cells = [
        plain(
            table.labels[position],
            mebibytes_text(row.peak_memory_bytes),
            seconds_text(seconds.values[position]),
            *([f"{row.mean('wall_seconds') / 3600:.2f}"] if own else []),
            parameters_text(row),
        )
        for position, row in rows.items()
    ]
    origin = (
        "median of the steps of the last epoch, slowed by whatever else ran beside them (`localgrad time` measures "
        "such rows in turns). Hours: training and evaluation, slowed likewise"
        if seconds.source is None
        else f"median of steps that took turns, from {studio.name(seconds.source.path)}"
    )
    note = (
        f"Memory: the most that a step held in tensors beyond what was there before it. Seconds: {origin}. "
        "Parameters: of the network, and of auxiliary networks, which are there in training only."
    )
    return Grid(head, cells, note)


def trade_off(table: Table, device: str, seconds: Seconds, studio: Studio) -> Picture:
    """The picture of test error against peak memory."""
    timed = "slowed by whatever else ran beside it" if seconds.source is None else "measured in turns with the others"
    rows, drawn = table.on(device), table.peaks_on(device)
    marks = {figures.rival(table, table.rows[position]) for position in drawn}
    named = ", ".join(f"{mark} for {rival}" for rival, (_, mark) in figures.RIVALS.items() if rival in marks and rival)
    colors = f"a color is an objective{f', a {named}' if named else ''}"
    caption = (
        f"Test error of all runs against the peak memory of a step on {device_text(device)}: {described(table)}. "
        f"Points are numbered as in the legend; {colors}. The area of a point is the "
        f"time of a step, which the legend has in seconds, {timed}; the dotted line joins the points that no other "
        "beats in both."
    )
    files = _paths([rows[position] for position in drawn]) + ([seconds.source.path] if seconds.source else [])
    return studio.picture(figures.trade_off(table, device, seconds.values), caption, files)


# Commands


def commands(table: Table, detail: str, studio: Studio) -> Part:
    """The command that repeats each row's first run, and the files of all its runs."""
    rows = []
    for position, row in enumerate(table.rows):
        seeds = ", ".join(str(run.result.config.seed) for run in row.runs)
        files = tuple(studio.name(path) for path in _paths([row]))
        head = Cell(table.labels[position], small=(f"seed{'s' * (len(row.runs) > 1)} {seeds}",))
        saved = row.runs[0].result.command
        made = without_paths(saved) if saved else command(row.config)
        rows.append([head, Cell(made, small=files, id=command_id(detail, position), code=True)])
    return Part("Commands", grids=[Grid(["training", "command of the first seed, and files"], rows)])
