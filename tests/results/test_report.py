"""The report: its figures are those of the files, and it is a page that a browser shows without a complaint."""

import json
import os
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import CHROMIUM, Tab, chromium
from localgrad.commands.main import main
from localgrad.config.methods import with_defaults
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.recipes import recipe
from localgrad.results.figures import learning_curves, step_times, trade_off
from localgrad.results.read import Results, read_results
from localgrad.results.report import page
from localgrad.results.tables import method_label, tables
from localgrad.runs.folder import atomic_write
from localgrad.runs.result import Result

DEVICE = '<script>alert(1)</script> & "GPU"'
UNITS = ["conv1", "layer1.0", "layer2.0", "fc"]
RESULTS = Path(__file__).parents[2] / "results"


def _config(name: str, *, epochs: int = 10, seed: int = 0, **changes: Any) -> TrainConfig:
    config = with_defaults(recipe(name).config)
    return replace(config, seed=seed, optim=replace(config.optim, epochs=epochs), **changes)


def _run(path: Path, config: TrainConfig, error: float, **other: Any) -> dict[str, Any]:
    """A result file as `train` writes it, with a line of metrics an epoch."""
    blocks = len(config.cuts or ()) + 1
    result = Result(
        config=to_dict(config),
        test_error=error,
        best_test_error=error - 0.5,
        best_epoch=2,
        local_errors=[error + 1.0] * (blocks - 1) + [error] if blocks > 1 else None,
        cuts=list(config.cuts or ()),
        num_blocks=blocks,
        parameters={"backbone": 466_906, "auxiliary": 123_456 * (blocks > 1), "trainable": 590_362},
        peak_memory_bytes=round((1 + 10 / blocks) * 2**20),
        seconds_per_step=0.1 * blocks,
        wall_seconds=3600.0,
        device=DEVICE,
        precision="32-true",
        versions={"torch": "2.11"},
        commit="0123456789abcdef",
    )
    values = {**asdict(result), **other}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    lines = [{"epoch": epoch, "test_error": error * (1 + 2 / epoch)} for epoch in range(1, 4)]
    beside = path.with_name("metrics.jsonl") if path.name == "result.json" else path.with_suffix(".jsonl")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return values


