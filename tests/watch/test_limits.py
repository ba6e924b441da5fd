"""How long a kind of work may be silent follows from what it has taken so far, and from how much there is to do."""

import pytest

from phi3v_dist.watch.limits import FOREVER_S, NEVER_HANGS, REMEMBERED, UNTIMED, Bounds, Limits

BOUNDS = Bounds(hang_s=30.0, hang_factor=10.0, first_s=600.0, slow_factor=10.0)


def limits(*taken: tuple[str, float, float]) -> Limits:
    found = Limits(BOUNDS)
    for one in taken:
        found.add(*one)
    return found


def test_the_first_time_of_each_kind_has_the_first_limit():
    """The case of issue 19: an evaluation began with a copy of the model, in small parts, and went on with pictures."""
    known = limits(*[("copy", 1000, 0.01)] * 300)
    assert known.limit_s("copy", 1000) == 30
    assert known.limit_s("vision", 17) == known.limit_s("prefill", 30_000) == known.limit_s("decode", 1) == 600


def test_the_limit_is_a_multiple_of_the_median_and_not_below_the_floor():
    assert limits(("forward", 0, 1.0)).limit_s("forward", 0) == 30
    assert limits(*[("forward", 0, seconds) for seconds in (1.0, 5.0, 100.0)]).limit_s("forward", 0) == 50


def test_more_tokens_may_take_longer():
    known = limits(*[("prefill", 300, 0.5)] * 9)
    assert known.limit_s("prefill", 300) == 30
    assert known.limit_s("prefill", 30_000) == pytest.approx(10 * 0.5 * 100)


def test_intervals_with_as_many_tokens_count_alone_once_there_are_some():
    known = limits(*[("prefill", 300, 0.5)] * 9, ("prefill", 28_000, 8.0), ("prefill", 40_000, 12.0))
    assert known.limit_s("prefill", 30_000) == pytest.approx(10 * (8.0 * 30 / 28 + 12.0) / 2)


def test_fewer_tokens_are_not_expected_to_take_less():
    """What an interval takes whatever its size, such as the first use of a kernel, is not scaled down."""
    assert limits(("prefill", 30_000, 8.0)).limit_s("prefill", 300) == 80


def test_only_the_last_intervals_count():
    known = limits(*[("forward", 0, 100.0)] * 10, *[("forward", 0, 1.0)] * REMEMBERED)
    assert known.limit_s("forward", 0) == 30


@pytest.mark.parametrize("kind", UNTIMED)
def test_what_consists_of_unlike_parts_keeps_the_first_limit(kind):
    assert limits((kind, 0, 0.1)).limit_s(kind, 0) == 600


def test_who_has_nothing_to_do_never_hangs():
    assert limits().limit_s(NEVER_HANGS, 0) == FOREVER_S == limits().slow_limit_s(FOREVER_S)


def test_a_rank_that_makes_progress_may_take_many_times_longer():
    assert limits().slow_limit_s(30.0) == 300
