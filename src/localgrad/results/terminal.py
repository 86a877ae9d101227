"""Tables on a terminal, by rich: every command prints its table with this."""

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 200
"""Columns of a table that is not printed on a terminal."""


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    note: str = "",
    narrow: Sequence[int] = (),
    width: int = 80,
    left: Sequence[int] = (0,),
) -> None:
    """Prints a table whose figures stay whole; into a file it is as wide as it needs.

    Args:
        head: names of the columns.
        rows: cells as they are printed.
        title: a line above.
        note: a paragraph below.
        narrow: positions of the columns that are shown where the terminal has fewer than `width` columns; all if empty.
        width: see there.
        left: positions of the columns that are aligned to the left; the others are to the right.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_WIDTH)
    shown = narrow if narrow and console.width < width else range(len(head))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        table.add_column(head[column], justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[column]) for column in shown))
    if title:
        console.print(Text(title))
    console.print(table)
    if note:
        console.print(Text(note, style="dim"))
