"""A recipe: a config, and the error that a paper reports for it."""

from dataclasses import dataclass

from localgrad.config.schema import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """One row of a table: a config, its partition's label, and the published error."""

    config: TrainConfig
    """The complete run."""
    label: str = ""
    """The papers' name of the partition, such as `K=16`, which is not always the number of blocks."""
    paper_error: float | None = None
    """Test error in percent that the paper reports for this row; None if none is published."""

    @property
    def num_blocks(self) -> int:
        """Number of gradient-isolated blocks, including the last one: one more than the number of cuts."""
        return len(self.config.cuts or ()) + 1
