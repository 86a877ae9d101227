"""Result files as one static page: tables beside the papers' values, and pictures. No network, no script."""

from collections.abc import Callable
from dataclasses import fields
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from localgrad.errors import LocalGradError
from localgrad.results import sections
from localgrad.results.read import Results, read_results
from localgrad.results.tables import one_a_seed, tables
from localgrad.runs.folder import atomic_write

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: its own styles, and pictures that are part of it."""


def write_report(folder: Path, output: Path, warn: Callable[[str], None]) -> None:
    """Reads all results below a folder and writes the page.

    Args:
        folder: with run folders, flat result files, analyses, plans, step times, in any subfolders.
        output: the page.
        warn: told about files that are left out, a line each.

    Raises:
        LocalGradError: there is nothing to show, or the page cannot be written.
    """
    found = read_results(folder, warn)
    found.runs = one_a_seed(found.runs, warn)
    try:
        text = page(found, folder)
    except Exception:  # a field that nothing has checked; whose it is shows when each is drawn alone
        text = page(_drawable(found, folder, warn), folder)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalGradError(f"{output.parent} cannot be made: {error.strerror or error}") from error
    with atomic_write(output) as file:
        file.write(text.encode(errors="replace"))  # a file's name may be no text


def _drawable(found: Results, folder: Path, warn: Callable[[str], None]) -> Results:
    """The results of which a page can be made, one by one; the others are named.

    Raises:
        LocalGradError: none is left.
    """
    kept = Results()
    for kind in fields(Results):
        for each in getattr(found, kind.name):
            try:
                page(Results(**{kind.name: [each]}), folder)
            except Exception as error:
                warn(f"left out: {each.path} is damaged: {type(error).__name__}: {error}")
            else:
                getattr(kept, kind.name).append(each)
    if not len(kept):
        raise LocalGradError(f"{folder} has no result that can be shown; see the warnings")
    return kept


def page(found: Results, folder: Path) -> str:
    """The whole page as text. Sections for which there is nothing are left out."""
    grouped = tables(found.runs)
    pictures = sections.Pictures(folder)
    bodies = {
        "Test errors": "".join(sections.errors(table) for table in grouped),
        "Learning curves": pictures.grid(sections.curves(grouped)),
        "Memory, error and time": "".join(sections.costs(grouped, found.speeds, pictures)),
        "Local heads": pictures.grid(sections.local_heads(grouped)),
        "Linear separability": "".join(sections.probes(found.probes, pictures)),
        "Similarity of features (CKA)": sections.alignments(sorted(found.alignments, key=sections.order_of), pictures),
        "Pictures of features": pictures.grid(sections.features(sorted(found.pictures, key=sections.order_of))),
        "Planned memory": pictures.grid(sections.plans(found.plans)),
        "Time of a step": pictures.grid(sections.speeds(found.speeds)),
        "Files": sections.files(found, folder),
    }
    shown = {title: body for title, body in bodies.items() if body}
    ids = {title: f"section-{number}" for number, title in enumerate(shown, start=1)}
    links = "".join(f'<li><a href="#{ids[title]}">{escape(title)}</a></li>' for title in shown)
    main = "\n".join(
        f'<section id="{ids[title]}"><h2>{escape(title)}</h2>{body}</section>' for title, body in shown.items()
    )
    style = files("localgrad.results").joinpath("report.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>localgrad: results</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Results</h1>
<p class="soft">{_counted(found)}. Written by localgrad {escape(version("localgrad"))}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{main}
</main>
</body>
</html>
"""


def _counted(found: Results) -> str:
    kinds = {
        "run": found.runs,
        "linear probe": found.probes,
        "comparison by CKA": found.alignments,
        "set of pictures": found.pictures,
        "memory plan": found.plans,
        "table of step times": found.speeds,
    }
    several = {"comparison by CKA": "comparisons by CKA", "set of pictures": "sets of pictures"}
    several |= {"table of step times": "tables of step times"}
    said = [f"{len(e)} {name if len(e) == 1 else several.get(name, name + 's')}" for name, e in kinds.items() if e]
    return ", ".join(said)
