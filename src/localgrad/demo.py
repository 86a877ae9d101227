"""The demo: one small network, trained end-to-end, by blocks, and by blocks with momentum, side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localgrad.build import with_defaults
from localgrad.config import TrainConfig, to_dict
from localgrad.errors import LocalGradError
from localgrad.recipes import recipe
from localgrad.runs import RunFolder

ROWS = {"digits-e2e": "end-to-end", "digits-dgl": "DGL", "digits-dgl-man": "DGL+MAN"}


@dataclass(frozen=True)
class Row:
    """One finished run of the demo, as its result file has it."""

    label: str
    result: dict[str, Any]
    metrics: list[dict[str, Any]]


def run_demo(folder: Path, *, epochs: int | None, train_limit: int | None, seed: int) -> list[Row]:
    """Train the three rows, each in its folder; what is finished there is kept, what is half done goes on.

    Args:
        folder: for the three run folders and the plot.
        epochs: instead of the recipes' own.
        train_limit: train on so many images only.
        seed: for all three.

    Returns:
        One row a run, in order.

    Raises:
        LocalGradError: the folder holds a demo of other settings.
        KeyboardInterrupt: interrupted; the same call goes on from the checkpoint.
    """
    from localgrad.trainer import fit

    rows = []
    for name, label in ROWS.items():
        config = recipe(name).config
        config = replace(
            config,
            seed=seed,
            data=replace(config.data, train_limit=train_limit or config.data.train_limit),
            optim=replace(config.optim, epochs=epochs or config.optim.epochs),
        )
        run = RunFolder(folder / name)
        if not _is_done(run, config):
            fit(config, run.path, resume=(run.path / "config.json").exists())
        metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        rows.append(Row(label, json.loads(run.result.read_text()), metrics))
    return rows


def _is_done(run: RunFolder, config: TrainConfig) -> bool:
    if not run.is_finished:
        return False
    if to_dict(run.config()) != to_dict(with_defaults(config)):
        raise LocalGradError(f"{run.path} holds a demo of other settings; give another --run-dir, or remove it")
    return True


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="scikit-learn's digits, the same ResNet-14 three times", title_justify="left")
    headings = ["training", "blocks", "test error", "peak memory", "s/step", "parameters"]
    shown = [0, 2, 3] if console.width < 72 else range(len(headings))  # figures whole, at any width
    for column in shown:
        table.add_column(headings[column], justify="right" if column else "left", overflow="fold")
    for row in rows:
        result = row.result
        auxiliary = result["parameters"]["auxiliary"]
        cells = (
            row.label,
            str(result["num_blocks"]),
            f"{result['test_error']:.2f}%",
            f"{result['peak_memory_bytes'] / 2**20:.1f} MiB",
            "-" if result["seconds_per_step"] is None else f"{result['seconds_per_step']:.3f}",
            f"{result['parameters']['backbone'] / 1e3:.0f}k" + (f" + {auxiliary / 1e3:.0f}k" if auxiliary else ""),
        )
        table.add_row(*(cells[column] for column in shown))
    console.print(table)
    console.print(
        "Peak memory: tensors that one step makes, activations for the most part. Parameters: of the network, + of "
        "auxiliary networks, which are only there during training.",
        style="dim",
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the learning curves: test error over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for row, style in zip(rows, ("o-", "s--", "^-"), strict=False):
        points = [(line["epoch"], line["test_error"]) for line in row.metrics if line["test_error"] is not None]
        blocks = row.result["num_blocks"]
        name = row.label if blocks == 1 else f"{row.label}, {blocks} blocks"
        axes.plot(*zip(*points, strict=True), style, label=f"{name}: {row.result['test_error']:.1f} %")
    axes.set(xlabel="epoch", ylabel="test error (%)", title="Digits, ResNet-14: test error of the whole network")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(folder: Path, *, epochs: int | None = None, train_limit: int | None = None, seed: int = 0) -> None:
    """Train, print the table, write `curves.png` and `table.json` into the folder."""
    for name, value in (("epochs", epochs), ("train_limit", train_limit)):
        if value is not None and value < 1:
            raise LocalGradError(f"{name} is {value}: it must be at least 1")
    rows = run_demo(folder, epochs=epochs, train_limit=train_limit, seed=seed)
    plot(rows, folder / "curves.png")
    (folder / "table.json").write_text(json.dumps({row.label: row.result for row in rows}, indent=2) + "\n")
    show(rows)
    print(f"learning curves: {folder / 'curves.png'}")
