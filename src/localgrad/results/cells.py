"""The cells of a table to reproduce: each is one row with one seed, with its config, command and files."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localgrad.config.checks import validate
from localgrad.config.methods import with_defaults
from localgrad.config.saved import differences, from_dict, to_dict
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError, closest
from localgrad.recipes import recipe
from localgrad.recipes.tables import table
from localgrad.results.read import read_result
from localgrad.runs.folder import RunFolder
from localgrad.runs.result import Result


@dataclass(frozen=True)
class Cell:
    """One row with one seed."""

    config: TrainConfig
    """The complete run."""
    flags: tuple[str, ...]
    """Flags of `localgrad train` that turn the row's recipe into `config`."""
    output: Path
    """Folder of the whole table."""

    @property
    def name(self) -> str:
        return f"{self.config.name}-seed{self.config.seed}"

    @property
    def result(self) -> Path:
        return self.output / f"{self.name}.json"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.output / "runs" / self.name)

    @property
    def log(self) -> Path:
        return self.output / "runs" / f"{self.name}.log"

    @property
    def command(self) -> list[str]:
        """Arguments of `localgrad` that run this cell from the start."""
        return ["train", self.config.name, *self.flags]

    @property
    def state(self) -> str:
        """`done` (the result file exists), `started` (the run folder has a config) or `new`."""
        if self.result.exists():
            return "done"
        return "started" if (self.run.path / "config.json").exists() else "new"


def plan_cells(
    name: str, *, seeds: Sequence[int], changes: dict[str, Any], output: Path, rows: Sequence[str] = ()
) -> list[Cell]:
    """The runs of a table, in the order in which they start: all rows with the first seed first.

    Args:
        name: name of the table.
        seeds: every row runs once with each seed.
        changes: fields to set in every row's config, by dotted name, such as `{"optim.epochs": 10}`.
        output: folder for results and runs.
        rows: the rows of the table to run; all rows if empty.

    Raises:
        LocalGradError: there is no such table, the table has no such row, a config is invalid, or the folder holds
            runs with other settings.
    """
    listed = table(name).rows
    for row in rows:
        if row not in listed:
            raise LocalGradError(
                f"table {name} has no row {row!r}{closest(row, listed)}; its rows: {', '.join(listed)}"
            )
    check_seeds(seeds)
    cells = [_cell(row, seed, changes, output) for seed in seeds for row in listed if row in (rows or listed)]
    _check_settings(name, changes, output)
    return cells


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse an empty list of seeds, and duplicates."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise LocalGradError(f"seeds are {tuple(seeds)}: give one or more different ones, as --seeds 0 1 2")


def _cell(row: str, seed: int, changes: dict[str, Any], output: Path) -> Cell:
    changes = {"seed": seed, **changes}
    values = to_dict(recipe(row).config)
    flags: list[str] = []
    for path, value in changes.items():
        *parents, field = path.split(".")
        part = values
        for parent in parents:
            part = part[parent]
        part[field] = value
        flag = "--" + path.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return Cell(with_defaults(validate(from_dict(values))), tuple(flags), output)


def _check_settings(name: str, changes: dict[str, Any], output: Path) -> None:
    """Refuse a folder that holds runs of the table, with any seed, that have other settings.

    The path of the images of a finished run may differ: the same images may lie elsewhere on another machine.
    """
    for row in table(name).rows:
        finished = {path: with_defaults(load_result(path).config) for path in result_files(output, row)}
        done = {path.stem for path in finished}
        begun = sorted(output.glob(f"runs/{row}-seed*/config.json"))
        started = {path: RunFolder(path.parent).config() for path in begun if path.parent.name not in done}
        for path, before in {**finished, **started}.items():
            made = _cell(row, before.seed, changes, output)
            now = made.config
            if path in finished and path != made.result:
                raise LocalGradError(
                    f"{path} holds the result of {before.name} with seed {before.seed}, which belongs into "
                    f"{made.result.name}: move it away, or a seed counts twice"
                )
            if path in finished:
                before = dataclasses.replace(before, data=dataclasses.replace(before.data, source=now.data.source))
            changed = differences(before, now)
            if changed:
                raise LocalGradError(
                    f"{output} holds runs of other settings ({path.relative_to(output)}, saved -> asked for: "
                    f"{'; '.join(changed)}); give another --output, or the flags that it was started with"
                )


def result_files(output: Path, row: str) -> list[Path]:
    """The result files `ROW-seedN.json` of a row in a folder, by seed."""
    paths = [path for path in output.glob(f"{row}-seed*.json") if path.stem.removeprefix(f"{row}-seed").isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem.rpartition("seed")[2]))


def load_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        LocalGradError: the file is damaged, or is not the result of a run.
    """
    try:
        return read_result(path)
    except LocalGradError as problem:
        raise LocalGradError(f"{problem}: move it away, or give another --output") from None
