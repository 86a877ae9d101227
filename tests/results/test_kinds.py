"""Result files say their kind and schema; today's files, which do not, are read as ever."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.results import RESULTS, UNITS, about, make_config, read, write_run
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError
from localgrad.results.kinds import (
    KINDS,
    Alignment,
    AnalysedImages,
    AnalysedRun,
    Pictures,
    Plan,
    PlannedRow,
    Probe,
    StepTimes,
    TimedRow,
    kind_name,
    kind_of,
)
from localgrad.results.read import read_file, read_result
from localgrad.runs.files import write_json
from localgrad.runs.result import SCHEMA, Result, as_file

ORIGIN: dict[str, Any] = {"device": "abacus", "versions": {"torch": "2.11"}, "commit": "abc", "date": "2026-01-01"}
RUN = AnalysedRun("run", 3, TrainConfig(seed=4, cuts=("a", "b")))
WHAT: dict[str, Any] = {"runs": [RUN], "data": AnalysedImages(10, class_names=["cat", "dog"]), "units": ["a", "b"]}
CONTENTS = [
    Result(
        config=TrainConfig(cuts=("a",)),
        test_error=5.0,
        best_test_error=4.0,
        best_epoch=1,
        local_errors=[None, 5.0],
        cuts=["a"],
        num_blocks=2,
        parameters={"backbone": 3, "auxiliary": 2, "trainable": 5},
        peak_memory_bytes=7,
        seconds_per_step=None,
        wall_seconds=1.0,
        precision="32-true",
        test_errors=[None, 5.0],
        **ORIGIN,
    ),
    Probe(**ORIGIN, **WHAT, blocks=[1, 2], accuracies=[50.0, 60.0]),
    Alignment(**ORIGIN, **{**WHAT, "runs": [RUN, RUN]}, other_units=["a", "b"], alignment=[[1.0, None], [0.5, 1.0]]),
    Pictures(
        **ORIGIN,
        **WHAT,
        blocks=[1, 2],
        image_labels=[1],
        thumbnails=[[[[1, 2, 3]]]],
        maps=[[[[0.5]]], None],
        point_labels=[0, 1],
        points=[[(0.0, 1.0), (1.0, 0.0)]] * 2,
    ),
    Plan(**ORIGIN, title="network", budget=2**30, rows=[PlannedRow("man", 2, False, 2**20, ("a",))]),
    StepTimes(**ORIGIN, rows=[TimedRow("a", 0.5, 1.0, 2, 10, "32-true", TrainConfig())], settings={"rounds": 3}),
]


@pytest.mark.parametrize("content", CONTENTS, ids=kind_name)
def test_what_is_written_is_read_back(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", as_file(kind_name(content), content))
    values = json.loads((tmp_path / "file.json").read_text())
    assert (values["kind"], values["schema"]) == (kind_name(content), SCHEMA)
    assert read_file(tmp_path / "file.json") == content


def test_every_kind_is_among_them() -> None:
    assert {type(content) for content in CONTENTS} == {*KINDS.values()}


def test_all_results_of_this_repository_are_read_whatever_version_wrote_them() -> None:
    found, warnings = read(RESULTS)
    assert warnings == []
    files = [path for path in RESULTS.rglob("*.json") if kind_of(json.loads(path.read_text())) in KINDS]
    assert len(files) == len(found) > 40
    assert found.others, "benchmarks and examples are known, though they have no section"
    for run in found.runs:
        saved = json.loads(run.path.read_text())
        assert run.result.test_error == saved["test_error"]
        assert saved["config"].items() <= to_dict(run.result.config).items() or "data" in saved["config"]
        assert run.result.config.seed == saved["config"]["seed"]


def test_a_file_without_a_kind_is_told_by_its_fields(tmp_path: Path) -> None:
    values = write_run(tmp_path / "one.json", make_config("digits-e2e"), 4.0)
    old = {name: value for name, value in values.items() if name not in ("kind", "schema", "date", "command")}
    write_json(tmp_path / "old.json", old)
    assert read_result(tmp_path / "old.json") == read_result(tmp_path / "one.json")
    probe = {"analysis": "probe", **about("digits-e2e"), "units": UNITS, "accuracies": [1.0] * 4}
    write_json(tmp_path / "probe.json", probe)
    assert isinstance(read_file(tmp_path / "probe.json"), Probe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": SCHEMA + 1}, "update localgrad"),
        ({"schema": "new"}, "has schema 'new'"),
        ({"device": None}, "device is None"),
        ({"parameters": {"backbone": 1}}, "parameters has no 'auxiliary'"),
        ({"local_errors": [1.0] * 9}, "local_errors must be a list of 1"),
        ({"config": {"optim": {"epoch": 3}}}, r"config\.optim .*'epoch' \(.*\bepochs\b"),
    ],
)
def test_another_schema_or_field_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = write_run(tmp_path / "one.json", make_config("digits-e2e"), 4.0)
    write_json(tmp_path / "one.json", values | changes)
    with pytest.raises(LocalGradError, match=message) as caught:
        read_result(tmp_path / "one.json")
    assert str(tmp_path / "one.json") in str(caught.value)
