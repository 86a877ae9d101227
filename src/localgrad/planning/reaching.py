"""Cuts for losses with a reach above 1, by an estimate of the peak memory."""

from collections.abc import Callable, Sequence
from functools import cache

from localgrad.planning.peaks import INFINITE, Profile


def cuts_for_reach(profile: Profile, num_blocks: int, reach: int) -> list[int]:
    """Cuts into K blocks whose losses train `reach` blocks each, with a small estimated peak.

    While the loss of block i is back-propagated, the graphs of `reach` blocks are alive. The estimate treats them as
    one block. The best cuts for `reach=1` and evenly spaced cuts are moved, one cut at a time, as long as the estimate
    gets smaller. So the result need not be the best of all cuts.
    """
    last = len(profile.units) - 1

    @cache
    def peaks(start: int, index: int) -> list[float]:
        return profile.peaks_from(start, profile.ends_of(index, num_blocks))

    def estimate(cuts: Sequence[int]) -> float:
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, last]
        lasting, worst = 0.0, 0.0
        for index, stop in enumerate(stops):
            start = starts[max(0, index - reach + 1)]
            worst = max(worst, profile.waiting(start) + peaks(start, index)[stop - start])
            lasting += profile.ends_of(index, num_blocks)[stop].lasting if index < len(cuts) else 0.0
        return lasting + worst

    evenly = [round((last + 1) * block / num_blocks) - 1 for block in range(1, num_blocks)]
    return min((_moved(begin, last, estimate) for begin in (profile.best_cuts(num_blocks), evenly)), key=estimate)


def _moved(cuts: Sequence[int], last: int, estimate: Callable[[Sequence[int]], float]) -> list[int]:
    """Move one cut at a time to the position with the smallest estimate, until no move makes it smaller."""
    best, found = estimate(cuts), list(cuts)
    gains = True
    while gains:
        gains = False
        for index in range(len(found)):
            begin = found[index - 1] + 1 if index else 0
            end = found[index + 1] if index + 1 < len(found) else last
            for position in range(begin, end):
                moved = [*found[:index], position, *found[index + 1 :]]
                value = estimate(moved)
                if value < best < INFINITE or (value < INFINITE and best == INFINITE):
                    best, found, gains = value, moved, True
    return found
