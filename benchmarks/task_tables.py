"""Tables of the results of the examples, from `results/tasks/`; `documents.py` writes them."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localgrad.results.tables import mean_std

Result = dict[str, Any]


def results(folder: Path, pattern: str) -> dict[str, list[Result]]:
    """The results of each row, in the order of seeds, by the row's name without its seed."""
    rows: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        name = re.sub(r"-seed\d+$", "", path.stem)
        if re.fullmatch(pattern, name):
            rows.setdefault(name, []).append(json.loads(path.read_text()))
    return rows


def average(rows: Sequence[Result], field: str) -> float | None:
    """The mean over seeds; None if it was not measured."""
    values = [row[field] for row in rows if row[field] is not None]
    return statistics.mean(values) if values else None


def frozen(rows: Sequence[Result]) -> str:
    """Says that an EMA stood still: these runs had fused AdamW, whose steps `isolate` did not see at that time."""
    return ", EMA frozen" if any(row.get("average_frozen") for row in rows) else ""


def number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def closed(whole: float | None, local: float | None, loss: float) -> str:
    """Percentage of the gap between plain local training and end-to-end that is closed; empty for too small a gap."""
    if whole is None or local is None or local - whole < LEAST_GAP or loss == local:
        return ""
    return f"{100 * (local - loss) / (local - whole):.0f} %"


LEAST_GAP = 0.005
"""Smallest gap in loss of which a percentage is meaningful."""
SETTINGS = {
    "mid": "short setting",
    "three": "three layers, one a block",
    "large": "large setting",
}
"""Language settings with several rows, by the beginning of the files' names."""
LANGUAGE = {
    "e2e": "end-to-end",
    "checkpointed": "end-to-end, checkpointed",
    "l2": "end-to-end, two layers",
    "private": "private output layer",
    "private-man": "private output layer, MAN",
    "readout": "readout",
    "depth1": "readout, one fresh layer",
    "depth2": "readout, two fresh layers",
    "bias": "readout, trained copy alone (bias only)",
    "ema": "readout, EMA alone",
    "man": "readout, MAN",
    "residual": "readout, MAN with the residual path once",
}
PIXELS = {
    "e2e": "end-to-end",
    "checkpointed": "end-to-end, checkpointed",
    "k2": "K = 2",
    "k2-man": "K = 2, MAN",
    "k4": "K = 4",
    "k4-bias": "K = 4, trained copy alone (bias only)",
    "k4-reconstruction": "K = 4, InfoPro's reconstruction",
    "k4-man": "K = 4, MAN",
    "k4-man-recompute": "K = 4, MAN, recomputed",
    "k4-inside": "K = 4, cuts inside stages",
    "k4-inside-man-recompute": "K = 4, cuts inside stages, MAN, recomputed",
    "e2e-wide": "end-to-end, whole images",
    "checkpointed-wide": "end-to-end, checkpointed, whole images",
    "k4-wide": "K = 4, whole images",
    "k4-man-recompute-wide": "K = 4, MAN, recomputed, whole images",
}
STAGES = {
    "e2e": "end-to-end",
    "k4": "blockwise",
    "k4-noise": "blockwise, noise",
    "k4-bias": "blockwise, trained copy alone (bias only)",
    "k4-man": "blockwise, MAN",
    "k4-man-noise": "blockwise, MAN, noise",
}


