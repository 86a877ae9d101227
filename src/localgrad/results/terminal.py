"""Print tables on a terminal with rich; every command uses this."""

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 200
"""Width in characters of a table that is printed into a file or a pipe."""


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
    """Print a table without cutting cells: a cell that is too long continues on the next line.

    Args:
        head: names of the columns.
        rows: the cells of each row as text.
        title: line above the table.
        note: paragraph below the table.
        narrow: positions of the columns to show on a terminal with fewer than `width` characters a line; all if empty.
        width: see `narrow`.
        left: positions of the columns to align to the left; the others are aligned to the right.
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
