"""The report: its figures are those of the files, and its page is whole."""

import json
import os
import re
import shutil
import statistics
from dataclasses import replace
from html import unescape
from pathlib import Path

from helpers.results import DEVICE, RESULTS, UNITS, Cells, about, make_config, read, write_run, write_times
from localgrad.commands.main import main
from localgrad.config.saved import to_dict
from localgrad.results.figures import trade_off
from localgrad.results.names import dataset_label
from localgrad.results.report import page
from localgrad.results.tables import tables
from localgrad.runs.files import atomic_write


def test_the_tables_hold_the_figures_of_the_files(text: str) -> None:
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    errors = [30.25, 31.5, 29.0]
    mean, deviation = statistics.fmean(errors), statistics.stdev(errors)
    main_row = rows["DGL + MAN|cifar10-resnet32-k16-dgl-man"]
    assert main_row == ["15|K=16 in the paper", f"{mean:.2f} ± {deviation:.2f}|n = 3", f"{mean - 0.5:.2f}", "9.11"]
    assert rows["End-to-end|cifar10-resnet32-e2e"] == ["1", "20.12|n = 1", "19.62", "6.37"]
    assert rows["DGL|digits-dgl"] == ["6", "5.50|n = 1", "5.00"], "no paper has it, so its table has no such column"
    assert rows["DGL + MAN, 15 blocks"] == ["1.7", "1.50", "1.00", "467k + 123k"]
    assert rows["layer1.0"] == ["51.23"]
    assert rows["DGL + MAN, 15 blocks|cifar10-resnet32-k16-dgl-man-seed0"][-1] == "0.432"


def test_a_run_that_is_no_row_of_the_paper_gets_none_of_its_figures(text: str) -> None:
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    name = "DGL + MAN (decay 0.9)|cifar10-resnet32-k16-dgl-man, momentum.decay 0.9"
    assert rows[name][0].startswith("15|K=16 ") and rows[name][1:] == ["33.75|n = 1", "33.25", ""]
    assert rows["End-to-end (checkpointed)|cifar10-resnet32-e2e"][-1] == "6.37", "the same weights in less memory"


def test_the_budget_is_said_beside_the_papers(text: str) -> None:
    text = unescape(text)
    assert "10 epochs, all training images, batch size 1,024, learning rate 0.8, warm-up epochs 10, 32-true" in text
    assert f"On {DEVICE}." in text
    assert "Paper: after 400 epochs, these runs after 10." in text


def test_everything_is_escaped_and_nothing_is_loaded(text: str) -> None:
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;GPU&quot;" in text
    sources = re.findall(r'\b(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"', text)
    assert sources
    assert all(source.startswith(("#", "data:")) for source in sources), set(sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_no_absolute_path_is_printed(folder: Path, text: str) -> None:
    assert str(folder) not in text.replace(folder.name, "", 0)
    config = make_config("cifar10-resnet32-e2e")
    config = replace(config, data=replace(config.data, source=str(folder / "photos")))
    write_run(folder / "own.json", config, 4.0, command=f"localgrad train cifar10-resnet32-e2e --data {folder}/photos")
    own = page(read(folder)[0], folder)
    (folder / "own.json").unlink()
    (folder / "own.jsonl").unlink()
    assert str(folder) not in own
    assert "photos, ResNet-32" in own
    assert "localgrad train cifar10-resnet32-e2e --data path/to/photos" in own


def test_each_row_leads_to_the_command_that_makes_it_again(text: str) -> None:
    row = re.search(r'<a href="#([^"]*)">DGL \+ MAN</a>', text)
    assert row
    (cell,) = re.findall(rf'<td [^>]*id="{row[1]}"[^>]*>(.*?)</td>', text, re.DOTALL)
    assert "<code>localgrad train cifar10-resnet32-k16-dgl-man " in cell
    assert all(f"cifar10-resnet32-k16-dgl-man-seed{seed}/result.json" in cell for seed in range(3))


def test_the_summary_says_what_was_run_when_and_on_what(tmp_path: Path) -> None:
    dates = {"e2e": "2026-03-01T10:00:00+00:00", "k16-dgl": None, "k16-dgl-man": None}
    for number, (name, date) in enumerate(dates.items()):
        write_run(tmp_path / f"{number}.json", make_config(f"cifar10-resnet32-{name}"), 30.0 - number, date=date)
    text = unescape(page(read(tmp_path)[0], tmp_path))
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text[: text.index("</header>")]))
    assert facts["What"].startswith("3 runs (3 trainings in 1 table;")
    assert facts["Networks and images"] == "CIFAR-10, ResNet-32"
    assert facts["When"] == "2026-03-01; 2 of 3 files have no date"
    assert facts["On"] == DEVICE
    assert facts["Software"].startswith("torch 2.11")
    finding = next(row for row in Cells(text).rows if row[0].startswith("CIFAR-10, ResNet-32|10 epochs"))
    whole, best, gain, memory, _ = finding[1:]
    assert whole == "30.00|n = 1"
    assert best == "28.00|DGL + MAN, 15 blocks|n = 1"
    assert gain == "1.00|DGL: 1.00 (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1)"
    assert memory.startswith("0.15|2 MiB of 11 MiB")


