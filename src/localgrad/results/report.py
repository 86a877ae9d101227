"""Write result files as one static page: a summary, then the details of each table. It needs no network, no script."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from localgrad.results import analysis_sections, overview, sections
from localgrad.results.kinds import Pictures
from localgrad.results.names import dataset_label, device_text
from localgrad.results.page import Cell, Detail, Grid, Part, Picture, Studio
from localgrad.results.read import File, Results, read_results
from localgrad.results.tables import Table, one_a_seed, setting, tables
from localgrad.runs.files import atomic_write, make_folder

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: the page may use its own styles and embedded pictures, and load nothing else."""
FRONT_PICTURES = 2
"""Number of trade-off pictures in the summary, from the tables with the most rows."""
LEAST_ROWS = 3
"""Fewest rows of a table for such a picture."""


def write_report(folder: Path, output: Path, warn: Callable[[str], None]) -> None:
    """Read all results below a folder and write the page.

    Args:
        folder: folder of run folders, result files, analyses, plans and step times, in any subfolders.
        output: path of the page.
        warn: called with a line about files that are left out.

    Raises:
        LocalGradError: the folder holds no results, or the page cannot be written.
    """
    found = read_results(folder, warn)
    found.runs = one_a_seed(found.runs, warn)
    text = page(found, folder)
    make_folder(output.parent)
    with atomic_write(output) as file:
        file.write(text.encode(errors="replace"))  # a file name may hold bytes that are not UTF-8


def page(found: Results, folder: Path) -> str:
    """The page as HTML, without empty parts."""
    grouped, studio = tables(found.runs), Studio(folder)
    ids = [f"table-{number}" for number in range(1, len(grouped) + 1)]
    details = [detail for detail in _details(found, grouped, ids, studio) if detail.parts]
    here = files("localgrad.results")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(here.joinpath("report.html.j2").read_text()).render(
        policy=POLICY,
        style=here.joinpath("report.css").read_text(),
        title=_title(folder),
        name=folder.resolve().name,
        version=version("localgrad"),
        facts=overview.facts(found, grouped),
        findings=overview.findings(grouped, found, ids),
        pictures=_front(found, grouped, studio),
        details=details,
    )


def _title(folder: Path) -> str:
    name = folder.resolve().name
    return "Results" if name.lower() in ("", "results", "runs") else f"Results of {name}"


def _front(found: Results, grouped: Sequence[Table], studio: Studio) -> list[Picture]:
    """The pictures of the summary."""
    largest = sorted(grouped, key=lambda table: -len(table.rows))[:FRONT_PICTURES]
    pictures = []
    for table in largest:
        device = table.main_device
        if len(table.peaks_on(device)) >= LEAST_ROWS:
            seconds = sections.seconds_of(table, device, found.speeds)
            pictures.append(sections.trade_off(table, device, seconds, studio))
    return pictures


def _details(found: Results, grouped: Sequence[Table], ids: Sequence[str], studio: Studio) -> list[Detail]:
    """The folded sections: one for each table, then results that belong to no table."""
    analyses: list[File[Any]] = [*found.probes, *found.alignments, *_with_class_names(found)]
    homes = {id: [] for id in [*ids, ""]}
    settings = {setting(table.config): id for table, id in reversed(list(zip(grouped, ids, strict=True)))}
    for file in analyses:
        homes[settings.get(setting(file.values.runs[0].config), "")].append(file)
    details = [
        Detail(id, table.title, table.budget, _table_parts(table, id, found, homes[id], studio))
        for table, id in zip(grouped, ids, strict=True)
    ]
    others = list(analysis_sections.analyses(homes[""], studio))
    plans, speeds = analysis_sections.plans(found.plans, studio), analysis_sections.speeds(found.speeds, studio)
    details.append(Detail("analyses", "Analyses of other runs", _counted(homes[""]), others))
    details.append(Detail("plans", "Planned memory", _counted(found.plans), [plans] if plans else []))
    details.append(Detail("times", "Times of a step", _counted(found.speeds), [speeds] if speeds else []))
    details.append(Detail("files", "Files", _counted([*found.runs, *found.files]), [_files(found, studio)]))
    return details


def _with_class_names(found: Results) -> list[File[Pictures]]:
    """The pictures of features. Old files lack class names and take those of a run on the same data set."""
    names = {dataset_label(run.result.config): run.result.class_names for run in found.runs if run.result.class_names}
    named = []
    for file in found.pictures:
        data = file.values.data
        known = data.class_names or names.get(dataset_label(file.values.runs[0].config))
        named.append(replace(file, values=replace(file.values, data=replace(data, class_names=known))))
    return named


def _counted(each: Sequence[Any]) -> str:
    return f"{len(each)} file{'s' * (len(each) != 1)}"


def _table_parts(table: Table, id: str, found: Results, analyses: Sequence[File[Any]], studio: Studio) -> list[Part]:
    parts = [
        sections.errors(table, id),
        sections.curves(table, studio),
        *sections.costs(table, found.speeds, studio),
        sections.local_heads(table, studio),
        *analysis_sections.analyses(analyses, studio),
        sections.commands(table, id, studio),
    ]
    return [part for part in parts if part]


def _files(found: Results, studio: Studio) -> Part:
    """The list of the files that the page was made from."""
    origins: list[tuple[Path, Any]] = [(run.path, run.result) for run in found.runs]
    origins += [(file.path, file.values) for file in found.files]
    rows = [
        [
            Cell(studio.name(path)),
            Cell((values.commit or "")[:12]),
            Cell(values.versions.get("torch", "")),
            Cell(device_text(values.device)),
            Cell((values.date or "")[:10]),
        ]
        for path, values in sorted(origins, key=lambda origin: origin[0])
    ]
    head = ["file", "commit", "torch", "device", "date"]
    grids = [Grid(head, rows, "Every figure of this page comes from these files.")]
    if found.others:
        others = [[Cell(studio.name(path))] for path in found.others]
        grids.append(Grid(["results of benchmarks and examples, which are not on this page"], others))
    return Part("", grids=grids)
