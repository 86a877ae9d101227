"""What the tables show at a glance: the best local training, what MAN gains, and what memory and time it takes."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from localgrad.config.methods import method_order
from localgrad.results.tables import Row, Table, own_fields


@dataclass(frozen=True)
class Gain:
    """What a momentum network changes in an objective's test error."""

    without: Row
    with_momentum: Row

    @property
    def label(self) -> str:
        """As `DGL + MAN`."""
        return self.with_momentum.label

    @property
    def differences(self) -> list[float]:
        """Percentage points that the error falls by: a pair of equal seeds each, or of the means without such pairs."""
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
    """The main rows of a table; None for what it does not have."""

    table: Table
    end_to_end: Row | None
    """Plain end-to-end training, activations kept."""
    checkpointed: Row | None
    """End-to-end training with activation checkpointing."""
    best: Row | None
    """The row of several blocks with the smallest mean test error."""
    gains: tuple[Gain, ...]
    """One for each objective that is there without and with a momentum network."""

    def to_end_to_end(self, row: Row | None, values: Mapping[int, float | None]) -> float | None:
        """A value of a row over that of end-to-end training, by the rows' positions in the table."""
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
    """For each row without a momentum network the plainest one that differs in that alone."""
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
    """What a row has in common with one that differs in its momentum network alone."""
    own = own_fields(row.config)
    names = [name for name in own if name != "name" and not name.startswith("momentum.")]
    return (row.num_blocks, row.num_classes, *(str(own[name]) for name in names))


def _plainness(row: Row) -> tuple[int, int]:
    """Sort key: the first momentum network of all, in its usual form (whose label is the shortest)."""
    return method_order(row.config)[1], len(row.label)