def test_memory_of_two_devices_is_not_compared(tmp_path: Path) -> None:
    """The end-to-end run on the other device counts for errors, and for no share of memory."""
    whole, local = make_config("cifar10-resnet32-e2e"), make_config("cifar10-resnet32-k16-dgl")
    write_run(tmp_path / "whole.json", whole, 20.0, device="another")
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}.json", replace(local, seed=seed), 30.0)
    finding = next(row for row in Cells(page(read(tmp_path)[0], tmp_path)).rows if row[0].startswith("CIFAR-10"))
    assert finding[1] == "20.00|n = 1"
    assert finding[4] == "|2 MiB"


def test_memory_that_was_not_measured_is_no_figure(tmp_path: Path) -> None:
    """A dash in the table of costs, and no point in the picture of error against memory."""
    names = ("cifar10-resnet32-e2e", "cifar10-resnet32-k16-dgl", "cifar10-resnet32-k16-dgl-man")
    for name, error in zip(names, (20.0, 30.0, 25.0), strict=True):
        unmeasured = {"peak_memory_bytes": None} if name.endswith("man") else {}
        write_run(tmp_path / f"{name}.json", make_config(name), error, **unmeasured)
    cells = Cells(page(read(tmp_path)[0], tmp_path)).rows
    assert next(row for row in cells if row[0].startswith("CIFAR-10"))[4] == ""  # the best row is the unmeasured one
    labels = ["End-to-end", "DGL, 15 blocks", "DGL + MAN, 15 blocks"]
    assert [row[1] for row in cells if row[0] in labels and len(row) > 4] == ["11.0", "1.7", "-"]
    (table,) = tables(read(tmp_path)[0].runs)
    assert sorted(table.peaks_on(table.main_device)) == [0, 1]
    assert len(trade_off(table, table.main_device, dict.fromkeys(range(3))).figure.axes[0].collections) == 2


def test_a_method_of_another_version_has_its_own_name(tmp_path: Path) -> None:
    values = write_run(tmp_path / "one.json", make_config("cifar10-resnet32-k16-dgl"), 20.0)
    for name in ("objective", "momentum"):
        values["config"][name] = {"name": f"my {name}"}
    (tmp_path / "one.json").write_text(json.dumps(values))
    found, warnings = read(tmp_path)
    assert warnings == []
    assert "my objective + my momentum, 15 blocks" in page(found, tmp_path)


