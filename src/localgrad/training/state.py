"""Where a run stands: what a checkpoint holds beside weights and optimizers."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from localgrad.config.typed import parse
from localgrad.errors import LocalGradError


@dataclass
class State:
    """Where a run stands; with weights and optimizers, all that a checkpoint needs."""

    sums: list[float]
    """Sum of each block's loss over the images of this epoch so far; last, the number of those images."""
    epoch: int = 1
    """Epoch that is being trained, from 1."""
    batch: int = 0
    """Batches of that epoch that are done."""
    step: int = 0
    """Optimizer steps done since the beginning, skipped ones included."""
    lines: int = 0
    """Lines of metrics written."""
    elapsed_seconds: float = 0.0
    """Seconds of training and evaluation, over all sittings."""
    test_error: float = 100.0
    local_errors: list[float | None] | None = None
    best_test_error: float = 100.0
    best_epoch: int = 0
    best_validation_error: float = 100.0
    """On the validation images, where the best epoch is chosen on such."""
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    skipped: int = 0
    """Batches skipped since the beginning, because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of those, the ones since the last optimizer step."""


LATER = ("best_validation_error",)
"""Fields that older checkpoints have not."""


def state_of(values: Any, num_blocks: int, path: Path) -> State:
    """The state in a checkpoint, with the type of every field checked.

    Args:
        values: what the checkpoint at `path` holds as its state.
        num_blocks: of the run.
        path: for the message.

    Raises:
        LocalGradError: a field is missing, unknown or of another type, or there are other blocks.
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
