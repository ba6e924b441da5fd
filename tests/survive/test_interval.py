"""When a checkpoint is due: the formula against its definition, the bounds, a day of saves on a clock of our own."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.config import CheckpointSettings
from phi3v_dist.observe.tracker import ATTEMPT, RECORD_NAME
from phi3v_dist.survive import interval
from phi3v_dist.survive.interval import MOST_AT_RISK_S, WRITES_BETWEEN, Earlier, Interval, about, choose, daly_s

HOUR = 3600.0
costs = st.floats(0, 600)
failures = st.floats(60, 1e8)


class HandClock:
    """Seconds that pass when a test says so."""

    now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


def run_for(due: Interval, clock: HandClock, total_s: float, step_s: float, blocked_s: float, write_s: float):
    """Seconds since the begin at which saves began."""
    begin_s, step, saves = clock.now_s, 0, []
    while clock.now_s - begin_s < total_s:
        clock.now_s += step_s
        step += 1
        if due.due(step):
            saves.append(clock.now_s - begin_s)
            due.began(step)
            clock.now_s += blocked_s + write_s
            due.saved(step, blocked_s, write_s)
    return saves


def expected_loss(interval_s: float, blocked_s: float, failure_s: float) -> float:
    """Wall time over work, in Daly's complete model, without the constant that restarts add."""
    return failure_s * (math.expm1(interval_s / failure_s)) / (interval_s - blocked_s)


@pytest.mark.parametrize(("blocked_s", "failure_s"), [(0.2, 15 * HOUR), (30.0, HOUR), (300.0, 2 * HOUR), (60.0, 600.0)])
def test_no_other_interval_loses_less(blocked_s: float, failure_s: float) -> None:
    best_s = daly_s(blocked_s, failure_s)
    tried = (blocked_s + (best_s - blocked_s) * 1.02**k for k in range(-100, 100))
    least = min(expected_loss(interval_s, blocked_s, failure_s) for interval_s in tried)
    assert expected_loss(best_s, blocked_s, failure_s) - 1 <= (least - 1) * 1.001


def test_for_cheap_saves_it_is_youngs_formula() -> None:
    assert daly_s(0.1, 100 * HOUR) == pytest.approx(math.sqrt(2 * 0.1 * 100 * HOUR), rel=1e-3)


@given(blocked_s=costs, write_s=st.floats(0, 500), failure_s=failures)
def test_the_writer_rests_and_little_is_at_risk(blocked_s: float, write_s: float, failure_s: float) -> None:
    chosen_s = choose(blocked_s, write_s, failure_s).interval_s
    assert chosen_s >= WRITES_BETWEEN * write_s
    assert chosen_s + write_s <= max(MOST_AT_RISK_S, (WRITES_BETWEEN + 1) * write_s) * (1 + 1e-9)


@given(blocked_s=costs, failure_s=failures, factor=st.floats(1, 100))
def test_dearer_saves_are_rarer_and_more_failures_make_them_denser(
    blocked_s: float, failure_s: float, factor: float
) -> None:
    assert choose(blocked_s * factor, 0.0, failure_s).interval_s >= choose(blocked_s, 0.0, failure_s).interval_s
    assert choose(blocked_s, 0.0, failure_s * factor).interval_s >= choose(blocked_s, 0.0, failure_s).interval_s * 0.999


def test_a_number_of_steps_in_the_settings_is_kept_to_whatever_saves_cost() -> None:
    clock = HandClock()
    due = Interval(CheckpointSettings(every_steps=7), 64, clock)
    assert run_for(due, clock, 30.0, step_s=1.0, blocked_s=0.0, write_s=0.0) == [7, 14, 21, 28]
    due.saved(28, 1000.0, 1000.0)
    assert str(due) == "a checkpoint every 7 steps, as `checkpoint.every_steps` says"


def test_a_save_that_has_to_wait_for_the_writer_stays_due_and_an_attempt_owes_none_of_before() -> None:
    due = Interval(CheckpointSettings(every_steps=10), 1, HandClock())
    assert [step for step in range(44, 53) if due.due(step)] == [50, 51, 52], "continued from step 43"
    due.began(52)
    assert [step for step in range(53, 62) if due.due(step)] == [60, 61]


