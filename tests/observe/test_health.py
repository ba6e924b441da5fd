"""What is said of a run that trains, but not as it should."""

import logging

import pytest

from phi3v_dist.observe.health import StarvationWatch


def warnings_of(caplog, stall_pcts: list[float]) -> list[str]:
    watch = StarvationWatch(every_n_steps=3, num_workers=2, prefetch_rows=4)
    with caplog.at_level(logging.WARNING):
        for step, stall_pct in enumerate(stall_pcts, start=1):
            watch.log({"train/step": step, "time/step_s": 2.0, "data/stall_pct": stall_pct})
            watch.log({"train/step": step, "eval/loss": 1.0})
    return [record.getMessage() for record in caplog.records]


@pytest.mark.fault(61)
def test_a_run_that_waits_for_data_is_told_once_what_to_raise(caplog) -> None:
    (warning,) = warnings_of(caplog, [90, *[40, 50, 60] * 3])
    assert "steps 2 to 4 waited for data for 50 % of their time" in warning
    assert "data.num_workers (now 2" in warning and "data.prefetch_rows (now 4)" in warning


@pytest.mark.fault(61)
def test_it_is_told_again_when_things_were_well_in_between(caplog) -> None:
    assert len(warnings_of(caplog, [0, *[30] * 3, *[1] * 3, *[30] * 3])) == 2


def test_one_slow_step_and_the_first_wait_are_nothing_to_speak_of(caplog) -> None:
    assert not warnings_of(caplog, [100, 25, 0, 0, 0, 0, 28])
