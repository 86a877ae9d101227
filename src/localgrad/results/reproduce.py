"""Reproduce a table: train every row with every seed in its own `localgrad train` process, resumable at any point.

The output folder holds one `ROW-seedN.json` for each finished run; a run with this file is not trained again. The run
folders in `runs/ROW-seedN` are large, and can be deleted when all runs are done.
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from localgrad.config.schema import TrainConfig
from localgrad.data.sources import check_source
from localgrad.errors import LocalGradError
from localgrad.results.cells import Cell, load_result
from localgrad.results.table_images import Known, check_images, other_images
from localgrad.runs.files import lock, make_folder, write_json
from localgrad.runs.result import as_file
from localgrad.training.interrupts import InterruptedRun, noted_interrupts
from localgrad.training.outlook import HOUR, duration
from localgrad.training.progress import TableDisplay

POLL_SECONDS = 0.1


def run_cells(cells: Sequence[Cell], *, jobs: int = 1) -> dict[str, str]:
    """Run the cells that are not done yet, each in its own process, and collect the results.

    The processes share the threads that torch would use. GPUs are assigned round-robin.

    Args:
        cells: the cells, from `plan_cells`.
        jobs: number of processes at the same time.

    Returns:
        The reason of each failed run, by name of the cell. A failed run does not stop the others.

    Raises:
        LocalGradError: `jobs` is less than 1, the folder cannot be written, another process is running this table, or
            the images differ from those of the first runs of the table.
        KeyboardInterrupt: interrupted; every process has saved a checkpoint, and the same call continues from there.
    """
    if jobs < 1:
        raise LocalGradError(f"jobs is {jobs}: it must be at least 1")
    failures: dict[str, str] = {}
    for cell in cells:
        if cell.state != "done" and cell.run.is_finished:  # finished while `run_cells` was being interrupted
            _collect(cell, failures)
    waiting = [cell for cell in cells if cell.state != "done" and cell.name not in failures]
    if not waiting:
        return failures
    for data in {cell.config.data.source: cell.config.data for cell in waiting}.values():
        check_source(data)  # once, before each run would fail on its own
    jobs, predicted = min(jobs, len(waiting)), False
    running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = {}
    places: dict[str, int] = {}
    output, num_done = waiting[0].output, len(cells) - len(waiting) - len(failures)
    with _locked(output) as held, noted_interrupts() as interrupted, TableDisplay(len(cells), num_done) as display:
        images = check_images(cells, waiting)
        try:
            while (waiting or running) and not interrupted.is_set():
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    display.started(cell.name, cell.config.optim.epochs, len(_test_errors_so_far(cell, failures)))
                    if cell.name in failures:
                        display.ended(cell.name, f"failed: {failures[cell.name]}")
                        continue
                    places[cell.name] = min(set(range(jobs)) - {places[name] for name in running})
                    running[cell.name] = cell, _start(cell, environment(cell.config, places[cell.name], jobs), held)
                time.sleep(POLL_SECONDS)
                for name, (cell, process) in list(running.items()):
                    if process.poll() is None:
                        display.progress(name, _test_errors_so_far(cell, {}))
                        if not predicted and (said := _prediction(cell, cells, jobs)):
                            display.message(said)
                            predicted = True
                        continue
                    del running[name]
                    _take_result(cell, process.returncode, images, failures)
                    if name in failures:
                        display.ended(name, f"failed: {failures[name]}; see {cell.log}")
                    else:
                        display.ended(name, f"test error {load_result(cell.result).test_error:.2f}%")
        finally:
            _stop([process for _, process in running.values()])
        if interrupted.is_set():
            raise InterruptedRun("interrupted; the same command goes on from there", interrupted.number)
    return failures


def _take_result(cell: Cell, code: int, images: Known, failures: dict[str, str]) -> None:
    """Collect the result of a finished process, or record why there is none."""
    problem = _reason(cell, code) if code else other_images(cell, images)
    if problem:
        failures[cell.name] = problem
    else:
        _collect(cell, failures)


def _prediction(cell: Cell, cells: Sequence[Cell], jobs: int) -> str | None:
    """A sentence with the predicted time of the rest of the table; None before a run has trained an epoch.

    If the rest takes more than an hour on a CPU, the sentence suggests fewer epochs.
    """
    done = len(_test_errors_so_far(cell, {}))
    if not done:
        return None
    seconds = json.loads(cell.run.metrics.read_text().splitlines()[done - 1])["elapsed_seconds"] / done
    left = [each.config.optim.epochs - len(_test_errors_so_far(each, {})) for each in cells if each.state != "done"]
    total = seconds * sum(left) / jobs
    said = f"about {duration(total)} to the end of the table, at {duration(seconds)} an epoch"
    if total > HOUR and cell.config.accelerator in ("auto", "cpu"):
        said += f"; a shorter table: --epochs {max(1, int(HOUR * jobs / (seconds * len(left))))} takes about an hour"
    return said


def environment(config: TrainConfig, position: int, jobs: int) -> dict[str, str]:
    """Environment variables of one of several concurrent runs: its number of threads, and its GPU.

    Args:
        config: config of the run; with `devices` above 1 it gets all GPUs.
        position: index of the run among the concurrent ones, by which it gets its GPU.
        jobs: number of concurrent runs.
    """
    import torch

    variables = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if config.devices == 1 and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        variables["CUDA_VISIBLE_DEVICES"] = gpus[position % len(gpus)]
    return variables


def _start(cell: Cell, variables: dict[str, str], held: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "localgrad", *cell.command, "--run-dir", str(cell.run.path)]
    try:
        with cell.log.open("ab") as log:
            return subprocess.Popen(
                [*command, *["--resume"] * (cell.state == "started")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                pass_fds=(held,),
            )
    except OSError as error:
        raise LocalGradError(f"{cell.name} cannot be started: {error.strerror or error}") from error


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End every process, which saves a checkpoint first, and wait; after a second Ctrl-C they end without saving."""
    for process in processes:
        process.terminate()
    for process in processes:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                for other in processes:
                    other.terminate()


