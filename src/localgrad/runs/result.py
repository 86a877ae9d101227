"""The result of a run."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself; `result.json` is this, field by field."""

    config: dict[str, Any]
    """The complete config."""
    test_error: float
    """Test error in percent after the last epoch."""
    best_test_error: float
    """Smallest test error in percent over the evaluated epochs (chosen on the test images, as in the papers)."""
    best_epoch: int
    """Epoch of the smallest test error."""
    local_errors: list[float | None] | None
    """Test error in percent of each block's own head after the last epoch, when that was asked for."""
    cuts: list[str]
    """Units after which gradients were isolated."""
    num_blocks: int
    """Number of gradient-isolated blocks, the last one included."""
    parameters: dict[str, int]
    """Number of parameters: `backbone`, `auxiliary` and, of both together, `trainable`."""
    peak_memory_bytes: int
    """Most bytes of tensors that one training step held beyond what was there before it."""
    seconds_per_step: float | None
    """Median seconds from one optimizer step of the last epoch to the next; None for a run of one or two."""
    wall_seconds: float
    """Seconds of training and evaluation, over all sittings."""
    device: str
    """Name of the processor or GPU."""
    precision: str
    """The precision that `auto` stood for."""
    versions: dict[str, str]
    """Versions of localgrad, Python, torch, torchvision and lightning."""
    commit: str | None
    """Commit of localgrad's code, with `-dirty` if changed; None where it is in no repository."""
    skipped: int = 0
    """Batches skipped because a loss or gradient was not finite."""
    num_classes: int | None = None
    """Number of classes of the images, and of the network."""
    class_names: list[str] | None = None
    """Their names in order, where the images have such."""
