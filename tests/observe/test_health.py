"""What is said of a run that trains, but not as it should."""

import logging
import math
import random

import pytest

from phi3v_dist.observe.health import FEWEST, SpikeWatch, StarvationWatch


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


def spikes_of(caplog, losses: list[float]) -> tuple[list[int], list[str]]:
    watch = SpikeWatch("train-000.tar:{:05d}".format)
    with caplog.at_level(logging.WARNING):
        found = [step for step, loss in enumerate(losses, start=1) if watch.look(step, loss, range(step, step + 7))]
    return found, [record.getMessage() for record in caplog.records]


def noisy(num_steps: int, spread: float, seed: int = 5) -> list[float]:
    draw = random.Random(seed)
    return [2.0 + 3.0 * math.exp(-step / 50) + draw.gauss(0, spread) for step in range(num_steps)]


@pytest.mark.fault(28)
def test_a_spike_is_marked_and_its_samples_are_named(caplog):
    losses = noisy(120, 0.05)
    losses[99] += 3.0
    steps, (warning,) = spikes_of(caplog, losses)
    assert steps == [100]
    assert f"step 100: loss {losses[99]:.4g}, where 2." in warning and "typical of the last 50 steps" in warning
    assert "train-000.tar:00100, " in warning and "train-000.tar:00104 and 2 more" in warning


@pytest.mark.fault(28)
def test_a_spike_of_several_steps_is_told_once_and_the_next_one_again(caplog):
    losses = noisy(200, 0.05)
    for step in (100, 101, 102, 150):
        losses[step - 1] += 4.0
    steps, warnings = spikes_of(caplog, losses)
    assert steps == [100, 101, 102, 150]
    assert [warning.split(":")[0] for warning in warnings] == ["step 100", "step 150"]


@pytest.mark.fault(28)
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
def test_a_loss_that_falls_and_is_as_noisy_as_ever_is_no_spike(caplog, spread):
    assert spikes_of(caplog, noisy(1000, spread)) == ([], [])


def test_losses_that_are_not_finite_and_the_first_ones_are_no_spikes(caplog):
    assert spikes_of(caplog, [1.0] * (FEWEST - 1) + [9.0] + [1.0] * 30 + [math.nan, math.inf] + [1.0] * 30) == ([], [])
