from pathlib import Path

import pytest

from phi3v_dist.observe import alerts
from phi3v_dist.observe.alerts import ALERTS, Alerts
from phi3v_dist.observe.metrics import PLACEHOLDER, lookup


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock, tmp_path: Path) -> Alerts:
    return Alerts(tmp_path, clock, lambda folder: 100.0)


def titles(watch: Alerts, **row: float) -> list[str]:
    return [said.title for said in watch.look({name.replace("__", "/"): value for name, value in row.items()})]


def test_counters_that_rise_are_told_and_those_that_stay_are_not(watch: Alerts) -> None:
    assert titles(watch, train__step=1, train__skipped_steps=2, data__quarantined=1) == [], "from earlier attempts"
    assert titles(watch, train__step=2, train__skipped_steps=2, data__quarantined=1) == []
    assert titles(watch, train__step=3, train__skipped_steps=3, data__quarantined=4) == ["Step skipped", "Bad samples"]


def test_each_kind_is_told_at_most_once_an_hour(watch: Alerts, clock: Clock) -> None:
    said = []
    for step in range(1, 100):
        clock.now_s = 60.0 * step
        said += titles(watch, train__step=step, train__loss=9.0, train__spike=1.0)
    assert said == ["Loss spike"] * 2, "99 minutes"


def test_a_slow_rank_is_named(watch: Alerts) -> None:
    row = {"train/step": 7, "health/straggler_score_min": 0.6, "health/slowest_rank": 12}
    (said,) = watch.look(row)
    assert said.text.startswith("step 7: rank 12 holds the others up: score 0.6") and said.level == "WARN"
    assert watch.look({**row, "health/straggler_score_min": 0.9}) == []


def test_a_disk_that_will_not_take_the_next_checkpoint_is_told(clock: Clock, tmp_path: Path) -> None:
    watch = Alerts(tmp_path, clock, lambda folder: 20.0)
    assert watch.look({"train/step": 1}) == []
    clock.now_s = 2 * alerts.DISK_LOOK_S
    (said,) = watch.look({"train/step": 2, "ckpt/gib": 30.0})
    assert said.level == "ERROR" and f"{tmp_path} has 20 GiB left, a checkpoint takes 30 GiB" in said.text


def test_every_alert_quotes_and_looks_at_registered_names() -> None:
    for alert in ALERTS:
        quoted = [word.strip("{}") for word in alert.text.replace("{", " {").split() if "/" in word and "{" in word]
        for name in filter(None, [alert.metric, *(word.rstrip("},:;") for word in quoted)]):
            assert lookup(name) and not PLACEHOLDER.search(name), name
