"""The parts of a step add up to it, whatever lies between them."""

import pytest
import torch

from phi3v_dist.train import laps as laps_module
from phi3v_dist.train.laps import OF_STEP, PARTS, Laps


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as one sets them."""
    now = [100.0]
    monkeypatch.setattr(laps_module.time, "perf_counter", lambda: now[0])
    return now


def one_step(laps: Laps, clock: list[float]) -> None:
    for part, seconds in (("log", 1), ("ckpt", 2), ("data", 4), ("fwd", 8), ("bwd", 16), ("data", 32), ("opt", 64)):
        clock[0] += seconds
        laps.end(part)


def test_a_step_begins_where_the_one_before_ended(clock):
    laps = Laps()
    for _ in range(2):
        one_step(laps, clock)
        lapped = laps.take()
        assert lapped.seconds == {"log": 1, "ckpt": 2, "data": 36, "fwd": 8, "bwd": 16, "opt": 64}
        assert lapped.step_s == sum(lapped.seconds.values()) == 127
    assert lapped.spans[0] == ("log", 227, 228) and lapped.spans[-1][2] == clock[0]
    assert all(before[2] == after[1] for before, after in zip(lapped.spans, lapped.spans[1:], strict=False))


def test_time_without_a_name_goes_to_the_next_part_and_an_evaluation_to_none(clock):
    laps = Laps()
    clock[0] += 5
    laps.end("log")
    clock[0] += 1000
    laps.skip()
    clock[0] += 7  # unnamed
    one_step(laps, clock)
    lapped = laps.take()
    assert lapped.seconds["log"] == 5 + 7 + 1 and lapped.step_s == sum(lapped.seconds.values()) == 139


class Passed:
    """An event that the GPU passed so long after the first one."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Passed") -> float:
        return 1000 * (other.seconds - self.seconds)


def test_on_a_gpu_borders_lie_where_it_passed_them_and_still_add_up(clock, monkeypatch):
    """The host queues forward and backward at once, and waits for them in the optimizer."""
    events = iter([Passed(0.0), Passed(3.0), Passed(9.0)])
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: next(events))
    laps = Laps(torch.device("cuda", 0))
    for part, seconds, queued in (("data", 1, True), ("fwd", 0.1, True), ("bwd", 0.1, True), ("opt", 10.8, False)):
        clock[0] += seconds
        laps.end(part, queued)
    laps.settle()
    lapped = laps.take()
    assert {part: lapped.seconds[part] for part in OF_STEP} == pytest.approx({"data": 1, "fwd": 3, "bwd": 6, "opt": 2})
    assert lapped.step_s == pytest.approx(sum(lapped.seconds[part] for part in PARTS)) == pytest.approx(12)
