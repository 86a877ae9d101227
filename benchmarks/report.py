"""What every benchmark prints and writes: one table, one JSON with what it ran on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from localgrad.runs.provenance import provenance


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    return provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "row" else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
