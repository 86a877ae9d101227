"""Print the table of reproduced runs beside the paper's values."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from localgrad.config.methods import with_defaults
from localgrad.config.saved import differences
from localgrad.recipes import recipe
from localgrad.recipes.tables import table
from localgrad.results.cells import load_result, result_files
from localgrad.results.tables import mean_or_none, mean_std, mebibytes_text
from localgrad.results.terminal import print_table
from localgrad.runs.result import Result


def show_table(name: str, output: Path) -> None:
    """Print all results in the folder as mean ± standard deviation (number of seeds), beside the paper's values.

    Raises:
        LocalGradError: a result file is damaged.
    """
    rows = {row: [load_result(path) for path in result_files(output, row)] for row in table(name).rows}
    print_table(
        ["row", "label", "blocks", "test error %", "best epoch's %", "paper's %", "MiB a step", "minutes"],
        [_line(row, results) for row, results in rows.items()],
        title=f"{table(name).title}; results in {output}",
        narrow=[0, 3, 5],
        width=100,
    )
    for changed in _changes(rows):
        print(f"not as in the recipe: {changed}")


def _line(row: str, results: Sequence[Result]) -> tuple[str, ...]:
    made = recipe(row)
    paper = "-" if made.paper_error is None else f"{made.paper_error:.2f}"
    if not results:
        return (row, made.label, str(made.num_blocks), "-", "-", paper, "-", "-")
    count = f" ({len(results)})"
    return (
        row,
        made.label,
        str(results[0].num_blocks),
        mean_std([result.test_error for result in results]) + count,
        mean_std([result.best_test_error for result in results]) + count,
        paper,
        mebibytes_text(mean_or_none([result.peak_memory_bytes for result in results]), 0),
        f"{statistics.fmean(result.wall_seconds for result in results) / 60:.1f}",
    )


def _changes(rows: dict[str, list[Result]]) -> list[str]:
    """The fields in which the runs differ from their recipes, each change once; the seed does not count."""
    lines: dict[str, None] = {}
    for row, results in rows.items():
        intended = with_defaults(recipe(row).config)
        for result in results:
            seeded = dataclasses.replace(intended, seed=result.config.seed)
            lines |= dict.fromkeys(differences(seeded, with_defaults(result.config)))
    return list(lines)
