"""The table of goals of "MAN beyond classification": what was measured, and whether it meets the goal.

A verdict follows from the result files. A goal is "not known" if its runs are missing, are fewer than it asks for, or
had an EMA that stood still.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from task_tables import LEAST_GAP, SETTINGS, Result, frozen, results


class Goal(NamedTuple):
    """A row of the table."""

    goal: str
    measured: str
    n: str
    verdict: str


def judge(passed: bool, runs: Sequence[Sequence[Result]], least: int = 1) -> str:
    """Met or missed; not known if an EMA stood still, or with fewer than `least` runs of a kind."""
    lacks = []
    if any(frozen(rows) for rows in runs):
        lacks.append("the EMA stood still")
    if min(map(len, runs)) < least:
        lacks.append(f"fewer than {least} seeds")
    return f"not known: {', '.join(lacks)}" if lacks else "met" if passed else "missed"


def absent(goal: str) -> Goal:
    return Goal(goal, "", "0", "not known: not run")


def seeds(*runs: Sequence[Result]) -> str:
    """Number of seeds of the kind that has the fewest."""
    return str(min(map(len, runs)))


def mean(runs: Sequence[Result], field: str) -> float:
    return statistics.fmean(run[field] for run in runs)


def small(folder: Path) -> list[Goal]:
    """Validation loss of nanoGPT's small setting."""
    goal = "nanoGPT's small setting, end-to-end: loss 1.88 ± 0.02"
    runs = results(folder / "language", "small-e2e").get("small-e2e", [])
    if not runs:
        return [absent(goal)]
    loss = mean(runs, "validation_loss")
    return [Goal(goal, f"{loss:.3f}", seeds(runs), judge(abs(loss - 1.88) <= 0.02, [runs]))]


def gaps(folder: Path) -> list[Goal]:
    """Share of the gap of local training that MAN closes, setting by setting."""
    found = []
    for setting, title in SETTINGS.items():
        goal = f"language, K = 3, {title}: MAN closes at least 50 % of the gap, n >= 3"
        rows = results(folder / "language", f"{setting}-(e2e|k3-.*)")
        kinds = [rows.get(f"{setting}-{kind}", []) for kind in ("e2e", "k3-readout", "k3-man")]
        if not all(kinds):
            continue
        whole, local, man = (mean(runs, "validation_loss") for runs in kinds)
        gap = local - whole
        if gap < LEAST_GAP:
            found.append(Goal(goal, f"no gap: local training is ahead by {-gap:.3f}", seeds(*kinds), "no gap to close"))
            continue
        measured = f"{100 * (local - man) / gap:.0f} %"
        for kind, name in (("bias", "trained copy alone"), ("depth1", "one fresh layer")):
            if other := rows.get(f"{setting}-k3-{kind}"):
                measured += f"; {name}: {100 * (local - mean(other, 'validation_loss')) / gap:.0f} %"
        found.append(Goal(goal, measured, seeds(*kinds), judge(local - man >= gap / 2, kinds, least=3)))
    return found


def memory(path: Path) -> list[Goal]:
    """Peaks of GPT-2 medium in 24 blocks."""
    rows = {(row["row"], row["blocks"]): row for row in json.loads(path.read_text())["rows"]}
    blocks = max(blocks for _, blocks in rows)
    local, checkpointed = rows["local", blocks], rows["checkpointed", 1]["peak_gib"]
    found = [
        Goal(
            f"GPT-2 medium, {blocks} blocks: no local block's peak above the last one's",
            f"{local['largest_local_gib']:.2f} GiB, last {local['last_gib']:.2f} GiB",
            "counted",
            "met" if local["largest_local_gib"] <= local["last_gib"] else "missed",
        )
    ]
    goal = f"the same with recompute: below checkpointing's {checkpointed:.2f} GiB"
    for name, says in (("", "one optimizer step for all blocks"), (", steps by block", "steps by block")):
        peak = rows[f"local, recompute{name}", blocks]["peak_gib"]
        found.append(Goal(f"{goal}, {says}", f"{peak:.2f} GiB", "counted", "met" if peak < checkpointed else "missed"))
    return found


def segmentation(folder: Path) -> list[Goal]:
    """IoU and peak of four blocks with MAN, relative to end-to-end training."""
    rows = results(folder / "segmentation", ".*")
    goals = (
        "CamVid, K = 4 with MAN: IoU within 1 point of end-to-end's",
        "the same: at most 60 % of end-to-end's peak",
        "the same with the memory spent on larger crops: IoU above end-to-end's",
    )
    whole, man, wide = (rows.get(name, []) for name in ("e2e", "k4-man-recompute", "k4-man-recompute-wide"))
    if not whole or not man or not wide:
        return [absent(goal) for goal in goals]
    score = mean(whole, "mean_iou")
    behind, ahead = score - mean(man, "mean_iou"), mean(wide, "mean_iou") - score
    share = 100 * mean(man, "peak_mib") / mean(whole, "peak_mib")
    measured = f"{ahead:+.2f}"
    if plain := rows.get("k4-wide"):
        measured += f"; without MAN: {mean(plain, 'mean_iou') - score:+.2f}"
    return [
        Goal(goals[0], f"{behind:.2f} behind", seeds(whole, man), judge(behind <= 1, [whole, man])),
        Goal(goals[1], f"{share:.0f} %", seeds(whole, man), "met" if share <= 60 else "missed"),
        Goal(goals[2], measured, seeds(whole, wide), judge(ahead > 0, [whole, wide])),
    ]


def selfsupervised(folder: Path) -> list[Goal]:
    """Probe accuracy behind end-to-end training after the last stage."""
    rows = results(folder / "selfsupervised", ".*")
    found = []
    for name, title, most in (("k4", "blockwise", 2), ("k4-man", "blockwise with MAN", 1)):
        goal = f"without labels, {title}: probe accuracy at most {most} point{'s' * (most > 1)} behind end-to-end's"
        runs = rows.get("e2e", []), rows.get(name, [])
        if not all(runs):
            found.append(absent(goal))
            continue
        behind = mean(runs[0], "probe_accuracy") - mean(runs[1], "probe_accuracy")
        found.append(Goal(goal, f"{behind:.2f} behind", seeds(*runs), judge(behind <= most, runs)))
    return found


def goals_table(root: Path) -> str:
    """Markdown table with one row per goal."""
    folder = root / "results" / "tasks"
    goals = [*small(folder), *gaps(folder), *memory(root / "results" / "language_memory.json")]
    goals += [*segmentation(folder), *selfsupervised(folder)]
    lines = ["| goal | measured | n | verdict |", "|---|---|--:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(goal)} |" for goal in goals)])


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Functions that make the tables, by the name of their marks in the documents."""
    return {"task-goals": lambda: goals_table(root)}