def test_ids_are_there_once_and_links_lead_somewhere(text: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 50
    targets = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert {*targets} <= {*ids}


def test_every_picture_has_a_caption_and_says_where_it_is_from(text: str, folder: Path) -> None:
    pictures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(pictures) == text.count("<svg ") > 10
    for picture in pictures:
        described = re.search(r'<svg role="img" aria-label="([^"]{40,})"', picture)
        caption = re.search(
            r"<figcaption>(.{40,}?)\s*<(?:small|details)>.*?([^ >]+\.json.*)\.</small>", picture, re.DOTALL
        )
        assert described
        assert caption
        assert unescape(described[1]) == unescape(caption[1])
        names = [unescape(name) for name in caption[2].split(", ")]
        assert all((folder / name).exists() for name in names)
        assert len(names) <= 3 or f"<summary>From {len(names)} files</summary>" in picture


def test_sections_without_data_are_left_out(text: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "digits.json", tmp_path / "digits.json")
    few = page(read(tmp_path)[0], tmp_path)
    assert re.findall(r"<h3>(.*?)</h3>", few) == ["Test errors", "Memory and time", "Local heads", "Commands"]
    assert re.findall(r"<summary><b>(.*?)</b>", few) == ["Digits, ResNet-14", "Files"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Contents", "Findings", "How to read the words", "Details"]
    details = ["CIFAR-10, ResNet-32", "Digits, ResNet-14", "Planned memory", "Times of a step", "Files"]
    assert re.findall(r"<summary><b>(.*?)</b>", text) == details
    first = text[text.index("<b>CIFAR-10, ResNet-32</b>") : text.index("<b>Digits, ResNet-14</b>")]
    assert re.findall(r"<h3>(.*?)</h3>", first) == [
        "Test errors",
        "Learning curves",
        "Memory and time",
        "Local heads",
        "Linear separability",
        "Similarity of features (CKA)",
        "Pictures of features",
        "Commands",
    ]


def test_the_results_of_this_repository_make_a_page() -> None:
    found, warnings = read(RESULTS)
    assert warnings == []
    assert len(found.plans) >= 1
    assert len(found.speeds) >= 1
    assert 'href="#times"' in page(found, RESULTS)


def test_a_time_is_shown_with_its_settings_and_without_those_that_were_not_set(text: str) -> None:
    settings = json.loads((RESULTS / "speed.json").read_text())["settings"]
    assert settings["rows"] is None
    assert f"network resnet32, batch size 128, rounds {settings['rounds']}, threads {settings['threads']}." in text


def test_a_run_too_short_for_its_seconds_is_shown_without_them(tmp_path: Path) -> None:
    write_run(tmp_path / "short" / "result.json", make_config("digits-dgl"), 5.5, seconds_per_step=None)
    found, warnings = read(tmp_path)
    assert warnings == []
    rows = {row[0]: row[1:] for row in Cells(page(found, tmp_path)).rows}
    assert rows["DGL, 6 blocks"][1] == "-"


def test_runs_on_other_images_are_another_row_and_get_no_figure_of_the_paper(tmp_path: Path) -> None:
    config = make_config("cifar10-resnet32-e2e")
    write_run(tmp_path / "ten.json", config, 4.0, num_classes=10)
    write_run(tmp_path / "three.json", replace(config, seed=1), 5.0, num_classes=3)
    write_run(tmp_path / "few.json", replace(config, data=replace(config.data, test_limit=50)), 6.0)
    own = make_config("digits-e2e", data=replace(config.data, source="my/digits"))
    write_run(tmp_path / "digits.json", own, 7.0)
    text = page(read(tmp_path)[0], tmp_path)
    rows = {row[0]: row[1:] for row in Cells(text).rows}
    assert rows["End-to-end|cifar10-resnet32-e2e"][3] == "6.37"
    assert rows["End-to-end|cifar10-resnet32-e2e, 3 classes"][1:] == ["5.00|n = 1", "4.50", ""]
    assert "warm-up epochs 10, 50 test images, 32-true" in text
    assert f"{dataset_label(own)}, ResNet-14" in text


def test_rows_are_told_apart_in_pictures_and_costs(tmp_path: Path) -> None:
    config = make_config("cifar10-resnet32-k16-dgl")
    write_run(tmp_path / "as-it-is.json", config, 4.0)
    write_run(tmp_path / "decayed.json", replace(config, optim=replace(config.optim, weight_decay=0.01)), 5.0)
    (table,) = tables(read(tmp_path)[0].runs)
    assert sorted(table.labels) == ["DGL, 15 blocks", "DGL, 15 blocks, optim.weight_decay 0.01"]
    names = [row[0] for row in Cells(page(read(tmp_path)[0], tmp_path)).rows]
    assert {*table.labels} <= {*names}


def test_probes_of_other_trainings_are_other_curves(tmp_path: Path) -> None:
    config = make_config("cifar10-resnet32-k16-dgl")
    decayed = replace(config, optim=replace(config.optim, weight_decay=0.1))
    seeds = [config, replace(config, seed=1), decayed]
    for number, (each, accuracy) in enumerate(zip(seeds, (40.0, 60.0, 90.0), strict=True)):
        values = {"analysis": "probe", "units": UNITS, "blocks": [1, 1, 2, 3], "accuracies": [accuracy] * 4}
        values |= about("cifar10-resnet32-k16-dgl") | {"settings": {}}
        values["runs"][0]["config"] = to_dict(each)
        (tmp_path / f"{number}.json").write_text(json.dumps(values))
    text = unescape(page(read(tmp_path)[0], tmp_path))
    before = f"optim.weight_decay {config.optim.weight_decay}"
    head, first = re.findall(r"<tr>.*?</tr>", text[text.index("mean over runs") - 2000 :], re.DOTALL)[:2]
    assert re.findall(r"DGL[^<]*", head) == [f"DGL, 15 blocks, {before}", "DGL, 15 blocks, optim.weight_decay 0.1"]
    assert re.findall(r">(\d+\.\d\d)<", first) == ["50.00", "90.00"]


def test_times_that_were_measured_in_turns_stand_instead_of_the_runs_own(tmp_path: Path) -> None:
    """They are those of the same steps in any budget, but for all rows of a table or for none, and on its device."""
    whole, man = make_config("cifar10-resnet32-e2e"), make_config("cifar10-resnet32-k16-dgl-man")
    write_run(tmp_path / "whole.json", whole, 20.0)
    write_run(tmp_path / "man.json", man, 30.0)
    write_run(tmp_path / "man1.json", replace(man, seed=1), 30.0)

    def shown() -> tuple[str, list[str], str]:
        found, warnings = read(tmp_path)
        assert warnings == []
        text = unescape(page(found, tmp_path))
        text = text[text.index("<h3>Memory and time") : text.index("<h3>Local heads")]
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
        write_times(tmp_path / "step-times.json", configs, device)
        text, seconds, origin = shown()
        assert seconds == ["0.100", "1.50"]
        assert "slowed by whatever else ran beside" in text
        assert ">hours<" in text
        assert "step-times.json" not in origin
    write_times(tmp_path / "step-times.json", [(longer, 0.25), (man, 0.75)])
    text, seconds, origin = shown()
    assert seconds == ["0.250", "0.750"]
    assert "median of steps that took turns, from step-times.json" in text
    assert "measured in turns with the others" in text
    assert "step-times.json" in origin
    assert ">hours<" not in text  # which are of the runs
    assert "0.750 s" in text
    assert "1.50 s" not in text


def test_probes_of_other_settings_are_other_pictures_and_a_run_counts_once(tmp_path: Path) -> None:
    base = {"analysis": "probe", "units": UNITS, "blocks": [1, 1, 2, 3], "accuracies": [40.0, 50.0, 60.0, 70.0]}
    few, many = ({"train_images": n, "epochs": 5, "batch_size": 256} for n in (1_000, 50_000))
    for name, settings in (("one", few), ("again", few), ("other", many)):
        values = base | about("cifar10-resnet32-k16-dgl") | {"settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    text = unescape(page(read(tmp_path)[0], tmp_path))
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(captions) == 2
    for images in ("1,000", "50,000"):
        (caption,) = [caption for caption in captions if f"after 5 epochs on {images} training images" in caption]
        assert caption.count("cifar10-resnet32-k16-dgl-seed0") == 1


def test_a_page_is_written_through_a_link_and_into_what_is_no_file(tmp_path: Path) -> None:
    write_run(tmp_path / "results" / "one.json", make_config("digits-e2e"), 4.0)
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
