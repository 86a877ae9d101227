"""The sections of the report: what the tables say, and what is drawn with which caption."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from localgrad.config.saved import flat
from localgrad.results import analysis_figures as drawings
from localgrad.results import figures
from localgrad.results.read import Results, Sheet
from localgrad.results.tables import (
    BUDGET,
    Row,
    Table,
    dataset_label,
    network_label,
    own_fields,
    place,
    run_label,
    step_key,
    told_seconds,
)

Captioned = tuple[Figure | None, str, Sequence[Path]]
"""A picture, what it shows, and the files that it was drawn from."""


MOST_NAMES = 3
"""Files that a caption names at once; more are behind a click."""


class Pictures:
    """Figures with their captions; each has ids of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count(1)

    def figure(self, drawn: Figure, caption: str, sources: Sequence[Path]) -> str:
        """A `<figure>`: the picture, what it shows, and the files that it was drawn from."""
        svg = figures.as_svg(drawn, f"p{next(self._numbers)}", caption)
        names = escape(", ".join(str(path.relative_to(self.folder)) for path in sources))
        origin = f"<small>From {names}.</small>"
        if len(sources) > MOST_NAMES:
            origin = f"<details><summary>From {len(sources)} files</summary><small>{names}.</small></details>"
        return f"<figure>{svg}<figcaption>{escape(caption)} {origin}</figcaption></figure>"

    def grid(self, drawn: Iterator[Captioned]) -> str:
        """All of them side by side, as many as fit; nothing if there is none."""
        parts = [self.figure(each, caption, sources) for each, caption, sources in drawn if each is not None]
        return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose first column names the rows; cells are HTML already."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    told = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table>{told}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


# Runs
def _paths(rows: Sequence[Row]) -> list[Path]:
    return [run.path for row in rows for run in row.runs]


def _spread(row: Row, name: str, digits: int = 2) -> str:
    """Mean, and standard deviation where there are several runs."""
    deviation = row.deviation(name)
    return f"<b>{row.mean(name):.{digits}f}</b>" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _row_head(row: Row) -> str:
    said = [row.name, *row.changes]
    return f"{escape(row.label)}<small>{escape(', '.join(said))}</small>"


