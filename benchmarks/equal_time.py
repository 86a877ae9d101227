"""Print the commands that train each row for the wall-clock time that end-to-end training needs for its epochs.

    python benchmarks/equal_time.py results/cifar10-ten-epochs/step-times.json --data path/to/cifar10 --seeds 0

prints one `localgrad train` command per row and seed. A row gets `epochs = round(E * s_end-to-end / s_row)`, at least
1, where E is end-to-end's number of epochs and s the seconds per step from `localgrad time`. The row's schedule has
this length. A comment after each command gives the row's training time relative to end-to-end's.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def budgets(rows: Sequence[dict[str, Any]], epochs: int) -> Iterator[tuple[str, int, float]]:
    """Recipe and flags of each row, its number of epochs, and its training time relative to end-to-end's."""
    whole = next((row for row in rows if row["num_blocks"] == 1 and not row["config"].get("recompute")), None)
    if whole is None:
        raise SystemExit("the step times have no row of one block, which end-to-end training is")
    for row in rows:
        ratio = row["seconds_per_step"] / whole["seconds_per_step"]
        own = max(1, round(epochs / ratio))
        flags = " --recompute" if row["config"].get("recompute") else ""
        yield row["config"]["name"] + flags, own, own * ratio / epochs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=Path, help="the step-times.json of `localgrad time`")
    parser.add_argument("--data", default="path/to/cifar10")
    parser.add_argument("--epochs", type=int, default=10, help="end-to-end's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/equal-time"))
    options = parser.parse_args(arguments)
    for row, epochs, share in budgets(json.loads(options.times.read_text())["rows"], options.epochs):
        for seed in options.seeds:
            folder = options.runs / f"{row.replace(' --', '-')}-seed{seed}"
            command = f"localgrad train {row} --data {shlex.quote(options.data)} --epochs {epochs} --warmup-epochs 0"
            command += f" --batch-size 128 --lr 0.1 --seed {seed} --run-dir {folder}"
            print(f"{command}  # {share:.2f} of end-to-end's time")


if __name__ == "__main__":
    main()
