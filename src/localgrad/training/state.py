"""The state of a run: the content of a checkpoint besides weights and optimizers."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from localgrad.config.typed import parse
from localgrad.errors import LocalGradError


@dataclass
class State:
    """The progress of a run and its errors so far. A checkpoint has it besides weights and optimizers."""

    sums: list[float]
    """Sum of each block's loss over this epoch's images so far; last, their number. Both are means over replicas."""
    epoch: int = 1
    """The current epoch, from 1."""
    batch: int = 0
    """Number of finished batches of the current epoch."""
    step: int = 0
    """Number of optimizer steps since the start of the run, skipped ones included."""
    lines: int = 0
    """Number of lines in the metrics file."""
    elapsed_seconds: float = 0.0
    """Seconds of training and evaluation, without pauses before a resume."""
    test_error: float = 100.0
    """Test error in percent at the last evaluation."""
    local_errors: list[float | None] | None = None
    """Test error in percent of each local head at the last evaluation; None if they are not evaluated."""
    best_test_error: float = 100.0
    """Test error in percent of the best epoch."""
    best_epoch: int = 0
    """The epoch with the smallest validation error, or test error without validation images; 0 for none yet."""
    best_validation_error: float = 100.0
    """Validation error in percent of the best epoch; 100 without validation images."""
    peak_memory_bytes: int | None = None
    """Peak memory of a step in bytes, the largest of all ranks."""
    seconds_per_step: float | None = None
    """Median seconds from one optimizer step to the next."""
    skipped: int = 0
    """Number of batches skipped since the start of the run, because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Number of batches skipped since the last optimizer step that changed weights."""


LATER = ("best_validation_error",)
"""Fields that older checkpoints do not have."""


def state_of(values: Any, num_blocks: int, path: Path) -> State:
    """Parse the state of a checkpoint, and check the type of every field.

    Args:
        values: the checkpoint's entry `state`.
        num_blocks: number of blocks of the run.
        path: the checkpoint, for the message.

    Raises:
        LocalGradError: a field is missing or of another type, or the number of blocks differs.
    """
    try:
        state = parse(State, values, "state")
        missing = [field.name for field in fields(State) if field.name not in (*values, *LATER)]
        if missing:
            raise LocalGradError(f"state has no {', '.join(missing)}")
        if len(state.sums) != num_blocks + 1:
            raise LocalGradError(f"state.sums has {len(state.sums)} numbers; it should have {num_blocks + 1}")
    except LocalGradError as problem:
        raise LocalGradError(
            f"{path} is not a checkpoint of this version of localgrad, or not of this run ({problem}); "
            "start again in another --run-dir"
        ) from None
    return state