def _reason(cell: Cell, code: int) -> str:
    said = [line.strip() for line in cell.log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(said) if line.startswith("localgrad: ")]
    why = " ".join(said[errors[-1] if errors else -1 :]).removeprefix("localgrad: ") if said else "it said nothing"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"{why} (exit code {code})"


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Context: locks the folder by a lock file. Child processes inherit the lock, so it lasts until the last one ends.

    Raises:
        LocalGradError: another process holds it, or the folder cannot be written.
    """
    path = output / "runs" / "lock"
    try:
        make_folder(path.parent)
        file = path.open("w")
    except OSError as error:
        raise LocalGradError(f"the folder {output} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            lock(file)
        except BlockingIOError:
            raise LocalGradError(f"runs of {output} are going on; wait for them, or give another --output") from None
        yield file.fileno()


def collect(cell: Cell) -> None:
    """Write the cell's result file: `result.json` of its run folder, plus the command and the test error by epoch.

    Raises:
        LocalGradError: the run is not finished, its files are damaged, or the file cannot be written.
    """
    command = shlex.join(["localgrad", *cell.command])
    result = dataclasses.replace(load_result(cell.run.result), command=command, test_errors=_test_errors(cell))
    write_json(cell.result, as_file("run", result))


def _collect(cell: Cell, failures: dict[str, str]) -> None:
    """`collect`, but adds an error to the failures instead of raising it."""
    try:
        collect(cell)
    except LocalGradError as error:
        failures[cell.name] = str(error)


def _test_errors(cell: Cell) -> list[float | None]:
    """Test error in percent after each epoch so far; None for an epoch without evaluation."""
    path = cell.run.metrics
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line)["test_error"] for line in lines if line.endswith("\n")]  # the last may be cut off
    except (ValueError, TypeError, KeyError) as error:
        raise LocalGradError(f"{path} is damaged ({error}): remove {cell.run.path} to run it anew") from error


def _test_errors_so_far(cell: Cell, failures: dict[str, str]) -> list[float | None]:
    """`_test_errors`, but adds an error to the failures instead of raising it."""
    try:
        return _test_errors(cell)
    except LocalGradError as error:
        failures[cell.name] = str(error)
        return []
