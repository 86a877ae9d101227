"""Predict how long a run takes, and notice if the CPU has too few free cores for PyTorch's threads."""

import math
import os

HOUR = 3600.0
SHORT_RUN = 1800.0
"""Length in seconds of the shorter run that is proposed."""
WORTH_SAYING = 60.0
"""Shortest remaining time in seconds that is reported."""
FEW_STEPS = 4
"""Number of timed steps, or of all steps, after which the remaining time is predicted."""


def prediction(seconds_per_step: float, steps_per_epoch: int, epochs_left: float, *, on_cpu: bool) -> str:
    """A sentence on the remaining time of a run; on a CPU, if it is more than an hour, it proposes a shorter run.

    Args:
        seconds_per_step: measured seconds per optimizer step.
        steps_per_epoch: number of optimizer steps per epoch.
        epochs_left: epochs to the end of the run, with the rest of this epoch as a fraction.
        on_cpu: whether the run trains on a CPU.
    """
    epoch = seconds_per_step * steps_per_epoch
    said = f"about {duration(epoch * epochs_left)} to the end, at {seconds_per_step:.2g} s a step (evaluation aside)"
    if on_cpu and epoch * epochs_left > HOUR:
        shorter = max(1, math.floor(SHORT_RUN / epoch))
        said += f"; a shorter run: --epochs {shorter}, about {duration(epoch * shorter)}"
    return said


def duration(seconds: float) -> str:
    """A duration in words, such as `40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 1.5 * HOUR else f"{seconds / HOUR:.1f} h"


def crowded(threads: int, cores: int, load: float) -> str | None:
    """A warning if PyTorch's threads have to wait for cores; None if there are enough cores.

    Args:
        threads: number of threads that PyTorch uses.
        cores: number of cores that this process may use.
        load: load average of the last minute.
    """
    if threads > cores:
        return f"PyTorch uses {threads} threads on {cores} core(s), which slows it: OMP_NUM_THREADS={cores} is faster"
    if threads > 1 and load + threads > 1.5 * cores + 0.5:
        free = max(1, round(cores - load))
        return (
            f"the CPU is busy (load {load:.1f} on {cores} cores) and PyTorch uses {threads} threads: "
            f"OMP_NUM_THREADS={free} is faster beside other work"
        )
    return None


def crowded_here() -> str | None:
    """The warning of `crowded` for this process and machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return crowded(torch.get_num_threads(), cores, load)
