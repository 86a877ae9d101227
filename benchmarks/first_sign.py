"""Measure the first seconds of each command: the first byte of output, Ctrl-C, and a hub name without a network.

    python benchmarks/first_sign.py --output results/first_sign.json

Each command runs in its own process, which is terminated at its first byte of output. A first round fills the page
cache and does not count. The goal is a first byte within two seconds. Ctrl-C is sent after several delays; the goal is
one line and exit code 130. During the first 0.04 s or so Python itself starts, and none of our code can handle Ctrl-C;
the file has these results too.
"""

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import environment, print_table, write

BAR = 2.0
HUB_BAR = 10.0
MOMENTS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.15, 0.3, 1.0, 3.0)
"""Seconds after the start at which Ctrl-C is sent."""
INTERRUPTED = ("train digits-dgl-man --run-dir {folder}/ctrl-c", "demo --run-dir {folder}/demo-c")
INTERRUPTED += ("report {results} --output {folder}/report.html", "recipes", "predict {run} {images}")
COMMANDS = (
    "--help",
    "recipes",
    "reproduce",
    "train --help",
    "train digits-dgl-man --run-dir {folder}/new",
    "train digits-dgl-man --run-dir {folder}/new --dry-run",
    "train --data {images} --run-dir {folder}/own",
    "train {run} --resume --epochs 3",
    "demo --run-dir {folder}/demo",
    "evaluate {run}",
    "predict {run} {images}",
    "analyse {run} --output {folder}/analysis",
    "time {folder} --output {folder}/times.json",
    "report {results} --output {folder}/report.html",
    "reproduce digits --output {folder}/table",
    "units torchvision:resnet50",
    "plan torchvision:resnet101",
)
HUB = (
    "train cifar10-resnet32-k16-dgl --run-dir {folder}/hub",
    "reproduce first --output {folder}/hub-table",
    "evaluate {run} --data uoft-cs/cifar10",
)


def first_byte(words: list[str], variables: dict[str, str]) -> float:
    """Seconds to the first byte on stdout or stderr; then terminates the process."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "localgrad", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = os.read(process.stdout.fileno(), 1)
    seconds = time.perf_counter() - begin
    if not said:
        raise SystemExit(f"{shlex.join(words)} ended without a word")
    process.terminate()
    process.stdout.close()
    process.wait()
    return seconds


def failure(words: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """Seconds until a command fails, its exit code and its error message."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "localgrad", *words], capture_output=True, text=True, env=variables, check=False
    )
    said = [line for line in done.stderr.splitlines() if "loading PyTorch" not in line]
    return {"seconds": time.perf_counter() - begin, "exit_code": done.returncode, "said": " / ".join(said)}


def pressed(words: list[str], moment: float) -> str:
    """How a command ends after Ctrl-C: `one line`, `traceback`, `ended before`, or `silent` (killed by the signal)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "localgrad", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    if "Traceback" in said:
        return "traceback"
    if process.returncode == 130:
        return "one line" if said.count("interrupted") == 1 else f"said {said!r}"
    return {0: "ended before", -signal.SIGINT: "silent"}.get(process.returncode, f"exit code {process.returncode}")


def make_images(folder: Path) -> None:
    """A few images in two class folders."""
    import numpy as np
    from PIL import Image

    for label in ("cats", "dogs"):
        (folder / label).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def measure(rounds: int, results: Path) -> dict[str, Any]:
    """Measure all commands, `rounds` times each after one round that does not count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"folder": folder, "images": folder / "images", "run": folder / "run", "results": results}
        make_images(folder / "images")
        variables = {**os.environ, "HF_HOME": str(folder / "cache")}
        words = shlex.split("train digits-dgl-man --epochs 1 --train-limit 100 --quiet --run-dir")
        subprocess.run([sys.executable, "-m", "localgrad", *words, str(folder / "run")], check=True)
        signs, hub, interrupts = [], [], []
        for command in COMMANDS:
            given = shlex.split(command.format(**places))
            seconds = [first_byte(given, variables) for _ in range(rounds + 1)][1:]
            signs.append({"row": command, "median": statistics.median(seconds), "worst": max(seconds)})
        print_table(f"seconds to the first byte, median and worst of {rounds}", signs)
        for command in HUB:
            hub.append({"row": command, **failure(shlex.split(command.format(**places)), variables)})
        print_table("a hub's name without network", hub)
        for command in INTERRUPTED:
            given = shlex.split(command.format(**places))
            ends = {str(moment): pressed(given, moment) for moment in MOMENTS}
            interrupts.append({"row": command.split()[0], **ends})
        print_table("Ctrl-C at so many seconds", interrupts)
    return {"bar": BAR, "first_byte": signs, "hub_bar": HUB_BAR, "no_network": hub, "interrupts": interrupts}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder for `localgrad report`")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {"environment": environment(), "command": shlex.join(["python", *sys.argv]), "load_before": load}
    found |= measure(given.rounds, given.results)
    if given.output:
        write(given.output, found)


if __name__ == "__main__":
    main()
