"""Choose cuts: pure functions of a list of costs, with one cost for each unit."""

from collections.abc import Callable, Sequence

from localgrad.errors import LocalGradError


def check_num_blocks(num_blocks: int, num_units: int, why: str = "") -> None:
    """Refuse a number of blocks that `num_units` units cannot be cut into. The text `why` ends the message."""
    if type(num_blocks) is not int or not 1 <= num_blocks <= num_units:
        raise LocalGradError(
            f"num_blocks is {num_blocks!r}: the model has {num_units} units, so it makes 1 to {num_units} blocks{why}"
        )


def cut_evenly(num_units: int, num_blocks: int) -> list[int]:
    """Cut so that the blocks' numbers of units differ by at most one; the last block is one of the largest.

    Args:
        num_units: length of the chain.
        num_blocks: K, from 1 to `num_units`.

    Returns:
        The K - 1 indices of the units after which to cut, ascending.

    Raises:
        LocalGradError: K is out of range.
    """
    check_num_blocks(num_blocks, num_units)
    return [num_units * block // num_blocks - 1 for block in range(1, num_blocks)]


def cut_by_cost(
    costs: Sequence[float],
    num_blocks: int,
    ends: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Cut so that the most expensive block costs as little as any choice of cuts allows.

    A block costs the sum of its units and the cost of the auxiliary network after its last unit:
    cost(i..j) = sum(costs[i..j]) + ends[j]. The last block has no auxiliary network, so nothing is added for it.

    Args:
        costs: cost of each unit, in any unit of measure, not negative.
        num_blocks: K, from 1 to `len(costs)`.
        ends: cost of the auxiliary network after each unit; zero if not given.
        weights: a weight for a cut after each unit, zero if not given. Among choices whose most expensive block costs
            the same, the one with the smallest sum of weights is taken.

    Returns:
        The K - 1 indices of the units after which to cut, ascending.

    Raises:
        LocalGradError: K is out of range.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    nothing = [0.0] * len(costs)
    extra, tie = ends or nothing, weights or nothing
    last = len(costs) - 1

    def cost_of(start: int, stop: int) -> float:
        return sums[stop + 1] - sums[start] + (extra[stop] if stop < last else 0.0)

    return cut_by_peak(cost_of, len(costs), num_blocks, lambda _, stop: tie[stop] if stop < last else 0.0)


def cut_by_peak(
    cost_of: Callable[[int, int], float],
    num_units: int,
    num_blocks: int,
    tie_of: Callable[[int, int], float] = lambda start, stop: 0.0,
) -> list[int]:
    """Cut so that the largest `cost_of(first unit, last unit)` over all blocks is as small as possible.

    The result is exact. Dynamic programming over (number of blocks, last unit) runs once for the smallest peak, and
    once for the smallest sum of `tie_of` among the choices that reach this peak. Time: O(K n^2) for n units.

    Args:
        cost_of: cost of a block from its first to its last unit, both included.
        num_units: n.
        num_blocks: K, from 1 to n.
        tie_of: second cost of a block, with the same arguments. Among choices with the same peak, the one with the
            smallest sum of second costs is taken.

    Returns:
        The K - 1 indices of the units after which to cut, ascending.

    Raises:
        LocalGradError: K is out of range.
    """
    check_num_blocks(num_blocks, num_units)
    peak, _ = _chain(cost_of, max, num_units, num_blocks)
    _, cuts = _chain(
        lambda start, stop: tie_of(start, stop) if cost_of(start, stop) <= peak else float("inf"),
        lambda total, cost: total + cost,
        num_units,
        num_blocks,
    )
    return list(cuts)


def _chain(
    cost_of: Callable[[int, int], float], join: Callable[[float, float], float], num_units: int, num_blocks: int
) -> tuple[float, tuple[int, ...]]:
    """The smallest `join` of block costs over all choices of cuts, and the first choice that gives it."""
    best = {stop: (cost_of(0, stop), ()) for stop in range(num_units)}
    for blocks in range(2, num_blocks + 1):
        best = {
            stop: min(
                (join(best[cut][0], cost_of(cut + 1, stop)), (*best[cut][1], cut)) for cut in range(blocks - 2, stop)
            )
            for stop in range(blocks - 1, num_units)
        }
    return best[num_units - 1]
