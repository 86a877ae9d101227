"""How long a run will take, and whether the processor is too busy for its threads."""

import math
import os

HOUR = 3600.0
SHORT_RUN = 1800.0
"""Seconds of the shorter run that is proposed."""
WORTH_SAYING = 60.0
"""Seconds to the end that are worth a word."""
FEW_STEPS = 4
"""Timed steps after which the rest is predicted."""


def prediction(seconds_per_step: float, steps_per_epoch: int, epochs_left: float, *, on_cpu: bool) -> str:
    """How long the rest of a run takes, and on a processor, where that is more than an hour, what a shorter one is.

    Args:
        seconds_per_step: measured.
        steps_per_epoch: of the run.
        epochs_left: to its end, the rest of this epoch included.
        on_cpu: whether a processor trains.
    """
    epoch = seconds_per_step * steps_per_epoch
    said = f"about {duration(epoch * epochs_left)} to the end, at {seconds_per_step:.2g} s a step (evaluation aside)"
    if on_cpu and epoch * epochs_left > HOUR:
        shorter = max(1, math.floor(SHORT_RUN / epoch))
        said += f"; a shorter run: --epochs {shorter}, about {duration(epoch * shorter)}"
    return said


def duration(seconds: float) -> str:
    """As `40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 1.5 * HOUR else f"{seconds / HOUR:.1f} h"


def crowded(threads: int, cores: int, load: float) -> str | None:
    """What to say where threads wait for cores; None where there are enough.

    Args:
        threads: that PyTorch uses.
        cores: that this process may use.
        load: processes that wanted a core in the last minute, on average.
    """
    if threads > cores:
        return f"PyTorch uses {threads} threads on {cores} core(s), which slows it: OMP_NUM_THREADS={cores} is faster"
    if threads > 1 and load + threads > 1.5 * cores + 0.5:
        free = max(1, round(cores - load))
        return (
            f"the processor is busy (load {load:.1f} on {cores} cores) and PyTorch uses {threads} threads: "
            f"OMP_NUM_THREADS={free} is faster beside other work"
        )
    return None


def crowded_here() -> str | None:
    """The same, of this process."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return crowded(torch.get_num_threads(), cores, load)
