"""Which samples share a row: none lost, rows nearly full, and lengths mixed."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v_dist.data.packing import SIZE_CLASSES, best_fit, exact_fit, fullest, large_together, pack

CAPACITY = 100
SIZES = st.lists(st.integers(1, CAPACITY), max_size=80)


@pytest.mark.parametrize("way", [pack, best_fit, exact_fit, large_together])
@settings(deadline=None)
@given(sizes=SIZES)
def test_every_sample_is_in_one_row_that_holds_it(way, sizes: list[int]) -> None:
    rows = way(sizes, CAPACITY)
    assert sorted(place for row in rows for place in row) == list(range(len(sizes)))
    assert all(row and sum(sizes[place] for place in row) <= CAPACITY for row in rows)
    assert rows == way(list(sizes), CAPACITY)


@settings(deadline=None)
@given(SIZES)
def test_no_row_is_left_with_room_for_a_sample_of_a_later_one(sizes: list[int]) -> None:
    rows = exact_fit(sizes, CAPACITY)
    for number, row in enumerate(rows):
        room = CAPACITY - sum(sizes[place] for place in row)
        assert all(sizes[place] > room for later in rows[number + 1 :] for place in later)


@settings(deadline=None)
@given(SIZES)
def test_best_fit_is_best_fit_decreasing_by_classes_of_size(sizes: list[int]) -> None:
    left: list[int] = []  # the same, the slow way
    for size in sorted(sizes, key=lambda size: size * SIZE_CLASSES // CAPACITY, reverse=True):
        room = [free for free in left if free >= size]
        if room:
            left.remove(min(room))
        left.append((min(room) if room else CAPACITY) - size)
    rows = best_fit(sizes, CAPACITY)
    assert sorted(CAPACITY - sum(sizes[place] for place in row) for row in rows) == sorted(left)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 200))
def test_the_fullest_choice_is_that_of_trying_them_all(sizes: list[int], room: int) -> None:
    chosen = fullest(sizes, room)
    places = range(len(sizes))
    sums = [sum(c) for n in range(len(sizes) + 1) for c in combinations(sizes, n)]
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(places)
    assert sum(sizes[place] for place in chosen) == max(total for total in sums if total <= room)


def pictures(tokens: list[int], most: int) -> list[int]:
    """Lengths of 1,000 samples with up to so many pictures of these sizes, and a caption."""
    rng = np.random.default_rng(0)
    num_pictures = np.where(rng.random(1000) < 0.8, 1, rng.integers(1, most + 1, 1000))
    return (num_pictures * rng.choice(tokens, 1000) + rng.lognormal(5, 0.6, 1000).astype(int)).tolist()


@pytest.mark.parametrize(
    ("sizes", "capacity", "better", "other", "fill_frac"),
    [
        (pictures([457, 469, 601, 625, 757], 1), 2048, exact_fit, large_together, 0.9),
        (pictures([1933, 2353, 2509], 3), 8192, large_together, exact_fit, 0.92),
    ],
)
def test_the_better_of_two_ways_is_taken(sizes, capacity: int, better, other, fill_frac: float) -> None:
    num_rows = len(pack(sizes, capacity))
    assert num_rows == len(better(sizes, capacity)) < len(other(sizes, capacity))
    assert sum(sizes) / (capacity * num_rows) > fill_frac


@pytest.mark.parametrize("capacity", [1000, 4000, 16_000])
def test_rows_are_no_collection_of_one_length(capacity: int) -> None:
    """The mean length of a row's samples is that of any samples. Sorted by length it would differ 3 times as much."""
    sizes = np.random.default_rng(0).integers(50, 200, 1000)
    rows = [row for row in pack(sizes.tolist(), capacity) if len(row) > 2]
    spread = np.std([sizes[row].mean() - 125 for row in rows])
    by_chance = sizes.std() / np.sqrt(np.mean([len(row) for row in rows]))
    assert spread < 1.1 * by_chance  # measured 0.5 to 0.95
