"""Print `--help` at any width without splitting a word or flag, and a wrong command line's error in one line."""

import io
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

NARROW = 72
"""On a terminal with fewer characters a line, a flag's sentence is below the flag instead of beside it."""
WIDE = 110
"""Longest line in characters: longer lines are hard to read."""
UNDER, BESIDE = 6, 26
"""Column at which a flag's sentence starts, below and beside the flag."""
TYRO_COLUMNS = 129
"""Widest terminal on which tyro puts its boxes below each other. At this width it splits none of our words."""


class Boxes(io.StringIO):
    """A text stream on which tyro draws boxes, but uses no colors."""

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType]


def show_help(text: str, parse: Callable[[], object]) -> None:
    """Print the help of a command and exit.

    Args:
        text: description of the command in paragraphs; indented lines are examples.
        parse: function in which tyro parses `--help`: it prints usage and flags in boxes, and exits.
    """
    width = min(shutil.get_terminal_size().columns, WIDE)
    boxes = Boxes()
    try:
        with printed_to(boxes):
            parse()
    finally:
        usage, _, flags = boxes.getvalue().partition("\n")
        print("\n".join([paragraphs(text, width), "", _filled(usage, width, "    "), *_flags(flags, width)]))


def refusal(boxes: str) -> str:
    """Tyro's error about a wrong command line, from its box to one line, without the hint about `--help`."""
    said, inside = [], False
    for line in boxes.splitlines():
        inside = line.startswith("╭") or (inside and not line.startswith("│ ──"))
        if inside and line.startswith("│"):
            said.append(line.strip("│ "))
    return " ".join(said) or boxes.strip()


def flags(parse_help: Callable[[], object]) -> list[str]:
    """The flags that the help of a command lists."""
    boxes = Boxes()
    with suppress(SystemExit), printed_to(boxes):
        parse_help()
    return re.findall(r"--[a-z][\w.-]*", boxes.getvalue())


@contextmanager
def printed_to(boxes: Boxes) -> Iterator[None]:
    """Context: redirects what tyro prints to `boxes`, at a fixed width."""
    with redirect_stdout(boxes), redirect_stderr(boxes), _columns(TYRO_COLUMNS):
        yield


def paragraphs(text: str, width: int) -> str:
    """The text filled to a width: joins the source lines of a paragraph, and breaks long examples with a backslash."""
    lines = []
    for paragraph in text.strip().split("\n\n"):
        joined: list[str] = []
        for line in paragraph.splitlines():
            if joined and not line.startswith(" ") and not joined[-1].startswith(" "):
                joined[-1] += f" {line}"
            else:
                joined.append(line)
        for line in joined:
            lines.append(_example(line, width) if line.startswith(" ") else _filled(line, width))
        lines.append("")
    return "\n".join(lines[:-1])


def _example(line: str, width: int) -> str:
    return " \\\n".join(_filled(line, width - 2, "      ").splitlines()) if len(line) > width else line


def _filled(text: str, width: int, after: str = "", before: str = "") -> str:
    """The text in lines that break only between words; a word longer than a line is not split."""
    return textwrap.fill(
        text,
        width,
        initial_indent=before,
        subsequent_indent=before + after,
        break_on_hyphens=False,
        break_long_words=False,
    )


@contextmanager
def _columns(width: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _flags(boxes: str, width: int) -> Iterator[str]:
    """The lines of tyro's boxes: the title of each group, and each flag with its sentence beside or below it."""
    flag = sentence = ""
    for line in [*boxes.splitlines(), ""]:
        title = re.match(r"╭─ (.*?) ─*╮$", line)
        inner = line[2:-2] if line.startswith("│") else ""
        if inner.startswith("  "):  # the sentence continues, or starts below a long flag
            sentence = f"{sentence} {inner.strip()}"
            continue
        if flag:
            yield from _flag(flag, sentence.strip().replace("(default: )", "(default: none)"), width)
        flag, _, sentence = inner.strip(" ─").partition("  ")
        if title:
            yield f"\n{title[1]}:"


def _flag(flag: str, sentence: str, width: int) -> Iterator[str]:
    column = UNDER if width < NARROW else BESIDE
    if width >= NARROW and len(flag) + 4 <= column:
        yield _filled(f"  {flag}".ljust(column) + sentence, width, " " * column)
        return
    yield _filled(flag, width, "  ", before="  ")
    if sentence:
        yield _filled(sentence, width, before=" " * column)
