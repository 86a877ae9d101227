"""Cuts: exact against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localgrad import LocalGradError
from localgrad.core.partition import cut_by_cost, cut_by_peak, cut_evenly

COSTS = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def cost_of_blocks(costs: list[int], ends: list[int], cuts: tuple[int, ...] | list[int]) -> list[int]:
    starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, len(costs) - 1]
    return [
        sum(costs[start : stop + 1]) + (ends[stop] if stop < len(costs) - 1 else 0)
        for start, stop in zip(starts, stops, strict=True)
    ]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_the_largest_block_is_as_small_as_brute_force_finds(data: st.DataObject) -> None:
    costs = data.draw(COSTS)
    ends = data.draw(st.lists(st.integers(0, 50), min_size=len(costs), max_size=len(costs)))
    num_blocks = data.draw(st.integers(1, len(costs)))
    cuts = cut_by_cost(costs, num_blocks, ends)
    assert cuts == sorted(set(cuts))
    assert len(cuts) == num_blocks - 1
    assert all(0 <= cut < len(costs) - 1 for cut in cuts)
    choices = itertools.combinations(range(len(costs) - 1), num_blocks - 1)
    best = min(max(cost_of_blocks(costs, ends, choice)) for choice in choices)
    assert max(cost_of_blocks(costs, ends, cuts)) == best


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_even_cuts_differ_by_one_unit_at_most(num_units: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_units))
    cuts = cut_evenly(num_units, num_blocks)
    sizes = cost_of_blocks([1] * num_units, [0] * num_units, cuts)
    assert len(sizes) == num_blocks
    assert max(sizes) - min(sizes) <= 1


def test_a_peak_that_is_no_sum() -> None:
    """Any cost of a run will do: here a run costs the square of its length."""
    assert cut_by_peak(lambda start, stop: (stop - start + 1) ** 2, 9, 3) == [2, 5]


def test_where_a_block_cannot_end_no_cut_is_made() -> None:
    assert cut_by_cost([1, 1, 1, 1], 2, [float("inf"), float("inf"), 0, 0]) == [2]


@pytest.mark.parametrize("num_blocks", [0, -1, 5])
def test_a_number_of_blocks_out_of_range_is_refused(num_blocks: int) -> None:
    with pytest.raises(LocalGradError, match=rf"num_blocks is {num_blocks}: the model has 4 units.*1 to 4 blocks"):
        cut_by_cost([1, 2, 3, 4], num_blocks)
    with pytest.raises(LocalGradError, match="1 to 4 blocks"):
        cut_evenly(4, num_blocks)


def test_of_equal_peaks_the_lightest_cuts_are_taken() -> None:
    costs, weights = [10, 1, 1, 1, 1], [9, 5, 1, 7, 0]
    best = min(
        (max(cost_of_blocks(costs, [0] * 5, cuts)), sum(weights[cut] for cut in cuts), cuts)
        for cuts in itertools.combinations(range(4), 2)
    )
    assert cut_by_cost(costs, 3, weights=weights) == list(best[2]) == [0, 2]