def language_table(folder: Path, setting: str) -> str:
    """Validation loss by number of blocks and head, with the percentage of the gap to end-to-end that is closed.

    The gap is that of the plain readout at the same K. All values are means over seeds.
    """
    rows = results(folder / "language", f"{setting}-.*")
    whole = average(rows.get(f"{setting}-e2e", []), "validation_loss")
    lines = [
        "| blocks | head | n | validation loss | perplexity | to end-to-end | gap closed | first exit "
        "| trained weights | peak, MiB | seconds |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = list(LANGUAGE)
    found = []
    for name, runs in rows.items():
        match = re.fullmatch(rf"{setting}-(?:k(\d+)-)?(.*)", name)
        assert match is not None
        found.append((int(match[1] or 1), order.index(match[2]), runs))
    for blocks, kind, runs in sorted(found, key=lambda row: row[:2]):
        loss = average(runs, "validation_loss")
        assert loss is not None
        exits = [run["exits"][0] for run in runs if run["exits"]]
        cells = [
            str(blocks),
            LANGUAGE[order[kind]] + frozen(runs),
            str(len(runs)),
            mean_std([run["validation_loss"] for run in runs], 4),
            number(average(runs, "perplexity"), 2),
            "" if whole is None or order[kind] == "e2e" else f"{loss - whole:+.4f}",
            closed(whole, average(rows.get(f"{setting}-k{blocks}-readout", []), "validation_loss"), loss),
            mean_std(exits, 3) if exits else "",
            f"{runs[0]['trained_parameters'] / 1e6:.2f} M",
            number(average(runs, "peak_mib"), 0),
            number(average(runs, "seconds"), 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def segmentation_table(folder: Path) -> str:
    """Mean IoU on the test set, and peak memory relative to end-to-end."""
    rows = results(folder / "segmentation", ".*")
    whole = average(rows.get("e2e", []), "peak_mib")
    lines = ["| training | n | mean IoU, % | peak, MiB | to end-to-end's | seconds |", "|---|--:|--:|--:|--:|--:|"]
    for name in (name for name in PIXELS if name in rows):
        runs, peak = rows[name], average(rows[name], "peak_mib")
        share = "" if whole is None or peak is None else f"{100 * peak / whole:.0f} %"
        ious = mean_std([run["mean_iou"] for run in runs], 2)
        cells = [
            PIXELS[name] + frozen(runs),
            str(len(runs)),
            ious,
            number(peak, 0),
            share,
            number(average(runs, "seconds"), 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def selfsupervised_table(folder: Path) -> str:
    """Test accuracy of linear probes after each stage."""
    rows = results(folder / "selfsupervised", ".*")
    lines = [
        "| training | n | stage 1 | stage 2 | stage 3 | stage 4, % | peak, MiB | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (name for name in STAGES if name in rows):
        runs = rows[name]
        stages = [mean_std([run["probe_accuracies"][stage] for run in runs], 1) for stage in range(4)]
        cells = [STAGES[name], str(len(runs)), *stages]
        cells += [number(average(runs, "peak_mib"), 0), number(average(runs, "seconds"), 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def language_lengths_table(folder: Path) -> str:
    """End-to-end training and three blocks with plain readouts, setting by setting."""
    lines = [
        "| layers | width | batch size x context | steps | learning rate "
        "| end-to-end | n | three blocks, readout | n | difference |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for setting in ("lr0.001", "mid", "lr0.006", "batch32", "three", "large"):
        rows = results(folder / "language", f"{re.escape(setting)}-(e2e|k3-readout)")
        if len(rows) < 2:
            continue
        losses = {name: [run["validation_loss"] for run in runs] for name, runs in rows.items()}
        whole, local = losses[f"{setting}-e2e"], losses[f"{setting}-k3-readout"]
        chosen = rows[f"{setting}-e2e"][0]["settings"]
        cells = [
            str(chosen["layers"]),
            str(chosen["width"]),
            f"{chosen['batch_size']} x {chosen['context']}",
            f"{chosen['steps']:,}",
            f"{chosen['lr']:g}",
            mean_std(whole, 3),
            str(len(whole)),
            mean_std(local, 3),
            str(len(local)),
            f"{statistics.mean(local) - statistics.mean(whole):+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def language_memory_table(path: Path, dropout: Path) -> str:
    """Peak memory of GPT-2 medium, without and with dropout."""
    lines = [
        "| training | blocks | peak, GiB | largest local block's | last block's | peak with dropout |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row, dropped in zip(*(json.loads(file.read_text())["rows"] for file in (path, dropout)), strict=True):
        local = number(row["largest_local_gib"], 2)
        last = number(row["last_gib"], 2) if local else ""
        peaks = f"{row['peak_gib']:.2f} | {local} | {last} | {dropped['peak_gib']:.2f}"
        lines.append(f"| {row['row']} | {row['blocks']} | {peaks} |")
    return "\n".join(lines)


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Functions that make the tables, by the name of their marks in the documents."""
    folder = root / "results" / "tasks"
    return {
        "language-small": lambda: language_table(folder, "small"),
        "language-mid": lambda: language_table(folder, "mid"),
        "language-lengths": lambda: language_lengths_table(folder),
        "language-large": lambda: language_table(folder, "large"),
        "language-three": lambda: language_table(folder, "three"),
        "language-memory": lambda: language_memory_table(
            root / "results" / "language_memory.json", root / "results" / "language_memory-dropout.json"
        ),
        "segmentation": lambda: segmentation_table(folder),
        "selfsupervised": lambda: selfsupervised_table(folder),
    }
