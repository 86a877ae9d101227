"""The main findings of a table: end-to-end training, the best local training, and the gain of MAN."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from localgrad.config.methods import method_order
from localgrad.results.tables import Row, Table, own_fields


@dataclass(frozen=True)
class Gain:
    """The change of an objective's test error by a momentum auxiliary network."""

    without: Row
    with_momentum: Row

    @property
    def label(self) -> str:
        """Label of the row with momentum, such as `DGL + MAN`."""
        return self.with_momentum.label

    @property
    def differences(self) -> list[float]:
        """Decrease of the error in percentage points for each seed that both rows have, or of the means without any."""
        errors = [
            {run.result.config.seed: run.result.test_error for run in row.runs}
            for row in (self.without, self.with_momentum)
        ]
        pairs = sorted(errors[0].keys() & errors[1].keys())
        if not pairs:
            return [self.without.mean("test_error") - self.with_momentum.mean("test_error")]
        return [errors[0][seed] - errors[1][seed] for seed in pairs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)


@dataclass(frozen=True)
class Finding:
    """The main rows of a table. A row that the table lacks is None."""

    table: Table
    end_to_end: Row | None
    """End-to-end training without activation checkpointing or gradient accumulation."""
    checkpointed: Row | None
    """End-to-end training with activation checkpointing."""
    best: Row | None
    """The row with the smallest mean test error of those with several blocks."""
    gains: tuple[Gain, ...]
    """One for each row without momentum that has a counterpart with momentum."""

    def to_end_to_end(self, row: Row | None, values: Mapping[int, float | None]) -> float | None:
        """Ratio of a row's value to that of end-to-end training; `values` is by position in the table."""
        if row is None or self.end_to_end is None:
            return None
        own, whole = (values.get(self.table.rows.index(each)) for each in (row, self.end_to_end))
        return own / whole if own and whole else None


def finding(table: Table) -> Finding:
    """The main rows of a table."""
    whole = [row for row in table.rows if not row.is_local]
    local = [row for row in table.rows if row.is_local]
    plain = [row for row in whole if not row.config.recompute and row.config.optim.accumulate == 1]
    checkpointed = [row for row in whole if row.config.recompute]
    return Finding(
        table,
        plain[0] if plain else None,
        checkpointed[0] if checkpointed else None,
        min(local, key=lambda row: row.mean("test_error"), default=None),
        tuple(_gains(local)),
    )


def _gains(rows: list[Row]) -> list[Gain]:
    """Pair each row without momentum with the plainest row that differs only in its momentum network."""
    found = []
    for without in rows:
        if without.config.momentum.name != "none":
            continue
        same = [
            row
            for row in rows
            if row.config.momentum.name != "none" and _without_momentum(row) == _without_momentum(without)
        ]
        if same:
            found.append(Gain(without, min(same, key=_plainness)))
    return found


def _without_momentum(row: Row) -> tuple[object, ...]:
    """Key of a row: rows with equal keys differ only in their momentum network."""
    own = own_fields(row.config)
    names = [name for name in own if name != "name" and not name.startswith("momentum.")]
    return (row.num_blocks, row.num_classes, *(str(own[name]) for name in names))


def _plainness(row: Row) -> tuple[int, int]:
    """Sort key: the order of the momentum networks, then the length of the label: the default form has the shortest."""
    return method_order(row.config)[1], len(row.label)
