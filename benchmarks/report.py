"""Print and write results, for every benchmark: a table, and a JSON with device, versions and commit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from localgrad.results import terminal
from localgrad.results.kinds import kind_of
from localgrad.runs.files import make_folder, write_json
from localgrad.runs.provenance import provenance
from localgrad.runs.result import SCHEMA


def environment() -> dict[str, Any]:
    """Device, versions, commit and date."""
    return provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with equal keys as a table."""
    names = list(rows[0])
    terminal.print_table(
        [name.replace("_", " ") for name in names],
        [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows],
        title=title,
        left=[position for position, name in enumerate(names) if name == "row"],
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON. Its kind is `benchmark`, unless `localgrad report` can show it (step times)."""
    make_folder(path.parent)
    write_json(path, {"kind": kind_of(result) or "benchmark", "schema": SCHEMA, **result}, indent=1)
    print(f"wrote {path}")