def test_the_first_save_comes_early_and_what_it_costs_decides_about_the_next() -> None:
    clock = HandClock()
    due = Interval(CheckpointSettings(node_hours_between_failures=1000), 64, clock)
    assert str(due) == "the first checkpoint after 5 min: it measures what a save costs"
    first_s, *others_s = run_for(due, clock, 24 * HOUR, step_s=5.0, blocked_s=6.0, write_s=40.0)
    assert first_s == pytest.approx(interval.FIRST_SAVE_S, abs=5)
    wanted_s = daly_s(6.0, 1000 * HOUR / 64)
    gaps_s = [after - before for before, after in pairwise([first_s, *others_s])]
    assert all(wanted_s <= gap_s <= wanted_s + 5 for gap_s in gaps_s)
    assert str(due) == "a checkpoint every 14 min: a save holds training up for 6 s, a failure comes about every 16 h"


def record(folder: Path, attempt: int, saves: list[tuple[float, float]]) -> None:
    """What an attempt leaves in the run's record."""
    with (folder / RECORD_NAME).open("a") as file:
        for step, (blocked_s, save_s) in enumerate([(None, None), *saves], start=attempt * 100):
            row = {"time": 0.0, ATTEMPT: attempt, "train/step": step}
            file.write(
                json.dumps(row | ({"ckpt/blocked_s": blocked_s, "ckpt/save_s": save_s} if save_s else {})) + "\n"
            )


@pytest.mark.fault(2)
def test_a_run_that_fails_before_its_first_save_every_time_still_gets_on(tmp_path):
    fails_after_s, saves = 100.0, []
    for attempt in range(1, 6):
        clock = HandClock()
        due = Interval(CheckpointSettings(), 1, clock, Earlier.of(tmp_path, attempt))
        saves = run_for(due, clock, fails_after_s, step_s=1.0, blocked_s=0.5, write_s=1.0)
        if saves:
            break
        record(tmp_path, attempt, [])
    assert attempt == 2 and saves[0] < fails_after_s
    again = Interval(CheckpointSettings(), 1, HandClock(), Earlier.of(tmp_path, 2))
    assert str(again) == "the first checkpoint after 75 s: the last attempt ended without a save"
    worst = Interval(CheckpointSettings(), 1, HandClock(), Earlier.of(tmp_path, 500))
    assert worst.choice.interval_s == interval.EARLIEST_SAVE_S


def test_what_saves_cost_is_taken_over_from_the_attempts_before(tmp_path):
    record(tmp_path, 1, [(6.0, 46.0)] * 7)
    clock = HandClock()
    earlier = Earlier.of(tmp_path, 2)
    assert earlier == Earlier(((6.0, 40.0),) * interval.NUM_REMEMBERED, 0)
    due = Interval(CheckpointSettings(node_hours_between_failures=1000), 64, clock, earlier)
    assert str(due) == "the first checkpoint after 5 min: most failures come early"
    due.saved(1, 6.0, 40.0)
    assert str(due).startswith("a checkpoint every 14 min")
    assert Earlier.of(tmp_path / "new", 1) == Earlier()


def test_bounds_say_that_they_are_what_decided() -> None:
    clock = HandClock()
    due = Interval(CheckpointSettings(node_hours_between_failures=1e6), 1, clock)
    due.saved(1, 2.0, 3.0)
    assert str(due) == "a checkpoint every 30 min: no more than 30 min of work are ever at risk"
    due = Interval(CheckpointSettings(node_hours_between_failures=1), 64, clock)
    due.saved(1, 0.1, 240.0)
    assert str(due) == "a checkpoint every 8 min: writing one takes 4 min in the background"


def test_one_slow_save_does_not_change_the_interval_for_long() -> None:
    clock = HandClock()
    due = Interval(CheckpointSettings(), 64, clock)
    for _ in range(4):
        due.saved(1, 1.0, 1.0)
    before_s = due.choice.interval_s
    due.saved(1, 500.0, 500.0)
    assert due.choice.interval_s == before_s


def test_a_save_that_fails_is_tried_again_after_one_interval_and_one_on_demand_counts() -> None:
    clock = HandClock()
    due = Interval(CheckpointSettings(), 1, clock)
    clock.now_s += interval.FIRST_SAVE_S - 1
    assert not due.due(1)
    due.began(1)  # somebody asked; it fails, nothing is saved
    clock.now_s += interval.FIRST_SAVE_S - 1
    assert not due.due(2)
    clock.now_s += 1
    assert due.due(3) and due.due(4), "and it stays due until one begins"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (0.214, "0.21 s"),
        (99.0, "99 s"),
        (850.0, "14 min"),
        (56250.0, "16 h"),
        (1e6, "12 days"),
        (9e3, "2.5 h"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds: float, words: str) -> None:
    assert about(seconds) == words
