"""Measure how long a step takes of every training that has a finished run below a folder, in turns.

Runs that were made at different times, or beside others, cannot be compared by their seconds. Here the trainings take
turns, a step each, so that whatever else the machine does hits all alike. All networks are in memory at once. Writes
step-times.json into the folder. From there `localgrad report` takes the seconds of each table of which all rows are in
it, for runs of the same device (a processor's number of threads counts).

Examples:
  localgrad time results/first
  OMP_NUM_THREADS=1 localgrad time results/first --data path/to/cifar10 --rounds 30
"""

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from localgrad.commands.parse import Output, call, loading, tell
from localgrad.errors import LocalGradError
from localgrad.runs.files import check_writable, write_json


def time(
    results: Positional[Path],
    *,
    data: str | None = None,
    rounds: int = 15,
    accelerator: str = "auto",
    output: Output = None,
) -> int:
    """Measures, prints and writes.

    Args:
        results: Folder with results, in any subfolders.
        data: Other images: a folder or a hub name; those of the runs unless given.
        rounds: Steps of each training that count.
        accelerator: Device: auto, cpu, cuda or mps.
        output: The file; step-times.json in the folder of the results unless given.
    """
    path = output or results / "step-times.json"
    if path.is_dir() or (output is not None and not path.parent.is_dir()):  # before minutes of work
        raise LocalGradError(f"{path} cannot be a file: give --output with another name, in a folder that is there")
    check_writable(path)
    with loading():
        from localgrad.results.step_times import show_times, time_results
        from localgrad.runs.result import as_file

    found = time_results(results, data=data, rounds=rounds, accelerator=accelerator, warn=tell)
    show_times(found)
    write_json(path, as_file("step-times", found))
    print(f"wrote {path}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`localgrad time RESULTS`."""
    return call(time, arguments, "localgrad time", __doc__)
