"""The first screens of the report: what was run, when and on which device, and the main findings of the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from localgrad.results.findings import Finding, Gain, finding
from localgrad.results.names import device_text
from localgrad.results.page import Cell, Grid
from localgrad.results.read import Results
from localgrad.results.sections import error_cell, seconds_of
from localgrad.results.tables import Row, Table, mean_std, mebibytes_text, seconds_text

SHARES = ("memory, \N{MULTIPLICATION SIGN} end-to-end", "time, \N{MULTIPLICATION SIGN} end-to-end")
MOST_NAMES = 6
"""Largest number of names in a list; further names are only counted."""


def facts(found: Results, grouped: Sequence[Table]) -> list[tuple[str, str]]:
    """Pairs of a heading and a text: what was run, when, on which device and with which software."""
    results = [run.result for run in found.runs] + [file.values for file in found.files]
    dates = sorted(each.date[:10] for each in results if each.date)
    undated = len(results) - len(dates)
    when = "not recorded" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    if dates and undated:
        when += f"; {undated} of {len(results)} files have no date"
    packages = {name: _several(each.versions.get(name) for each in results) for name in ("localgrad", "torch")}
    software = "; ".join(f"{name} {versions}" for name, versions in packages.items() if versions)
    commits = {each.commit for each in results if each.commit}
    if commits:
        software += f"; {len(commits)} commit{'s' * (len(commits) > 1)} of localgrad's code"
    listed = {
        "What": _counted(found, grouped),
        "Networks and images": _several(table.title for table in grouped),
        "When": when,
        "On": _several(device_text(each.device) for each in results),
        "Software": software,
    }
    return [(name, text) for name, text in listed.items() if text]


def _several(names: Any) -> str:
    """The distinct names, joined; at most `MOST_NAMES`, and the number of the others."""
    each = list(dict.fromkeys(name for name in names if name))
    more = len(each) - MOST_NAMES
    return "; ".join(each[:MOST_NAMES]) + (f"; and {more} more" if more > 0 else "")


def _counted(found: Results, grouped: Sequence[Table]) -> str:
    rows = sum(len(table.rows) for table in grouped)
    kinds = (
        (len(found.runs), "run", "runs"),
        (len(found.probes), "linear probe", "linear probes"),
        (len(found.alignments), "comparison by CKA", "comparisons by CKA"),
        (len(found.pictures), "set of pictures", "sets of pictures"),
        (len(found.plans), "memory plan", "memory plans"),
        (len(found.speeds), "table of step times", "tables of step times"),
    )
    said = [f"{count} {one if count == 1 else several}" for count, one, several in kinds if count]
    if found.runs:
        tables = f"{len(grouped)} table{'s' * (len(grouped) > 1)}"
        said[0] += f" ({rows} training{'s' * (rows > 1)} in {tables}; runs that differ in their seed are one training)"
    return ", ".join(said)


def findings(grouped: Sequence[Table], found: Results, ids: Sequence[str]) -> Grid | None:
    """One row per table: end-to-end training, the best local training, the gain of MAN, memory and time."""
    if not grouped:
        return None
    rows = []
    for table, id in zip(grouped, ids, strict=True):
        each = finding(table)
        rows.append(
            [
                Cell(table.title, small=(table.budget,), link=id),
                error_cell(each.end_to_end) if each.end_to_end else Cell("-"),
                _best(each),
                _gains(each.gains),
                _memory(each),
                _time(each, found),
            ]
        )
    head = [
        "",
        "end-to-end: test error, %",
        "best of several blocks, %",
        "MAN lowers the error by",
        *SHARES,
    ]
    note = (
        "Errors: mean ± standard deviation over n seeds. MAN: percentage points by which the error falls with the "
        "momentum network, mean ± standard deviation of pairs of equal seeds. Memory and time of a step: those of the "
        "best training of several blocks, over those of end-to-end training with activations kept."
    )
    return Grid(head, rows, note)


def _best(each: Finding) -> Cell:
    if each.best is None:
        return Cell("-")
    cell = error_cell(each.best)
    blocks = f"{each.best.label}, {each.best.num_blocks} blocks"
    return Cell(cell.text, strong=cell.strong, small=(blocks, *cell.small))


def _gains(gains: Sequence[Gain]) -> Cell:
    if not gains:
        return Cell("-")
    ordered = sorted(gains, key=lambda gain: -gain.mean)
    equals = "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    lines = tuple(
        f"{gain.without.label}: {_signed(mean_std(gain.differences))} ({equals}{len(gain.differences)})"
        for gain in ordered
    )
    return Cell(strong=_signed(ordered[0].mean), small=lines)


def _signed(number: float | str) -> str:
    """The number with a typographic minus sign, which is as wide as a plus."""
    text = number if isinstance(number, str) else f"{number:.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _memory(each: Finding) -> Cell:
    """Memory of the best training relative to end-to-end; compares only runs on the same device."""
    memory = each.table.peaks_on(each.table.main_device)
    share, rival = each.to_end_to_end(each.best, memory), each.to_end_to_end(each.checkpointed, memory)
    sizes = [_size(each, row, memory) for row in (each.best, each.end_to_end)]
    small = [" of ".join(filter(None, sizes if share else sizes[:1] if each.best else sizes[1:]))]
    small += [f"checkpointed end-to-end: {rival:.2f}"] if rival else []
    return Cell(strong="" if share is None else f"{share:.2f}", small=tuple(filter(None, small)))


def _size(each: Finding, row: Row | None, memory: Mapping[int, float | None]) -> str:
    size = None if row is None else memory.get(each.table.rows.index(row))
    return "" if size is None else f"{mebibytes_text(size, 0)} MiB"


def _time(each: Finding, found: Results) -> Cell:
    seconds = seconds_of(each.table, each.table.main_device, found.speeds)
    share = each.to_end_to_end(each.best, seconds.values)
    rival = each.to_end_to_end(each.checkpointed, seconds.values)
    row = each.best or each.end_to_end
    own = seconds.values.get(each.table.rows.index(row)) if row else None
    small = [f"{seconds_text(own)} s, {'not ' if seconds.source is None else ''}measured in turns"] if own else []
    small += [f"checkpointed end-to-end: {rival:.2f}"] if rival else []
    return Cell(strong="" if share is None else f"{share:.2f}", small=tuple(small))
