"""A message is worded once in the tests, so that rewording it touches the library and one test."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "localgrad"
FEWEST = 3
"""Words in a row that are wording; two are often a name, as `batch size`."""

Phrase = tuple[str, ...]


def strings(node: ast.AST) -> Iterator[ast.expr]:
    """The outermost strings in a piece of code, an f-string or a sum as a whole; docstrings are none."""
    if isinstance(node, ast.JoinedStr | ast.BinOp) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def phrases(string: ast.AST) -> set[Phrase]:
    """The runs of words in the constant parts. A value, a flag, a number, a wildcard or a name in quotes ends a run."""
    found = set[Phrase]()
    for node in ast.walk(string):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"\\[a-z]|\.[*+]|\[[^]]*\][*+?]", " * ", node.value).replace("\\", "")
            run: list[str] = []
            for chunk in [*re.sub(r"[.;?!](\s|$)", " * ", text).split(), "*"]:
                word = chunk.strip(',:()[]{}"`|^$')
                if re.fullmatch(r"[A-Za-z]+('[a-z]+)?", word):
                    run.append(word)
                else:
                    found |= {tuple(run)} if len(run) >= FEWEST else set()
                    run = []
    return found


def agreement(one: Phrase, other: Phrase) -> int:
    """Most words in which two phrases agree, laid over one another so that no word differs where both have one."""
    shifts = range(FEWEST - len(other), len(one) - FEWEST + 1)
    overlaps = ((one[max(n, 0) : n + len(other)], other[max(-n, 0) : len(one) - n]) for n in shifts)
    return max((len(mine) for mine, its in overlaps if mine == its), default=0)


def worded(library: dict[str, str], tests: dict[str, str]) -> dict[frozenset[str], dict[str, str]]:
    """Where the tests word messages of the library.

    A phrase of a test words the message with which it has most words in a row in common, at least `FEWEST`, and
    several messages where they have these words alike. A place is a function or a constant of a test file: a
    parametrised test is one place, and so is a table of cases.

    Args:
        library: the code of each file of the library.
        tests: the code of each file of the tests.

    Returns:
        Messages that share their words (file, line and code of each), with the places that have them (file and line,
        and the words).
    """
    known = defaultdict[Phrase, set[tuple[str, Phrase]]](set)
    for file, code in library.items():
        for string in strings(ast.parse(code)):
            for phrase in phrases(string):
                message = f"{file}:{string.lineno}: {ast.unparse(string)}"
                for start in range(len(phrase) - FEWEST + 1):
                    known[phrase[start : start + FEWEST]].add((message, phrase))
    places = defaultdict[frozenset[str], dict[str, str]](dict)
    for file, code in tests.items():
        for part in ast.parse(code).body:
            for phrase in {phrase for string in strings(part) for phrase in phrases(string)}:
                alike = defaultdict[int, set[str]](set)
                for start in range(len(phrase) - FEWEST + 1):
                    for message, its in known[phrase[start : start + FEWEST]]:
                        alike[agreement(phrase, its)].add(message)
                if max(alike, default=0):
                    places[frozenset(alike[max(alike)])][f"{file}:{part.lineno}"] = " ".join(phrase)
    return places


def repeated(library: dict[str, str], tests: dict[str, str]) -> list[str]:
    """Messages that are worded in more places of the tests than there are messages with these words."""
    return [
        "\n  ".join(sorted(messages) + sorted(f"{place}: {words}" for place, words in places.items()))
        for messages, places in worded(library, tests).items()
        if len(places) > len(messages)
    ]


def codes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


def test_a_message_is_worded_once() -> None:
    """Elsewhere a test asks for the kind of the error, or for what the message carries: a name, a number."""
    found = repeated(codes(SOURCE), codes(TESTS))
    assert not found, "\n".join(["a message is worded in several places of the tests:", *found])


LIBRARY = """
def check(name, size):
    raise ValueError(f"{name} has no such layer: give one of its {size} layers, or none")
def other(name):
    raise ValueError("give one of these: " + name)
"""


@pytest.mark.parametrize(
    "test",
    [
        'raises(match=r"net has no such layer: give one of its \\d+ layers")',
        'raises(match="has no such layer")',
        'assert "give one of its 3" in str(error.value)',
        'MESSAGE = "give one of its"',
    ],
)
def test_a_message_that_is_worded_again_is_found(test: str) -> None:
    (found,) = repeated({"a.py": LIBRARY}, {"b.py": "def test_a(): assert 'has no such layer' in said()", "c.py": test})
    assert found.startswith("a.py:3: ") and "\n  b.py:1: has no such layer\n  c.py:1: " in found


@pytest.mark.parametrize(
    "test",
    [
        'raises(match="net .* 3 layers")',  # what the message carries
        'raises(match="no layer")',
        'raises(match="give one of these")',  # another message
        'raises(match="a net that has no such layers")',
        '"""It has no such layer."""',
    ],
)
def test_other_words_are_not_the_message(test: str) -> None:
    assert not repeated({"a.py": LIBRARY}, {"b.py": "def test_a(): assert 'has no such layer' in said()", "c.py": test})


def test_a_parametrised_test_is_one_place_and_two_messages_have_two() -> None:
    rows = "@cases(['x has no such layer', 'y has no such layer'])\ndef test_a(): ..."
    assert not repeated({"a.py": LIBRARY}, {"b.py": rows})
    twice = {"b.py": rows, "c.py": rows}
    assert repeated({"a.py": LIBRARY}, twice)
    assert not repeated({"a.py": LIBRARY, "d.py": LIBRARY}, twice)
