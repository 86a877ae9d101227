"""Write the tables of the documents from the files in `results/`; a test fails if they disagree.

python benchmarks/documents.py
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import accuracy_tables
import claims_table
import pictures
import task_goals
import task_tables
from localgrad.results.tables import mean_std

ROOT = Path(__file__).parents[1]


def plan_table(path: Path) -> str:
    """Markdown table of the peaks in `plan.json`, without gradient accumulation."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["parts"] == 1]
    labels = list(dict.fromkeys(row["training"] for row in rows))
    titles = {"no momentum": "DGL", "man": "DGL+MAN", "man, recomputed": "DGL+MAN, recomputed"}
    lines = [
        f"| blocks | {' | '.join(f'{titles[label]} | checkpointed' for label in labels)} |",
        f"|{'--:|' * (1 + 2 * len(labels))}",
    ]
    for count in sorted({row["num_blocks"] for row in rows}):
        cells = [
            f"{row['peak'] / 2**30:.2f}" if count > 1 or label == labels[0] else ""
            for label in labels
            for row in sorted(rows, key=lambda row: row["recompute"])
            if row["training"] == label and row["num_blocks"] == count
        ]
        lines.append(f"| {'end-to-end' if count == 1 else count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_rivals_table(path: Path) -> str:
    """Markdown table of peaks and operations of selected rows of `plan.json`, the largest peak first."""
    rows = pictures.planned(path)
    whole = max(row["peak"] for _, row in rows)
    lines = ["| ResNet-101 | peak, GiB | to end-to-end | operations |", "|---|--:|--:|--:|"]
    lines += [
        f"| {label} | {row['peak'] / 2**30:.2f} | {row['peak'] / whole:.2f} | {row['operations']:.2f} |"
        for label, row in rows
    ]
    return "\n".join(lines)


def speed_table(path: Path) -> str:
    """Markdown table of the seconds per step in `speed.json`, with time and operations relative to end-to-end."""
    rows = json.loads(path.read_text())["rows"]
    ratios = ("ratio_to_float32_nchw", "ratio_to_same_precision_and_layout", "ratio_of_operations")
    lines = [
        "| step | seconds | to the float32 NCHW loop | to the bfloat16 loop | operations |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['row']} | {r['seconds_per_step']:.2f} | {' | '.join(f'{r[name]:.2f}' for name in ratios)} |"
        for r in rows
    ]
    return "\n".join(lines)


def lean_table(path: Path) -> str:
    """Markdown table of time, operations and peak memory in `speed-resnet50.json`."""
    rows = json.loads(path.read_text())["rows"]
    lines = ["| step | seconds | to end-to-end | operations | peak memory of a step |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r['row']} | {r['seconds_per_step']:.2f} | {r['ratio_to_end_to_end']:.2f} | "
        f"{r['ratio_of_operations']:.2f} | {r['peak_mib']:.0f} MiB |"
        for r in rows
    ]
    return "\n".join(lines)


def tried_table(path: Path) -> str:
    """Markdown table of the two alternatives of each row of `tried.json`."""
    lines = ["| first or second | first, ms | second, ms | second to first | kept |", "|---|--:|--:|--:|---|"]
    lines += [
        f"| {r['row']} | {r['first_ms']:.1f} | {r['second_ms']:.1f} | {r['second_to_first']:.2f} | {r['kept']} |"
        for r in json.loads(path.read_text())["rows"]
    ]
    return "\n".join(lines)


def block_table(path: Path) -> str:
    """Markdown table of the time and operations that one more block adds to a step, from `scaling.json`."""
    result = json.loads(path.read_text())
    squares = {fit["row"]: fit["r_squared"] for fit in result["fits"]}
    lines = [
        "| each block more | milliseconds | GFLOP | milliseconds for these | R² of the line |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {method} | {1000 * added['seconds']:.1f} | {added['gflop']:.2f} | "
        f"{1000 * added['explained_seconds']:.1f} | {squares[f'{method}, blocks, seconds']:.3f} |"
        for method, added in result["per_block"].items()
    ]
    return "\n".join(lines)


def ranks_table(path: Path) -> str:
    """Markdown table of images per second on two ranks, from `pipeline.json`."""
    rows = json.loads(path.read_text())["measured"][0]["rows"]
    lines = ["| two ranks of one thread | images a second | to one rank |", "|---|--:|--:|"]
    lines += [f"| {r['row']} | {r['images_per_second']:.0f} | {r['times_one_rank']:.2f} |" for r in rows]
    return "\n".join(lines)


def runs_table(folders: list[Path]) -> str:
    """Markdown table of test errors, one column per folder (budget), as mean ± standard deviation over seeds.

    Memory is that of the first seed's run. Seconds per step are those of the last folder's `step-times.json`.
    """
    budgets: list[dict[str, list[dict[str, Any]]]] = []
    for folder in folders:
        runs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*-seed*.json")):
            run = json.loads(path.read_text())
            runs.setdefault(_command_name(run["config"]), []).append(run)
        budgets.append(runs)
    epochs = [next(iter(runs.values()))[0]["config"]["optim"]["epochs"] for runs in budgets]
    heads = [f"error after {number} epochs" for number in epochs]
    heads += ["peak memory of a step", "seconds a step"]
    timed = json.loads((folders[-1] / "step-times.json").read_text())["rows"]
    seconds = {_command_name(row["config"]): row["seconds_per_step"] for row in timed}
    lines = [f"| run | blocks | {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) + 1)}"]
    for name, seeds in sorted(budgets[-1].items(), key=lambda item: _mean_error(item[1])):
        errors = [_errors(runs.get(name, [])) for runs in budgets]
        costs = [f"{seeds[0]['peak_memory_bytes'] / 2**20:.0f} MiB", f"{seconds[name]:.2f}"]
        lines.append(f"| `{name}` | {seeds[0]['num_blocks']} | {' | '.join(errors + costs)} |")
    return "\n".join(lines)


def _command_name(config: dict[str, Any]) -> str:
    """Name of the recipe, followed by `--recompute` if the run used activation checkpointing."""
    return config["name"] + (" --recompute" if config.get("recompute") else "")


def _mean_error(seeds: list[dict[str, Any]]) -> float:
    return statistics.mean(run["test_error"] for run in seeds)


def _errors(seeds: list[dict[str, Any]]) -> str:
    if not seeds:
        return ""
    return f"{mean_std([run['test_error'] for run in seeds])} %" + (f" (n = {len(seeds)})" if len(seeds) > 1 else "")


def features_table(folder: Path) -> str:
    """Markdown table of linear probes after some units, and of CKA with the end-to-end network."""
    units = ("layer1.0", "layer1.4", "layer2.4", "layer3.4")
    lines = [f"| training | {' | '.join(units)} | CKA |", f"|---|{'--:|' * (len(units) + 1)}"]
    for name, label in (("e2e", "end-to-end"), ("k16-dgl", "DGL"), ("k16-dgl-man", "DGL+MAN")):
        probe = json.loads((folder / name / "probe.json").read_text())
        found = dict(zip(probe["units"], probe["accuracies"], strict=True))
        alike = [json.loads(path.read_text())["mean_diagonal"] for path in (folder / name).glob("cka-*.json")]
        cells = [*(f"{found[unit]:.1f} %" for unit in units), *([f"{value:.2f}" for value in alike] or [""])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def long_runs_table(folder: Path) -> str:
    """Markdown table of test errors of runs that shared a GPU, and so have no comparable seconds and memory."""
    lines = ["| run | blocks | last error | best error |", "|---|--:|--:|--:|"]
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        errors = f"{run['test_error']:.2f} % | {run['best_test_error']:.2f} %"
        lines.append(f"| `{run['config']['name']}` | {run['num_blocks']} | {errors} |")
    return "\n".join(lines)


def gpu_trainings_table(path: Path) -> str:
    """Markdown table of the errors by epoch of trainings that were cut off."""
    lines = ["| run | blocks | epochs planned | error by epoch |", "|---|--:|--:|---|"]
    for row in json.loads(path.read_text())["rows"]:
        if row["noted"].endswith("13 at a time"):
            errors = " ".join(f"{error:.1f}" for error in row["test_errors"] if error is not None)
            lines.append(f"| `{row['recipe']}` | {row['num_blocks']} | {row['epochs_planned']} | {errors} |")
    return "\n".join(lines)


def gpu_memory_table(path: Path) -> str:
    """Markdown table of predicted peaks and those of CUDA's allocator."""
    lines = [
        "| network, method, precision | blocks | predicted GiB | allocator GiB | off by |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['row']} | {r['blocks']} | {r['predicted_gib']:.2f} | {r['measured_gib']:.2f} | "
        f"{round(r['error_percent'], 1) + 0.0:.1f} % |"  # no minus before zero
        for r in json.loads(path.read_text())["rows"]
    ]
    return "\n".join(lines)


def gpu_speed_table(path: Path) -> str:
    """Markdown table of milliseconds per step on a GPU, without and with a CUDA graph."""
    rows = json.loads(path.read_text())["rows"]
    graphs = {row["row"]: row for row in rows if row["graph"]}
    eager = {row["row"]: 1000 * row["seconds_per_step"] for row in rows if not row["graph"]}
    base = graphs["cifar10-resnet32-e2e"]["seconds_per_step"]
    lines = ["| recipe | blocks | ms, eager | ms, CUDA graph | to end-to-end |", "|---|--:|--:|--:|--:|"]
    for name, row in sorted(graphs.items(), key=lambda item: item[1]["seconds_per_step"]):
        seconds, slow = row["seconds_per_step"], f"{eager[name]:.1f}" if name in eager else ""
        lines.append(f"| `{name}` | {row['blocks']} | {slow} | {1000 * seconds:.1f} | {seconds / base:.2f} |")
    return "\n".join(lines)


def three_table(results: Path) -> str:
    """Markdown table of memory, time and error of four trainings: the three figures of the README."""
    plan = json.loads((results / "plan-resnet101" / "plan.json").read_text())["rows"]
    peaks = {
        (row["training"], row["num_blocks"], row["recompute"]): row["peak"] / 2**30
        for row in plan
        if row.get("parts", 1) == 1
    }
    times = {
        row["row"]: row["ratio_to_end_to_end"]
        for row in json.loads((results / "speed-resnet50.json").read_text())["rows"]
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((results / "cifar10-ten-epochs").glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(_command_name(run["config"]), []).append(run)
    name = "cifar10-resnet32-"
    memory = [peaks["no momentum", 1, False], peaks["no momentum", 1, True]]
    memory += [peaks["no momentum", 4, False], peaks["man", 4, False]]
    ratios = ("end-to-end", "end-to-end, every unit checkpointed", "DGL, 4 blocks", "DGL+MAN, 4 blocks")
    errors = ("e2e", "e2e --recompute", "k16-dgl", "k16-dgl-man")
    seconds = " | ".join(f"{times[row]:.2f}" for row in ratios)
    return "\n".join(
        [
            "| | end-to-end | checkpointed | DGL | DGL + MAN |",
            "|---|--:|--:|--:|--:|",
            f"| GiB of a step, ResNet-101, 4 blocks | {' | '.join(f'{value:.2f}' for value in memory)} |",
            f"| seconds of a step, to end-to-end's, ResNet-50, 4 blocks | {seconds} |",
            f"| test error, CIFAR-10, 15 blocks | {' | '.join(_errors(runs[name + row]) for row in errors)} |",
        ]
    )


RIVALS = {
    "e2e": "end-to-end",
    "e2e-accumulate4": "end-to-end, accumulated over 4 micro-batches",
    "e2e-checkpointed": "end-to-end, checkpointed",
    "e2e-accumulate4-checkpointed": "end-to-end, both",
    "k4-dgl": "DGL",
    "k8-dgl": "DGL",
    "k16-dgl": "DGL",
    "k16-dgl-reach2": "DGL, reach 2",
    "k16-dgl-man-ema-only": "DGL + MAN, EMA only",
    "k8-dgl-man": "DGL + MAN",
    "k16-dgl-man": "DGL + MAN",
    "k16-infopro": "InfoPro",
    "k16-auglocal-d2": "AugLocal, depth 2",
    "k16-auglocal-d2-reach2": "AugLocal, depth 2, reach 2",
}


def rivals_table(path: Path) -> str:
    """Markdown table of operations and peaks in `operations.json`, relative to end-to-end training."""
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    lines = ["| training | blocks | operations | peak memory |", "|---|--:|--:|--:|"]
    for name, label in RIVALS.items():
        row = rows[name]
        lines.append(f"| {label} | {row['blocks']} | {row['operations_to_e2e']:.2f} | {row['peak_to_e2e']:.2f} |")
    return "\n".join(lines)


def rivals_vit_table(path: Path) -> str:
    """Markdown table of peaks and operations of a plan, with and without gradient accumulation."""
    lines = ["| training | kept, MiB | operations | checkpointed, MiB | operations |", "|---|--:|--:|--:|--:|"]
    rows = json.loads(path.read_text())["rows"]
    for count, parts in ((1, 1), (1, 4), (4, 1), (4, 4)):
        kept, checkpointed = (
            next(r for r in rows if (r["num_blocks"], r["parts"], r["recompute"]) == (count, parts, recompute))
            for recompute in (False, True)
        )
        label = ("end-to-end" if count == 1 else f"{count} local blocks") + (
            f", {parts} micro-batches" if parts > 1 else ""
        )
        cells = [f"{row['peak'] / 2**20:.0f} | {row['operations']:.2f}" for row in (kept, checkpointed)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals_language_table(path: Path) -> str:
    """Markdown table of the peaks in `language_memory.json`."""
    lines = ["| training | blocks | peak of a step, GiB |", "|---|--:|--:|"]
    lines += [f"| {r['row']} | {r['blocks']} | {r['peak_gib']:.1f} |" for r in json.loads(path.read_text())["rows"]]
    return "\n".join(lines)


DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLES = {
    "runs": lambda: runs_table([ROOT / "results" / f"cifar10-{epochs}-epochs" for epochs in ("five", "ten")]),
    "imagenette": lambda: runs_table([ROOT / "results" / "imagenette-three-epochs"]),
    "three": lambda: three_table(ROOT / "results"),
    "rivals": lambda: rivals_table(ROOT / "results" / "operations.json"),
    "plan-rivals": lambda: plan_rivals_table(ROOT / "results" / "plan-resnet101" / "plan.json"),
    "rivals-vit": lambda: rivals_vit_table(ROOT / "results" / "plan-vit-tiny" / "plan.json"),
    "rivals-language": lambda: rivals_language_table(ROOT / "results" / "language_memory.json"),
    "imagenette64": lambda: long_runs_table(ROOT / "results" / "imagenette64-sixty-epochs"),
    "gpu-trainings": lambda: gpu_trainings_table(ROOT / "results" / "gpu" / "trainings.json"),
    "gpu-memory": lambda: gpu_memory_table(ROOT / "results" / "gpu" / "memory.json"),
    "gpu-speed": lambda: gpu_speed_table(ROOT / "results" / "gpu" / "speed.json"),
    "features": lambda: features_table(ROOT / "results" / "cifar10-ten-epochs" / "analysis"),
    "ranks": lambda: ranks_table(ROOT / "results" / "pipeline.json"),
    "plan": lambda: plan_table(ROOT / "results" / "plan-resnet101" / "plan.json"),
    "speed": lambda: speed_table(ROOT / "results" / "speed.json"),
    "loop": lambda: speed_table(ROOT / "results" / "speed-loop.json"),
    "lean": lambda: lean_table(ROOT / "results" / "speed-resnet50.json"),
    "tried": lambda: tried_table(ROOT / "results" / "tried.json"),
    "block": lambda: block_table(ROOT / "results" / "scaling.json"),
    **task_tables.tables(ROOT),
    **task_goals.tables(ROOT),
    **accuracy_tables.tables(ROOT),
    **claims_table.tables(ROOT),
}


def filled(text: str) -> str:
    """The document with every table between two marks replaced by the current one."""
    for name, table in TABLES.items():
        marks = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1].lstrip()}", lambda _, m=marks, t=table: m[0] + t() + m[1], text, flags=re.DOTALL
        )
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