def _about(*names: str) -> dict[str, Any]:
    runs = [{"name": f"{name}-seed0", "num_blocks": 15, "config": to_dict(_config(name))} for name in names]
    data = {"source": "cifar10", "test_split": "test", "test_images": 10_000}
    return {"runs": runs, "data": data, "device": DEVICE, "versions": {}, "commit": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, flat results, analyses, a plan and step times."""
    folder = tmp_path_factory.mktemp("results")
    man = "cifar10-resnet32-k16-dgl-man"
    for seed, error in enumerate((30.25, 31.5, 29.0)):
        _run(folder / f"{man}-seed{seed}" / "result.json", _config(man, seed=seed), error)
    _run(folder / "flat" / "e2e.json", _config("cifar10-resnet32-e2e"), 20.125)
    _run(folder / "flat" / "checkpointed.json", _config("cifar10-resnet32-e2e", recompute=True), 20.125)
    changed = _config(man)
    changed = replace(changed, momentum=replace(changed.momentum, decay=0.9))
    _run(folder / "flat" / "decay.json", changed, 33.75)
    _run(folder / "digits.json", _config("digits-dgl", epochs=8), 5.5)
    probed = {"analysis": "probe", **_about(man), "settings": {"train_images": 50_000}, "units": UNITS}
    accuracies = [40.0, 51.23, 62.5, 71.0]
    (folder / "probe.json").write_text(json.dumps({**probed, "blocks": [1, 1, 2, 3], "accuracies": accuracies}))
    alignment = [[1.0, 0.5, None, 0.1] for _ in UNITS]
    compared = {**_about(man, "cifar10-resnet32-e2e"), "units": UNITS, "other_units": UNITS, "alignment": alignment}
    (folder / "cka.json").write_text(json.dumps({"analysis": "cka", **compared, "mean_diagonal": 0.4321}))
    maps = [[[[0.1, 0.2], [0.3, 0.4]]] * 2, [[[0.5]]] * 2, [[[1.0]]] * 2, None]
    drawn = {**_about(man), "units": UNITS, "blocks": [1, 1, 2, 3], "settings": {"projection": "pca"}, "maps": maps}
    drawn |= {"image_labels": [3, 7], "thumbnails": [[[[9, 9, 9]]]] * 2, "point_labels": [0, 1, 2]}
    drawn |= {"points": [[[0, 0], [1, 1], [2, 0]]] * 4}
    (folder / "pictures.json").write_text(json.dumps({"analysis": "pictures", **drawn}))
    for name in ("speed.json", "plan-resnet101"):
        copy = shutil.copytree if (RESULTS / name).is_dir() else shutil.copy
        copy(RESULTS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    found, warnings = _read(folder)
    assert warnings == []
    return page(found, folder)


def _read(folder: Path) -> tuple[Results, list[str]]:
    warnings: list[str] = []
    return read_results(folder, warnings.append), warnings


class Cells(HTMLParser):
    """The texts of a page's table cells, a list a row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = self._inside or tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "small" and self._inside:
            self.rows[-1][-1] += "|"

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


# What the page says


def test_the_tables_hold_the_figures_of_the_files(text: str) -> None:
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    errors = [30.25, 31.5, 29.0]
    mean, deviation = statistics.fmean(errors), statistics.stdev(errors)
    main_row = rows["DGL + MAN|cifar10-resnet32-k16-dgl-man"]
    assert main_row == ["15|K=16", f"{mean:.2f} ± {deviation:.2f}|n = 3", f"{mean - 0.5:.2f}", "9.11"]
    assert rows["End-to-end|cifar10-resnet32-e2e"] == ["1|E2E", "20.12|n = 1", "19.62", "6.37"]
    assert rows["DGL|digits-dgl"] == ["6|K=6", "5.50|n = 1", "5.00"], "no paper has it, so its table has no such column"
    assert rows["DGL + MAN, 15 blocks"] == ["1.7", "1.50", "1.00", "467k + 123k"]
    assert rows["layer1.0"] == ["51.23"]
    assert rows["DGL + MAN, 15 blocks|cifar10-resnet32-k16-dgl-man-seed0"][-1] == "0.432"


def test_a_run_that_is_no_row_of_the_paper_gets_none_of_its_figures(text: str) -> None:
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    name = "DGL + MAN (decay 0.9)|cifar10-resnet32-k16-dgl-man, momentum.decay 0.9"
    assert rows[name] == ["15|K=16", "33.75|n = 1", "33.25", ""]
    assert rows["End-to-end (checkpointed)|cifar10-resnet32-e2e"][-1] == "6.37", "the same weights in less memory"


def test_the_budget_is_said_beside_the_papers(text: str) -> None:
    text = unescape(text)
    assert "10 epochs, all training images, batch size 1,024, learning rate 0.8, warm-up epochs 10, 32-true." in text
    assert f"On {DEVICE}." in text
    assert "Paper: after 400 epochs, these runs after 10." in text


def test_runs_of_another_budget_stand_in_another_table(folder: Path) -> None:
    runs = _read(folder)[0].runs
    long = replace(runs[0].result, config=to_dict(_config("cifar10-resnet32-k16-dgl-man", epochs=400)))
    found = tables([*runs, replace(runs[0], result=long)])
    assert [(table.title, table.config["optim"]["epochs"], len(table.rows)) for table in found] == [
        ("CIFAR-10, ResNet-32", 400, 1),
        ("CIFAR-10, ResNet-32", 10, 4),
        ("Digits, ResNet-14", 8, 1),
    ]


def test_precisions_do_not_mix(folder: Path) -> None:
    """What `auto` is depends on the device, so one config may have been trained in two."""
    runs = [run for run in _read(folder)[0].runs if run.path.parent.name.startswith("cifar10")]
    halved = replace(runs[0], result=replace(runs[0].result, precision="bf16-mixed"))
    found = tables([halved, *runs[1:]])
    assert [table.budget.rpartition(", ")[2] for table in found] == ["32-true", "bf16-mixed"]
    assert [[len(row.runs) for row in table.rows] for table in found] == [[2], [1]]


def test_rows_come_in_the_order_of_the_papers(folder: Path) -> None:
    labels = [row.label for row in tables(_read(folder)[0].runs)[0].rows]
    assert labels == ["End-to-end", "End-to-end (checkpointed)", "DGL + MAN", "DGL + MAN (decay 0.9)"]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "DGL + MAN"),
        ({"ema": False}, "DGL + MAN (bias only)"),
        ({"bias": False}, "DGL + MAN (EMA only)"),
        ({"bias": False, "decay": 0.0}, "DGL + MAN (EMA only, direct use)"),
        ({"form": "fused", "initial": "random", "depth": 2}, "DGL + MAN (fused, random start, depth 2)"),
    ],
)
def test_labels_of_the_ablations(changes: dict[str, Any], label: str) -> None:
    config = _config("cifar10-resnet32-k16-dgl-man")
    assert method_label(to_dict(replace(config, momentum=replace(config.momentum, **changes)))) == label


