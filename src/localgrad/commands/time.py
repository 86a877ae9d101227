"""Time the training step of every finished run below a folder.

Seconds of separate runs cannot be compared, because the load on the machine differs between them. Here the trainings
run one step each in turn, so that other load affects all of them equally. All networks are in memory at the same time.
Writes step-times.json into the folder. `localgrad report` uses these seconds for a table if the file has all of its
rows, timed on the same device as the runs. CPUs with different numbers of threads count as different devices.

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
    """Measures, prints and writes the seconds per step.

    Args:
        results: Folder with results, in any subfolders.
        data: Other images, as a folder or a hub name; by default those of the runs.
        rounds: Number of timed steps of each training.
        accelerator: Device: auto, cpu, cuda or mps.
        output: Path of the file; by default step-times.json in the folder of the results.
    """
    path = output or results / "step-times.json"
    if path.is_dir() or (output is not None and not path.parent.is_dir()):  # fails here, before minutes of work
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
