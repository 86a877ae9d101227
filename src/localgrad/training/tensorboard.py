"""Metrics for TensorBoard."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from localgrad.errors import LocalGradError


@dataclass(frozen=True)
class Board:
    """Writes lines of metrics for TensorBoard."""

    writer: Any

    def write(self, line: dict[str, Any]) -> None:
        """Writes every number of a line, with one curve a block where there is one number a block."""
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
    """Refuses, before anything is written, to go on without TensorBoard."""
    if find_spec("tensorboard") is None:
        raise LocalGradError("--tensorboard needs TensorBoard: pip install 'localgrad[tensorboard]'")


def open_board(folder: Path, epoch: int) -> Board:
    """A TensorBoard writer in a run's folder, which overrides what an interrupted run wrote from `epoch` on.

    Raises:
        LocalGradError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise LocalGradError("--tensorboard needs TensorBoard: pip install 'localgrad[tensorboard]'") from None
    return Board(SummaryWriter(str(folder / "tensorboard"), purge_step=epoch))
