"""Print the progress of a run or of a table of runs: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


def losses_in(width: int, losses: Sequence[float]) -> str:
    """The losses of all blocks in at most `width` characters.

    All losses are numbers if they fit, or if there are fewer than three. Otherwise the first and the last loss are
    numbers, with a bar chart between them that has one bar per block, or per group of blocks.
    """
    numbers = [f"{loss:.2f}" for loss in losses]
    whole = " ".join(numbers)
    if len(whole) <= width or len(losses) < 3:
        return whole
    room = max(1, width - len(numbers[0]) - len(numbers[-1]) - 2)
    columns = min(room, len(losses))
    edges = [round(index * len(losses) / columns) for index in range(columns + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return f"{numbers[0]} {''.join(BARS[round((mean - low) * scale)] for mean in means)} {numbers[-1]}"


class Display:
    """Prints the progress of a run to stderr.

    On a terminal: a live bar with the losses, and one line per finished epoch above it. Otherwise: one line per
    finished epoch, and one line every half minute within an epoch.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=False)
        self.interval = 1.0 if self.console.is_terminal else 30.0
        live = Live(console=self.console, auto_refresh=False, transient=True)
        self._live = live if self.console.is_terminal else None
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def message(self, text: str) -> None:
        """Print a line that stays above the live bar."""
        self.console.print(Text(text), soft_wrap=True)

    def is_due(self) -> bool:
        """Whether to read the losses and show them now: after 1 second on a terminal, 30 seconds elsewhere."""
        return not self.console.quiet and time.monotonic() - self._shown >= self.interval

    def step(
        self,
        *,
        epoch: str,
        done: int,
        total: int,
        losses: Sequence[float],
        images_per_second: float | None,
        left: str = "",
    ) -> None:
        """Show the progress of the current epoch.

        Args:
            epoch: the epoch, such as `3/400`.
            done: number of finished batches of the epoch.
            total: number of batches of the epoch.
            losses: mean loss of each block in this epoch so far.
            images_per_second: training speed; None if not measured yet.
            left: remaining time of the epoch and of the run, in words.
        """
        self._shown = time.monotonic()
        width = self.console.width
        speed = _speed(images_per_second)
        if self._live is None:
            shown = f"epoch {epoch} batch {done}/{total} {speed}{left and f'{left} '}"
            self.message(f"{shown}loss {losses_in(max(20, width - len(shown) - 5), losses)}")
            return
        line = Table.grid(padding=(0, 1))
        line.add_row(
            f"epoch {epoch}", ProgressBar(total, done, width=max(5, min(30, width - 45))), f"{done}/{total}", speed
        )
        table = Table.grid()
        table.add_row(line)
        if left:
            table.add_row(Text(left, no_wrap=True))
        table.add_row(Text(f"loss {losses_in(width - 6, losses)}", no_wrap=True))
        self._live.update(table, refresh=True)

    def epoch(self, epoch: str, line: dict[str, Any]) -> None:
        """Print the line of a finished epoch.

        Args:
            epoch: the epoch, such as `3/400`.
            line: the epoch's line of the metrics file.
        """
        self._shown = time.monotonic()
        error = line["test_error"]
        shown = "" if error is None else f" error {error:.2f}%"
        skipped = f"{line['skipped']} skipped " if line.get("skipped") else ""
        head = f"epoch {epoch}{shown} {_speed(line['images_per_second'])}{skipped}loss "
        self.message(head + losses_in(max(12, self.console.width - len(head)), line["train_loss"] or []))


def _speed(images_per_second: float | None) -> str:
    return "" if images_per_second is None else f"{images_per_second:,.0f} img/s "


class TableDisplay:
    """Prints the progress of many runs to stderr: a line at the start and end of each, and bars on a terminal.

    Args:
        total: number of runs.
        done: number of runs that are finished already.
    """

    def __init__(self, total: int, done: int) -> None:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._progress.add_task("runs", total=total, completed=done)
        self._running: dict[str, TaskID] = {}
        if done:
            self._print(f"{done} of {total} runs are done")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _print(self, text: str) -> None:
        self._progress.console.print(Text(text))

    def message(self, text: str) -> None:
        """Print a line that stays above the bars."""
        self._print(text)

    def started(self, name: str, epochs: int, done: int) -> None:
        """Report that a run of `epochs` epochs starts, or resumes after `done` epochs."""
        self._running[name] = self._progress.add_task(name, total=epochs, completed=done)
        self._print(f"{name}: " + (f"goes on after epoch {done}" if done else "starts"))

    def progress(self, name: str, test_errors: Sequence[float | None]) -> None:
        """Show a run's number of finished epochs and its latest test error; `test_errors` has one entry per epoch."""
        known = [error for error in test_errors if error is not None]
        described = f"{name} {known[-1]:.2f}%" if known else name
        self._progress.update(self._running[name], completed=len(test_errors), description=described)

    def ended(self, name: str, text: str) -> None:
        """Report that a run has ended, with a text about it."""
        self._progress.remove_task(self._running.pop(name))
        self._progress.advance(self._all)
        self._print(f"{name}: {text}")
