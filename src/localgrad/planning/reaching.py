"""Plans of losses that reach further than their own block: cuts by an estimate, peaks by a step on `meta`."""

from collections.abc import Callable, Sequence
from functools import cache

from localgrad.planning.peaks import INFINITE, Profile


def cuts_for_reach(profile: Profile, num_blocks: int, reach: int) -> list[int]:
    """Cuts into K blocks whose losses train `reach` blocks each, with a small peak by an estimate.

    While the loss of block i is back-propagated the graphs of `reach` blocks are alive, about those of one block from
    the first of them to i. The best cuts of `reach=1` and evenly spaced ones are moved, one cut at a time, as long as
    that makes the largest of these blocks smaller; so they need not be the best there are.
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
    """The cuts after moving one at a time to where the estimate is least, until none gains."""
    best, found = estimate(cuts), list(cuts)
    gains = True
    while gains:
        gains = False
        for place in range(len(found)):
            begin = found[place - 1] + 1 if place else 0
            end = found[place + 1] if place + 1 < len(found) else last
            for position in range(begin, end):
                moved = [*found[:place], position, *found[place + 1 :]]
                value = estimate(moved)
                if value < best < INFINITE or (value < INFINITE and best == INFINITE):
                    best, found, gains = value, moved, True
    return found