def test_everything_is_escaped_and_nothing_is_loaded(text: str) -> None:
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;GPU&quot;" in text
    sources = re.findall(r'\b(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"', text)
    assert sources
    assert all(source.startswith(("#", "data:")) for source in sources), set(sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_there_once_and_links_lead_somewhere(text: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 50
    targets = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert {*targets} <= {*ids}


def test_every_picture_has_a_caption_and_says_where_it_is_from(text: str, folder: Path) -> None:
    pictures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(pictures) == text.count("<svg ") == 11, "none of costs with one row"
    for picture in pictures:
        described = re.search(r'<svg role="img" aria-label="([^"]{40,})"', picture)
        caption = re.search(
            r"<figcaption>(.{40,}?) <(?:small|details)>.*?([^ >]+\.json.*)\.</small>", picture, re.DOTALL
        )
        assert described
        assert caption
        assert described[1] == caption[1]
        names = [unescape(name) for name in caption[2].split(", ")]
        assert all((folder / name).exists() for name in names)
        assert len(names) <= 3 or f"<summary>From {len(names)} files</summary>" in picture


def test_sections_without_data_are_left_out(text: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "digits.json", tmp_path / "digits.json")
    titles = re.findall(r"<h2>(.*?)</h2>", page(_read(tmp_path)[0], tmp_path))
    assert titles == ["Test errors", "Memory, error and time", "Local heads", "Files"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Test errors",
        "Learning curves",
        "Memory, error and time",
        "Local heads",
        "Linear separability",
        "Similarity of features (CKA)",
        "Pictures of features",
        "Planned memory",
        "Time of a step",
        "Files",
    ]


def test_the_results_of_this_repository_make_a_page() -> None:
    found, warnings = _read(RESULTS)
    assert warnings == []
    assert len(found.plans) >= 1
    assert len(found.speeds) >= 1
    assert "Time of a step" in page(found, RESULTS)


def test_a_time_is_shown_with_its_settings_and_without_those_that_were_not_set(text: str) -> None:
    settings = json.loads((RESULTS / "speed.json").read_text())["settings"]
    assert settings["rows"] is None
    assert f"network resnet32, batch size 128, rounds {settings['rounds']}, threads {settings['threads']}." in text


# What cannot be read


def _damaged(folder: Path) -> dict[str, str]:
    """Files of many kinds of damage, and what is said of each."""
    good = _run(folder / "good.json", _config("digits-e2e"), 4.0)
    texts = {
        "cut.json": json.dumps(good)[:100],
        "nan.json": json.dumps({**good, "test_error": float("nan")}),
        "text.json": json.dumps({**good, "test_error": "4.0"}),
        "lacks.json": json.dumps({name: value for name, value in good.items() if name != "device"}),
        "list.json": json.dumps({**good, "config": [1]}),
        "large.json": json.dumps({**good, "test_error": 10**400}),
        "heads.json": json.dumps({**good, "local_errors": [1.0, 2.0]}),
        "probe.json": json.dumps({"analysis": "probe", **_about("digits-e2e"), "units": UNITS, "accuracies": [1.0]}),
        "kind.json": json.dumps({"analysis": "umap", **_about("digits-e2e"), "units": UNITS}),
        "plan.json": json.dumps(
            {"title": "x", "rows": [{"peak": None, "training": "", "num_blocks": 1, "recompute": 0}]}
        ),
    }
    texts["times.json"] = json.dumps({"rows": [{"row": "x", "seconds_per_step": 1.0, "config": {"name": ""}}]})
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe{}")
    return {
        "cut.json": "is not readable as JSON",
        "nan.json": "NaN is no number of JSON",
        "text.json": "test_error is '4.0', not a number",
        "lacks.json": "it has no 'device'",
        "list.json": "is damaged",
        "probe.json": "accuracies must be a list of 4",
        "kind.json": "it has no 'umap'",
        "plan.json": "peak is None, not a number",
        "times.json": "it has no 'num_blocks'",
        "bytes.json": "is not readable as JSON",
        "large.json": "test_error is far too large",
        "heads.json": "local_errors must be a list of 1",
    }


def test_damaged_files_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = _damaged(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("[1, 2]")
    output = tmp_path / "pages" / "report.html"
    assert main(["report", str(tmp_path), "-o", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {output}\n"
    lines = said.err.splitlines()
    assert len(lines) == len(expected) + 1
    for name, reason in expected.items():
        (line,) = [line for line in lines if str(tmp_path / name) in line]
        assert line.startswith("localgrad: left out: ")
        assert reason in line
    assert lines[-1] == "localgrad: left out, no result that is known: other.json"
    rows = {row[0]: row[1:] for row in Cells(output.read_text()).rows}
    assert rows["End-to-end|digits-e2e"][1] == "4.00|n = 1"
    assert len(_read(tmp_path)[0].runs) == 1


def test_a_run_too_short_for_its_seconds_is_shown_without_them(tmp_path: Path) -> None:
    _run(tmp_path / "short" / "result.json", _config("digits-dgl"), 5.5, seconds_per_step=None)
    found, warnings = _read(tmp_path)
    assert warnings == []
    assert "<td>-</td>" in page(found, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("device", None), ("local_errors", {"a": 1}), ("config.optim.lr", "a")])
def test_a_field_that_cannot_be_drawn_costs_its_own_file_only(
    field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path / "whole.json", _config("digits-dgl"), 5.5)
    values = _run(tmp_path / "other.json", _config("digits-dgl-man"), 4.25)
    *parents, last = field.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    part[last] = value
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert f"left out: {tmp_path / 'other.json'} is damaged" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text()
    assert "5.50" in text
    assert "4.25" not in text


def test_a_damaged_line_of_metrics_costs_that_line_only(tmp_path: Path) -> None:
    _run(tmp_path / "run" / "result.json", _config("digits-e2e"), 4.0)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "test_er')
    found, warnings = _read(tmp_path)
    assert [line["epoch"] for line in found.runs[0].metrics] == [1, 2, 3]
    assert len(warnings) == 1
    assert "metrics.jsonl, line 4, is damaged" in warnings[0]


def test_a_copy_of_a_run_is_counted_once(tmp_path: Path) -> None:
    _run(tmp_path / "run" / "result.json", _config("digits-e2e"), 4.0)
    shutil.copy(tmp_path / "run" / "result.json", tmp_path / "copy.json")
    moved = json.loads((tmp_path / "copy.json").read_text())
    moved["config"]["data"]["source"] = "where/the/images/lie/elsewhere"
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    found, warnings = _read(tmp_path)
    assert [run.path.name for run in found.runs] == ["copy.json"]
    assert warnings == []


def test_a_seed_counts_once_in_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed, error in (("a", 0, 4.0), ("b", 1, 6.0), ("again", 0, 9.0)):
        values = _run(tmp_path / name / "result.json", _config("cifar10-resnet32-e2e", seed=seed), error)
        if name == "b":  # of a version without this field
            del values["config"]["cuda_graph"]
            (tmp_path / name / "result.json").write_text(json.dumps(values))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    again = tmp_path / "again" / "result.json"
    first = tmp_path / "a" / "result.json"
    assert f"left out: {again} has the settings and the seed of {first}; it counts once" in capsys.readouterr().err
    rows = {row[0]: row[1:] for row in Cells((tmp_path / "page.html").read_text()).rows}
    assert rows["End-to-end|cifar10-resnet32-e2e"][1] == "5.00 ± 1.41|n = 2"


def test_runs_on_other_images_are_another_row_and_get_no_figure_of_the_paper(tmp_path: Path) -> None:
    config = _config("cifar10-resnet32-e2e")
    _run(tmp_path / "ten.json", config, 4.0, num_classes=10)
    _run(tmp_path / "three.json", replace(config, seed=1), 5.0, num_classes=3)
    _run(tmp_path / "few.json", replace(config, data=replace(config.data, test_limit=50)), 6.0)
    _run(tmp_path / "digits.json", _config("digits-e2e", data=replace(config.data, source="my/digits")), 7.0)
    text = page(_read(tmp_path)[0], tmp_path)
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    assert rows["End-to-end|cifar10-resnet32-e2e"][3] == "6.37"
    assert rows["End-to-end|cifar10-resnet32-e2e, 3 classes"][1:] == ["5.00|n = 1", "4.50", ""]
    assert "warm-up epochs 10, 50 test images, 32-true." in text
    assert any("data.source my/digits" in name for name in rows)


def test_rows_are_told_apart_in_pictures_and_costs(tmp_path: Path) -> None:
    config = _config("cifar10-resnet32-k16-dgl")
    _run(tmp_path / "as-it-is.json", config, 4.0)
    _run(tmp_path / "decayed.json", replace(config, optim=replace(config.optim, weight_decay=0.01)), 5.0)
    (table,) = tables(_read(tmp_path)[0].runs)
    assert sorted(table.labels) == ["DGL, 15 blocks", "DGL, 15 blocks, optim.weight_decay 0.01"]
    names = [row[0] for row in Cells(page(_read(tmp_path)[0], tmp_path)).rows]
    assert {*table.labels} <= {*names}


def test_sets_of_images_are_rows_of_their_own(tmp_path: Path) -> None:
    digits, nameless = _config("digits-e2e"), replace(_config("cifar10-resnet32-e2e"), name="")
    for config, sources in ((digits, ("digits", "my/mnist")), (nameless, ("my/cifar10", "my/svhn"))):
        for error, source in enumerate(sources, start=4):
            _run(tmp_path / f"{source}.json", replace(config, data=replace(config.data, source=source)), error)
    named = _config("cifar10-resnet32-k16-dgl", seed=0)
    for seed, source in enumerate(("here/cifar10", "there/cifar10")):
        _run(tmp_path / f"{seed}.json", replace(named, seed=seed, data=replace(named.data, source=source)), 5.0)
    found = _read(tmp_path)[0].runs
    rows = [(table.title, len(row.runs)) for table in tables(found) for row in table.rows]
    assert sorted(rows) == [
        *(("CIFAR-10, ResNet-32", count) for count in (1, 2)),
        *(("Digits, ResNet-14", 1),) * 2,
        ("SVHN, ResNet-32", 1),
    ]


def test_what_does_not_change_the_weights_leaves_the_papers_figure(tmp_path: Path) -> None:
    config = _config("cifar10-resnet32-k16-dgl")
    for seed, changes in enumerate(({"keep_checkpoints": 1}, {"max_skips": 3}, {"step_each_block": True})):
        _run(tmp_path / f"{seed}.json", replace(config, seed=seed, **changes), 4.0)
    (table,) = tables(_read(tmp_path)[0].runs)
    assert [(row.full_label, len(row.runs), row.paper_error) for row in table.rows] == [
        ("DGL, 15 blocks", 2, 14.08),
        ("DGL (block by block), 15 blocks", 1, 14.08),
    ]


def test_probes_of_other_trainings_are_other_curves(tmp_path: Path) -> None:
    config = _config("cifar10-resnet32-k16-dgl")
    decayed = replace(config, optim=replace(config.optim, weight_decay=0.1))
    seeds = [config, replace(config, seed=1), decayed]
    for number, (each, accuracy) in enumerate(zip(seeds, (40.0, 60.0, 90.0), strict=True)):
        values = {"analysis": "probe", "units": UNITS, "blocks": [1, 1, 2, 3], "accuracies": [accuracy] * 4}
        values |= _about("cifar10-resnet32-k16-dgl") | {"settings": {}}
        values["runs"][0]["config"] = to_dict(each)
        (tmp_path / f"{number}.json").write_text(json.dumps(values))
    text = unescape(page(_read(tmp_path)[0], tmp_path))
    before = f"optim.weight_decay {config.optim.weight_decay}"
    head, first = re.findall(r"<tr>.*?</tr>", text[text.index("mean over runs") - 2000 :], re.DOTALL)[:2]
    assert re.findall(r"DGL[^<]*", head) == [f"DGL, 15 blocks, {before}", "DGL, 15 blocks, optim.weight_decay 0.1"]
    assert re.findall(r"\d+\.\d\d", first) == ["50.00", "90.00"]


def test_the_trade_off_has_the_errors_of_the_table(tmp_path: Path) -> None:
    """Costs of two devices cannot be compared, errors can."""
    for number, (name, device) in enumerate((("dgl", DEVICE), ("dgl", "another"), ("dgl-man", DEVICE))):
        config = _config(f"cifar10-resnet32-k16-{name}", seed=number)
        _run(tmp_path / f"{number}.json", config, 10.0 * (number + 1), device=device)
    (table,) = tables(_read(tmp_path)[0].runs)
    drawn = trade_off(table, DEVICE, {0: 0.5, 1: None}).axes[0].collections
    assert [float(points.get_offsets()[0][1]) for points in drawn if hasattr(points, "get_sizes")] == [15.0, 30.0]  # pyright: ignore


def _times(path: Path, configs: Sequence[tuple[TrainConfig, float]], device: str = DEVICE) -> None:
    """A file of step times as `time` writes it."""
    rows = [
        {
            "row": f"row {number}",
            "seconds_per_step": seconds,
            "ratio_to_first": 1.0,
            "num_blocks": len(config.cuts or ()) + 1,
            "num_classes": 10,
            "precision": "32-true",
            "config": to_dict(config),
        }
        for number, (config, seconds) in enumerate(configs)
    ]
    path.write_text(json.dumps({"settings": {"rounds": 3}, "rows": rows, "seconds": {}, "device": device}))


def test_times_that_were_measured_in_turns_stand_instead_of_the_runs_own(tmp_path: Path) -> None:
    """They are those of the same steps in any budget, but for all rows of a table or for none, and on its device."""
    whole, man = _config("cifar10-resnet32-e2e"), _config("cifar10-resnet32-k16-dgl-man")
    _run(tmp_path / "whole.json", whole, 20.0)
    _run(tmp_path / "man.json", man, 30.0)
    _run(tmp_path / "man1.json", replace(man, seed=1), 30.0)

    def shown() -> tuple[str, list[str], str]:
        found, warnings = _read(tmp_path)
        assert warnings == []
        text = unescape(page(found, tmp_path))
        text = text[text.index("<h2>Memory, error and time") : text.index("<h2>Local heads")]
        rows = {row[0]: row[2] for row in Cells(text).rows}
        return text, [rows["End-to-end"], rows["DGL + MAN, 15 blocks"]], text[text.rindex("From ") :]

    longer = replace(whole, seed=5, optim=replace(whole.optim, epochs=99, lr=0.3, first_epoch=0))
    other_batch = replace(man, optim=replace(man.optim, batch_size=7))
    checkpointed = replace(man, recompute=True)
    for configs, device in (
        ([(longer, 0.25)], DEVICE),
        ([(longer, 0.25), (other_batch, 0.75)], DEVICE),
        ([(longer, 0.25), (checkpointed, 0.75)], DEVICE),
        ([(longer, 0.25), (replace(man, devices=2), 0.75)], DEVICE),
        ([(longer, 0.25), (replace(man, data=replace(man.data, train_limit=5)), 0.75)], DEVICE),
        ([(longer, 0.25), (man, 0.75)], "another"),
    ):
        _times(tmp_path / "step-times.json", configs, device)
        text, seconds, origin = shown()
        assert seconds == ["0.100", "1.50"]
        assert "slowed by whatever else ran beside" in text
        assert ">hours<" in text
        assert "step-times.json" not in origin
    _times(tmp_path / "step-times.json", [(longer, 0.25), (man, 0.75)])
    text, seconds, origin = shown()
    assert seconds == ["0.250", "0.750"]
    assert "median of steps that took turns, from step-times.json" in text
    assert "measured in turns with those of the others" in text
    assert "step-times.json" in origin
    assert ">hours<" not in text  # which are of the runs
    assert "0.750 s" in text
    assert "1.50 s" not in text


def test_a_long_name_leaves_room_for_its_bar() -> None:
    name = "Digits, ResNet-14, DGL + MAN (bias only, fused, depth 2), 15 blocks, optim.weight_decay 0.01, batch size 8"
    figure = step_times({"rows": [{"row": name, "seconds_per_step": 1.0}, {"row": "e2e", "seconds_per_step": 0.5}]})
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.4
    assert " ".join(figure.axes[0].get_yticklabels()[0].get_text().split()) == name


def test_a_seed_without_metrics_does_not_take_the_curve_of_the_others(folder: Path, tmp_path: Path) -> None:
    for seed, errors in ((0, [9.0, 4.0]), (1, [])):
        _run(tmp_path / f"{seed}.json", _config("digits-e2e", seed=seed), 4.0, test_errors=errors)
    (table,) = tables(_read(tmp_path)[0].runs)
    drawn = learning_curves(table)
    assert drawn is not None
    assert [line.get_ydata().tolist() for line in drawn.axes[0].lines] == [[9.0, 4.0]]  # pyright: ignore


def test_probes_of_other_settings_are_other_pictures_and_a_run_counts_once(tmp_path: Path) -> None:
    base = {"analysis": "probe", "units": UNITS, "blocks": [1, 1, 2, 3], "accuracies": [40.0, 50.0, 60.0, 70.0]}
    few, many = ({"train_images": n, "epochs": 5, "batch_size": 256} for n in (1_000, 50_000))
    for name, settings in (("one", few), ("again", few), ("other", many)):
        values = base | _about("cifar10-resnet32-k16-dgl") | {"settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    text = unescape(page(_read(tmp_path)[0], tmp_path))
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 2
    for images in ("1,000", "50,000"):
        (caption,) = [caption for caption in captions if f"after 5 epochs on {images} training images" in caption]
        assert caption.count("cifar10-resnet32-k16-dgl-seed0") == 1


def test_results_in_linked_folders_are_found_once(tmp_path: Path) -> None:
    _run(tmp_path / "elsewhere" / "run" / "result.json", _config("digits-e2e"), 4.0)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "results" / "loop").symlink_to(tmp_path / "results")
    found, warnings = _read(tmp_path / "results")
    assert [run.path for run in found.runs] == [tmp_path / "results" / "link" / "result.json"]
    assert warnings == []


def test_a_page_is_written_through_a_link_and_into_what_is_no_file(tmp_path: Path) -> None:
    _run(tmp_path / "results" / "one.json", _config("digits-e2e"), 4.0)
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    assert main(["report", str(tmp_path / "results"), "-o", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert "<b>4.00</b>" in (tmp_path / "page.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as file:
        file.write(b"page")
    assert os.read(reading, 9) == b"page"
    os.close(reading)
    assert not (tmp_path / "pipe").is_file()


def test_names_and_metrics_that_cannot_be_read_cost_nothing_else(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.json")
    _run(tmp_path / name, _config("digits-e2e"), 4.0)
    (tmp_path / name).with_suffix(".jsonl").unlink()
    (tmp_path / name).with_suffix(".jsonl").mkdir()
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "<b>4.00</b>" in (tmp_path / "page.html").read_text()


def test_errors_by_epoch_may_be_in_the_result_itself(tmp_path: Path) -> None:
    _run(tmp_path / "one.json", _config("digits-e2e"), 4.0, test_errors=[9.0, None, 4.0])
    found, _ = _read(tmp_path)
    assert found.runs[0].metrics == [
        {"epoch": 1, "test_error": 9.0},
        {"epoch": 2, "test_error": None},
        {"epoch": 3, "test_error": 4.0},
    ]
    assert "Learning curves" in page(found, tmp_path)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_to_show_is_an_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path / name), "-o", str(output)]) == 2
    assert ("has no results" if name == "empty" else "is not a folder") in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(LocalGradError):
        _read(tmp_path / name)


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no chromium in PATH: the page was not looked at in a browser")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def written(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    output.write_text(text)
    return output


IMAGES = """Promise.all([...document.querySelectorAll('svg image, img')].map(async (element) => {
  const image = new Image();
  image.src = element.getAttribute('href') || element.getAttribute('xlink:href') || element.src;
  try { await image.decode(); } catch { return 0; }
  return image.naturalWidth;
}))"""
PICTURES = """[...document.querySelectorAll('figure > svg')].map((svg) => {
  const box = svg.getBoundingClientRect();
  return [box.width, box.height, svg.querySelectorAll('path, image, use, text').length];
})"""


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_a_browser_shows_the_page_without_a_complaint(tab: Tab, written: Path, width: int, dark: bool) -> None:
    tab.open(written, width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == []
    assert tab.run("document.compatMode") == "CSS1Compat"
    assert tab.run("document.documentElement.scrollWidth") <= width
    tables = "[...document.querySelectorAll('section > .wide')].map((each) => each.scrollWidth - each.clientWidth)"
    assert tab.run(tables) == [0] * 5, "no table of errors, costs or CKA needs to be scrolled"
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    loaded = tab.run(IMAGES)
    assert len(loaded) >= 10
    assert min(loaded) > 0
    for box in tab.run(PICTURES):
        assert box[0] > 200, box
        assert box[1] > 100, box
        assert box[2] > 10, box
    assert tab.complaints() == []


def test_ink_and_paper_differ_by_day_by_night_and_in_print(tab: Tab, written: Path) -> None:
    body = "getComputedStyle(document.body)"
    texts = "[...document.querySelectorAll('svg text')].map((text) => getComputedStyle(text).fill)"
    on_colors = {"rgb(255, 255, 255)", "rgb(17, 17, 17)"}  # figures in the fields of a map
    seen = {}
    for name, look in {"day": {}, "night": {"dark": True}, "print": {"dark": True, "media": "print"}}.items():
        tab.open(written, **look)
        paper, ink, letters = tab.run(f"[{body}.backgroundColor, {body}.color, {texts}]")
        assert {*letters} - on_colors == {ink}, "pictures take the ink of the page"
        seen[name] = _brightness(paper), _brightness(ink)
    assert seen["day"][0] > 230 > 60 > seen["day"][1]
    assert seen["night"][0] < 60 < 200 < seen["night"][1]
    assert seen["print"] == seen["day"]


def _brightness(color: str) -> float:
    return statistics.fmean(map(float, re.findall(r"[\d.]+", color)[:3]))


def test_the_browser_would_complain(tab: Tab, written: Path, tmp_path: Path) -> None:
    """What the tests above look for is seen where it is there."""
    text = written.read_text()
    bad = '<img src="https://localhost:9/x.png"><script>1</script><div style="width: 900px">wide</div>'
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</main>", f"{bad}</main>"))
    tab.open(broken, width=390)
    assert len(tab.complaints()) >= 2
    assert tab.run("document.documentElement.scrollWidth") > 390
    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv.*?>", "", broken.read_text()))
    tab.open(free)
    assert tab.requests() == ["https://localhost:9/x.png"]
    assert 0 in tab.run(IMAGES)
