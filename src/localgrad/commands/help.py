"""`--help` at any width, with no word or flag split in the middle; what is wrong with a command line, in one line."""

import io
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

NARROW = 72
"""Columns below which a flag's sentence stands under it, and not beside it."""
WIDE = 110
"""The longest line: a longer one is hard to read."""
UNDER, BESIDE = 6, 26
"""Where a flag's sentence begins."""
TYRO_COLUMNS = 129
"""The widest terminal for which tyro puts its boxes below each other. No word of ours is split there."""


class Boxes(io.StringIO):
    """What tyro prints where there are lines for boxes, but no colours."""

    encoding = "utf-8"  # pyright: ignore[reportAssignmentType]


def show_help(text: str, parse: Callable[[], object]) -> None:
    """Prints the help of a command and leaves.

    Args:
        text: what it does, in paragraphs; indented lines are examples.
        parse: lets tyro parse `--help`: it prints usage and flags in boxes, and leaves.
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
    """What tyro says in a box about a wrong command line, in one line, without its hint to the help."""
    said, inside = [], False
    for line in boxes.splitlines():
        inside = line.startswith("╭") or (inside and not line.startswith("│ ──"))
        if inside and line.startswith("│"):
            said.append(line.strip("│ "))
    return " ".join(said) or boxes.strip()


def flags(parse_help: Callable[[], object]) -> list[str]:
    """The flags that a command's help names."""
    boxes = Boxes()
    with suppress(SystemExit), printed_to(boxes):
        parse_help()
    return re.findall(r"--[a-z][\w.-]*", boxes.getvalue())


@contextmanager
def printed_to(boxes: Boxes) -> Iterator[None]:
    """Context: what tyro prints goes there, in boxes of one width."""
    with redirect_stdout(boxes), redirect_stderr(boxes), _columns(TYRO_COLUMNS):
        yield


def paragraphs(text: str, width: int) -> str:
    """The text in lines of a width: source lines of a paragraph are joined, an example goes on behind a backslash."""
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
    """The text in lines that break between words alone; a word that is longer than a line stays whole."""
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
    """The groups of tyro's boxes: their titles, and each flag with its sentence beside or under it."""
    flag = sentence = ""
    for line in [*boxes.splitlines(), ""]:
        title = re.match(r"╭─ (.*?) ─*╮$", line)
        inner = line[2:-2] if line.startswith("│") else ""
        if inner.startswith("  "):  # the sentence goes on, or begins under a long flag
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
