"""Intervals and paired differences, against hand computations, and how often they hold the truth."""

import tracemalloc

import numpy as np
import pytest

from phi3v_dist.evaluate.intervals import MIN_SAMPLES, Column

NAN = float("nan")


def column(*values, **how):
    return Column(np.array(values, dtype=np.float64), **how)


def test_values_are_those_of_the_samples_that_have_one():
    assert column(1, NAN, 4, 1).value() == 2
    assert column(1, NAN, 4, 1, statistic="median").value() == 1
    assert column(1, 4, NAN, weights=np.array([1.0, 3, 0])).value() == pytest.approx(13 / 4)
    assert np.isnan(column(1, NAN, weights=np.array([1.0, 3])).value()), "a loss that is not finite is not passed over"
    assert column(NAN, NAN).value() is None and column().value() is None


def test_few_samples_have_no_interval():
    assert column(*range(MIN_SAMPLES - 1)).interval() is None
    assert column(*range(MIN_SAMPLES)).interval() is not None
    assert column(*range(MIN_SAMPLES - 1), NAN).interval() is None, "a sample without a number does not count"


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(0).normal(50, 10, 400)
    low, high = Column(values).interval()
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)  # 1,000 resamples: some 3 % off
    assert low < values.mean() < high


def test_95_of_100_intervals_hold_the_truth():
    generator = np.random.default_rng(1)
    held = {"mean": 0, "median": 0, "share": 0}
    for _ in range(200):
        sample = generator.exponential(1.0, 100)
        for statistic, truth, values in (
            ("mean", 1.0, sample), ("median", np.log(2), sample), ("share", 1 - np.exp(-1), (sample < 1).astype(float)),
        ):  # fmt: skip
            low, high = Column(values, statistic).interval()
            held[statistic] += low <= truth <= high
    for statistic, count in held.items():
        assert 178 <= count <= 199, (statistic, count)  # 190 expected, four standard deviations are 12


def test_an_interval_is_the_same_each_time_and_does_not_touch_other_random_numbers():
    values = column(*np.random.default_rng(2).normal(size=50))
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    assert values.interval() == values.interval()
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("whole", [1.0, 100.0])
def test_where_all_are_right_the_interval_says_how_many_could_be_wrong(whole):
    low, high = column(*[whole] * 240, statistic="share", whole=whole).interval()
    assert (low / whole, high) == (pytest.approx(0.98425, abs=1e-5), whole)  # 240 / (240 + 1.96²)
    low, high = column(*[0.0] * 240, statistic="share", whole=whole).interval()
    assert (low, high / whole) == (0, pytest.approx(0.01575, abs=1e-5))


def test_a_difference_is_paired_so_what_makes_both_vary_does_not_widen_it():
    generator = np.random.default_rng(4)
    hard = generator.normal(100, 50, 300)
    better, worse = Column(hard + generator.normal(0, 1, 300)), Column(hard + 2 + generator.normal(0, 1, 300))
    difference, (low, high) = better.minus(worse)
    assert difference == pytest.approx(better.value() - worse.value())
    assert low < -2 + 0.3 and high > -2 - 0.3 and high - low < 0.5
    assert better.interval()[1] > worse.interval()[0], "alone they overlap"


def test_a_difference_counts_the_samples_that_both_have():
    one, other = column(1, 2, NAN, 10), column(4, NAN, 6, 11)
    assert one.minus(other) == (5.5 - 7.5, None)
    assert column(1, NAN).minus(column(NAN, 1)) is None


def test_two_models_that_are_always_right_may_still_differ_by_what_so_many_samples_leave_possible():
    right, wrong = (column(*[whole] * 240, statistic="share") for whole in (1.0, 0.0))
    difference, (low, high) = right.minus(right)
    assert (difference, low, high) == (0, pytest.approx(-0.01575, abs=1e-5), pytest.approx(0.01575, abs=1e-5))
    assert (
        column(*[1.0, 0.0] * 120, statistic="share").minus(column(*[1.0, 0.0] * 120, statistic="share"))[1][1] == high
    )
    difference, (low, high) = right.minus(wrong)
    assert (difference, low, high) == (1, pytest.approx(1 - 0.01575, abs=1e-5), 1)


def test_a_weighted_difference_is_of_the_two_weighted_means():
    tokens = np.array([1.0, 3.0] * 20)
    one = Column(np.array([2.0, 4.0] * 20), weights=tokens)
    other = Column(np.array([1.0, 1.0] * 20), weights=tokens)
    difference, (low, high) = one.minus(other)
    assert difference == pytest.approx(14 / 4 - 1) and low < difference < high


def test_many_samples_take_bounded_memory():
    values = Column(np.random.default_rng(5).normal(size=60_000))
    tracemalloc.start()
    low, high = values.of(np.arange(50_000)).interval()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert high - low == pytest.approx(2 * 1.96 / 50_000**0.5, rel=0.15)
    assert peak < 200e6  # all at once would be 800e6
