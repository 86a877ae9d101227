"""What every recipe is: a config, and what a paper says of it."""

from dataclasses import dataclass

from localgrad.config.schema import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """One row of a table."""

    config: TrainConfig
    """The complete run."""
    label: str = ""
    """What the papers call this partition, as `K=16`; it is not always the number of blocks."""
    paper_error: float | None = None
    """Test error in percent that the paper reports for this row; None where none is published."""

    @property
    def num_blocks(self) -> int:
        """Number of gradient-isolated blocks, the last one included: one more than the cuts."""
        return len(self.config.cuts or ()) + 1