def errors(table: Table) -> str:
    """HTML of a table: mean, deviation and number of runs of each row, beside the paper's value."""
    own, theirs = table.config["optim"]["epochs"], table.paper_epochs
    rows = [
        [
            _row_head(row),
            str(row.num_blocks) + (f"<small>{escape(row.recipe.label)}</small>" if row.recipe else ""),
            f"{_spread(row, 'test_error')}<small>n = {len(row.runs)}</small>",
            f"{row.mean('best_test_error'):.2f}",
            *(["" if row.paper_error is None else f"{row.paper_error:.2f}"] if theirs else []),
        ]
        for row in table.rows
    ]
    head = ["training", "blocks", "test error, %", "best, %", *(["paper, %"] if theirs else [])]
    notes = [
        "Test error: after the last epoch, mean ± standard deviation over n seeds. Best: at the epoch with the "
        "smallest error on the same test images, mean."
    ]
    if theirs:
        told = " and ".join(f"{epochs:,}" for epochs in theirs)
        notes.append(f"Paper: after {told} epochs" + ("." if theirs == [own] else f", these runs after {own:,}."))
    return (
        f"<h3>{escape(table.title)}</h3>"
        f'<p class="soft">{escape(_sentence(table.budget))} On {escape("; ".join(table.devices))}.</p>'
        + html_table(head, rows, escape(" ".join(notes)))
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _told(table: Table) -> str:
    return f"{table.title} ({table.budget})"


def curves(grouped: Sequence[Table]) -> Iterator[Captioned]:
    """A picture of learning curves for each table, with its caption."""
    for table in grouped:
        several = any(len(row.runs) > 1 for row in table.rows)
        band = " Lines are means over seeds, bands reach from the best to the worst seed." if several else ""
        runs = [run for row in table.rows for run in row.runs if run.metrics]
        caption = f"Test error of the whole network after each epoch: {_told(table)}.{band}"
        yield figures.learning_curves(table), caption, [run.path for run in runs]


def costs(grouped: Sequence[Table], speeds: Sequence[Sheet], pictures: Pictures) -> Iterator[str]:
    """HTML of memory, error and time of each table, with the picture that sets them against each other.

    Times are those of steps that took turns, where one of the files of step times has all rows of the table. The runs'
    own seconds and hours are of different moments, and stand there only without such a file.
    """
    for table in grouped:
        for device in table.devices:
            chosen = table.on(device)
            sources = _paths(list(chosen.values()))
            hours: dict[int, str] = {}
            sheet = next((sheet for sheet in speeds if _covers(sheet, chosen, device)), None)
            if sheet is None:
                seconds = {position: row.seconds_per_step for position, row in chosen.items()}
                hours = {position: f"{row.mean('wall_seconds') / 3600:.2f}" for position, row in chosen.items()}
                timed = "slowed by whatever else ran beside it"
                origin = (
                    "median of the steps of the last epoch, slowed by whatever else ran beside them (<code>localgrad "
                    "time</code> measures such rows in turns). Hours: training and evaluation, slowed likewise"
                )
            else:
                measured = _measured(sheet)
                seconds = {position: measured[_step(row)] for position, row in chosen.items()}
                timed = "measured in turns with those of the others"
                origin = f"median of steps that took turns, from {escape(str(sheet.path.relative_to(pictures.folder)))}"
                sources.append(sheet.path)
            head = ["training", "memory, MiB", "s a step", *(["hours"] if hours else []), "parameters"]
            rows = [
                [
                    escape(table.labels[position]),
                    f"{row.mean('peak_memory_bytes') / 2**20:,.1f}",
                    told_seconds(seconds[position]),
                    *([hours[position]] if hours else []),
                    _parameters(row),
                ]
                for position, row in chosen.items()
            ]
            caption = (
                f"Test error of all runs against the peak memory of a step on {device}: {_told(table)}. The area of a "
                f"point is the time of a step, which the legend has in seconds, {timed}; the dotted line joins the "
                "points that no other beats in both."
            )
            note = (
                f"Memory: the most that a step held in tensors beyond what was there before it. Seconds: {origin}. "
                "Parameters: of the network, and of auxiliary networks, which are there in training only."
            )
            yield f"<h3>{escape(table.title)}</h3>"
            yield f'<p class="soft">{escape(_sentence(table.budget))} On {escape(device)}.</p>'
            yield html_table(head, rows, note)
            if len(chosen) > 1:
                yield pictures.grid(iter([(figures.trade_off(table, device, seconds), caption, sources)]))


def _covers(sheet: Sheet, rows: Mapping[int, Row], device: str) -> bool:
    """Whether a file of step times has those of all rows, on that device."""
    return sheet.values.get("device") == device and {_step(row) for row in rows.values()} <= {*_measured(sheet)}


def _measured(sheet: Sheet) -> dict[str, float]:
    """Seconds of the steps that `localgrad time` measured, by `step_key`; none of another benchmark's."""
    return {
        step_key(row["config"], row["num_blocks"], row["num_classes"], row["precision"]): row["seconds_per_step"]
        for row in sheet.values["rows"]
        if "config" in row
    }


def _step(row: Row) -> str:
    return step_key(row.config, row.num_blocks, row.num_classes, row.precision)


def _parameters(row: Row) -> str:
    counted = row.runs[0].result.parameters
    auxiliary = counted["auxiliary"]
    return _short(counted["backbone"]) + (f" + {_short(auxiliary)}" if auxiliary else "")


def _short(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def local_heads(grouped: Sequence[Table]) -> Iterator[Captioned]:
    """A picture of the errors of the blocks' own heads for each table that has them."""
    for table in grouped:
        runs = [run for row in table.rows for run in row.runs if run.result.local_errors and row.num_blocks > 1]
        caption = (
            f"Test error of each block's own head after the last epoch, if the network ended there: {_told(table)}."
        )
        yield figures.local_heads(table), caption, [run.path for run in runs]


# Analyses
def _of(run: dict[str, Any]) -> str:
    return run_label(run["config"], run["num_blocks"])


def order_of(sheet: Sheet) -> tuple[Any, ...]:
    """What an analysis is sorted by: its run's place in the papers, seed and path."""
    run = sheet.values["runs"][0]
    return (*place(run["config"], run["num_blocks"]), run["config"]["seed"], str(sheet.path))


def _told_apart(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What each run trains, with the fields that differ where that is the same of several."""
    labels = list(map(_of, runs))
    told: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        others = [own_fields(other["config"]) for other, same in zip(runs, labels, strict=True) if same == label]
        own = {name: value for name, value in own_fields(run["config"]).items() if name != "name"}
        apart = [f"{name} {value}" for name, value in own.items() if any(other.get(name) != value for other in others)]
        told.append(", ".join([label, *(apart or [run["config"]["name"]] * (len(others) > 1))]))
    return told


def _named(run: dict[str, Any]) -> str:
    return f"{_of(run)} ({run['name']})"


def _where(values: dict[str, Any]) -> str:
    config = values["runs"][0]["config"]
    return f"{dataset_label(config)}, {network_label(config)}"


def probes(sheets: Sequence[Sheet], pictures: Pictures) -> Iterator[str]:
    """HTML of linear probes, a curve a run, for each network that was probed."""
    grouped: dict[str, list[Sheet]] = {}
    for sheet in sheets:
        grouped.setdefault(_setting(sheet), []).append(sheet)
    for group in grouped.values():
        group = sorted({_probed(sheet): sheet for sheet in group}.values(), key=order_of)
        trainings: dict[str, list[Sheet]] = {}  # of seeds
        for sheet in group:
            run = sheet.values["runs"][0]
            key = json.dumps([own_fields(run["config"]), run["num_blocks"]], sort_keys=True, default=str)
            trainings.setdefault(key, []).append(sheet)
        labels = _told_apart([same[0].values["runs"][0] for same in trainings.values()])
        curves = ([sheet.values["accuracies"] for sheet in same] for same in trainings.values())
        series = dict(zip(labels, curves, strict=True))
        values = group[0].values
        where, units, trained = _where(values), values["units"], values["runs"][0]["config"]["optim"]["epochs"]
        runs = "; ".join(_named(sheet.values["runs"][0]) for sheet in group)
        caption = (
            f"Accuracy of a linear probe on the pooled features of every unit, the network frozen, on "
            f"{values['data']['test_images']:,} test images{_probe_training(values)}: {where}, trained for {trained} "
            f"epochs. Runs: {runs}."
        )
        drawn = drawings.probe_curves(units, series)
        yield pictures.grid(iter([(drawn, caption, [sheet.path for sheet in group])]))
        means = {label: [sum(each) / len(each) for each in zip(*runs, strict=True)] for label, runs in series.items()}
        rows = [[escape(unit), *(f"{mean[i]:.2f}" for mean in means.values())] for i, unit in enumerate(units)]
        table = html_table(["unit", *map(escape, means)], rows, "Accuracy in percent, mean over runs.")
        yield f"<details><summary>The same as a table</summary>{table}</details>"


def _setting(sheet: Sheet) -> str:
    """What the probes of a picture have in common: network and budget, and how they were trained and tested."""
    values, run = sheet.values, sheet.values["runs"][0]["config"]
    budget = {name: value for name, value in flat(run).items() if name in BUDGET}
    images = {name: value for name, value in values["data"].items() if name not in ("source", "name")}
    common = (_where(values), budget, images, values.get("settings"), values["units"])
    return json.dumps(common, sort_keys=True, default=str)


def _probed(sheet: Sheet) -> str:
    """The run of a probe, which may be in several files."""
    config = sheet.values["runs"][0]["config"]
    return json.dumps([own_fields(config), config["seed"]], sort_keys=True, default=str)


def _probe_training(values: dict[str, Any]) -> str:
    settings = values.get("settings") or {}
    epochs, images = settings.get("epochs"), settings.get("train_images")
    if epochs is None or images is None:
        return ""
    return f", after {epochs} epoch{'s' * (epochs != 1)} on {images:,} training images"


def alignments(sheets: Sequence[Sheet], pictures: Pictures) -> str:
    """HTML of the CKA maps, with their mean diagonals as a table."""
    if not sheets:
        return ""
    rows = [
        [
            f"{escape(_of(values['runs'][0]))}<small>{escape(values['runs'][0]['name'])}</small>",
            f"{escape(_of(values['runs'][1]))}<small>{escape(values['runs'][1]['name'])}</small>",
            "" if values["mean_diagonal"] is None else f"<b>{values['mean_diagonal']:.3f}</b>",
        ]
        for values in (sheet.values for sheet in sheets)
    ]
    note = "CKA of the same unit in both networks, mean over all units; 1 is equal up to rotation and scale."
    return html_table(["network", "compared with", "mean CKA"], rows, note) + pictures.grid(_maps(sheets))


def _maps(sheets: Sequence[Sheet]) -> Iterator[Captioned]:
    for sheet in sheets:
        first, second = map(_named, sheet.values["runs"])
        caption = (
            f"Linear CKA (minibatch, unbiased) between every unit of {first}, upwards, and every unit of {second}, to "
            f"the right, on {sheet.values['data']['test_images']:,} test images: {_where(sheet.values)}."
        )
        yield drawings.alignment_map(sheet.values), caption, [sheet.path]


def features(sheets: Sequence[Sheet]) -> Iterator[Captioned]:
    """Pictures of features, each with its caption."""
    for sheet in sheets:
        values, run = sheet.values, sheet.values["runs"][0]
        labels = ", ".join(map(str, values["image_labels"]))
        maps = (
            f"Mean over the channels of each unit's features, from the least (black) to the most (yellow) of each map, "
            f"for test images of the classes {labels}: {_where(values)}, {_named(run)}."
        )
        method = {"pca": "the first two principal components", "tsne": "t-SNE"}
        projection = values["settings"]["projection"]
        clouds = (
            f"Pooled features of {len(values['point_labels']):,} test images after each unit, in two dimensions by "
            f"{method.get(projection, projection)}, a color a class: {_where(values)}, {_named(run)}."
        )
        yield drawings.activation_pictures(values), maps, [sheet.path]
        yield drawings.feature_clouds(values), clouds, [sheet.path]


# Plans and times
def plans(sheets: Sequence[Sheet]) -> Iterator[Captioned]:
    """A picture of planned memory over the number of blocks for each plan."""
    for sheet in sheets:
        caption = (
            f"Predicted peak memory of a step over the number of blocks: {sheet.values['title']}. Dashed: activation "
            "checkpointing of every unit. Weights, gradients, optimizer, activations and auxiliary networks count."
        )
        yield figures.planned_peaks(sheet.values), caption, [sheet.path]


def speeds(sheets: Sequence[Sheet]) -> Iterator[Captioned]:
    """A picture of seconds a step for each table of them."""
    for sheet in sheets:
        settings = ", ".join(f"{name.replace('_', ' ')} {_words(value)}" for name, value in _settings(sheet.values))
        caption = f"Seconds of one training step, side by side on {sheet.values.get('device', 'one machine')}"
        yield figures.step_times(sheet.values), f"{caption}: {settings}." if settings else f"{caption}.", [sheet.path]


def _settings(values: dict[str, Any]) -> list[tuple[str, Any]]:
    settings = values.get("settings")
    return [each for each in settings.items() if each[1] is not None] if isinstance(settings, dict) else []


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def files(found: Results, folder: Path) -> str:
    """HTML of the list of files that the page was made from."""
    origins = [(run.path, vars(run.result)) for run in found.runs]
    sheets = [*found.probes, *found.alignments, *found.pictures, *found.plans, *found.speeds]
    origins += [(sheet.path, sheet.values) for sheet in sheets]
    rows = [
        [
            escape(str(path.relative_to(folder))),
            f'<span class="soft">{escape(str(values.get("commit") or "")[:12])}</span>',
            escape(str((values.get("versions") or {}).get("torch", ""))),
            escape(str(values.get("device", ""))),
        ]
        for path, values in sorted(origins)
    ]
    table = html_table(["file", "commit", "torch", "device"], rows, "Every figure of this page comes from these files.")
    return f"<details><summary>{len(rows)} files</summary>{table}</details>"
