"""Result files for tests, and how pages made of them are read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from localgrad.config.methods import with_defaults
from localgrad.config.saved import to_dict
from localgrad.config.schema import TrainConfig
from localgrad.recipes import recipe
from localgrad.results.read import Results, read_results
from localgrad.runs.result import Result, as_file

DEVICE = '<script>alert(1)</script> & "GPU"'

UNITS = ["conv1", "layer1.0", "layer2.0", "fc"]

RESULTS = Path(__file__).parents[2] / "results"


def make_config(name: str, *, epochs: int = 10, seed: int = 0, **changes: Any) -> TrainConfig:
    config = with_defaults(recipe(name).config)
    return replace(config, seed=seed, optim=replace(config.optim, epochs=epochs), **changes)


def write_run(path: Path, config: TrainConfig, error: float, **other: Any) -> dict[str, Any]:
    """A result file as `train` writes it, with a line of metrics an epoch."""
    blocks = len(config.cuts or ()) + 1
    result = Result(
        config=config,
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
    values = {**as_file("run", result), **other}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    lines = [{"epoch": epoch, "test_error": error * (1 + 2 / epoch)} for epoch in range(1, 4)]
    beside = path.with_name("metrics.jsonl") if path.name == "result.json" else path.with_suffix(".jsonl")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return values


def about(*names: str) -> dict[str, Any]:
    runs = [{"name": f"{name}-seed0", "num_blocks": 15, "config": to_dict(make_config(name))} for name in names]
    data = {"source": "cifar10", "test_split": "test", "test_images": 10_000}
    return {"runs": runs, "data": data, "device": DEVICE, "versions": {}, "commit": None}


def write_times(path: Path, configs: Sequence[tuple[TrainConfig, float]], device: str = DEVICE) -> None:
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


def read(folder: Path) -> tuple[Results, list[str]]:
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
