"""Write the metrics of a run for TensorBoard."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Board:
    """Writes lines of metrics for TensorBoard, with a `SummaryWriter`."""

    writer: Any

    def write(self, line: dict[str, Any]) -> None:
        """Write every number of an epoch's line; a list of numbers, one per block, becomes one curve per block."""
        for name, value in line.items():
            values = (
                {f"{name}/block{number}": part for number, part in enumerate(value, start=1)}
                if isinstance(value, list)
                else {name: value}
            )
            for label, number in values.items():
                if number is not None and name != "epoch":
                    self.writer.add_scalar(label, number, line["epoch"])
        self.writer.flush()


def check_tensorboard() -> None:
    """Check, before anything is written, that TensorBoard is installed.

    Raises:
        LocalGradError: it is not installed.
    """
    if find_spec("tensorboard") is None:
        raise LocalGradError("--tensorboard needs TensorBoard: pip install 'localgrad[tensorboard]'")


def open_board(folder: Path, epoch: int) -> Board:
    """Open a TensorBoard writer in a run folder, which discards what an interrupted run wrote from `epoch` on.

    Raises:
        LocalGradError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise LocalGradError("--tensorboard needs TensorBoard: pip install 'localgrad[tensorboard]'") from None
    return Board(SummaryWriter(str(folder / "tensorboard"), purge_step=epoch))
