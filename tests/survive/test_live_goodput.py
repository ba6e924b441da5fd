"""Goodput as a run logs it, without processes: what it adds to rows, and that nothing in it can hurt the run."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.observe.metrics import check
from phi3v_dist.observe.tracker import Tracker
from phi3v_dist.survive.live_goodput import GoodputTracker
from phi3v_dist.watch import heartbeat


class Kept(Tracker):
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.summary: dict = {}

    def log(self, row) -> None:
        check(row)
        self.rows.append(dict(row))

    def finish(self, summary) -> None:
        self.summary = dict(summary)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[GoodputTracker]:
    folder = tmp_path / "attempts/0001"
    folder.mkdir(parents=True)
    tracker = GoodputTracker(Kept(), tmp_path, Attempt(1, folder), every_steps=2)
    yield tracker
    heartbeat.forget(tracker._entered)


def test_every_verb_of_a_tracker_reaches_the_sinks(tracker: GoodputTracker, monkeypatch) -> None:
    verbs = [name for name in vars(Tracker) if not name.startswith("_")]
    heard = []
    for verb in verbs:
        monkeypatch.setattr(Kept, verb, lambda *_, verb=verb: heard.append(verb))
    words = {"start": ({},), "log": ({"train/step": 1},), "media": (1, [], Path()), "preempted": (), "finish": ({},)}
    for verb in verbs:
        getattr(tracker, verb)(*words[verb])
    assert heard == verbs


def step(number: int) -> dict:
    for phase in ("data", "forward", "backward", "optimizer"):
        heartbeat.enter(phase, number)
    return {"train/step": number, "time/step_s": 0.25, "time/data_s": 0.0}


def test_phases_are_written_down_when_they_change_and_only_then(tracker: GoodputTracker) -> None:
    tracker.start({})
    for phase in ("load", "load"):
        heartbeat.enter(phase)
    for number in (8, 9):
        tracker.log(step(number))
    heartbeat.enter("write", 9, lane=heartbeat.SAVE)  # another thread's
    for phase in ("snapshot", "evaluate", "evaluate", "score", "finish"):
        heartbeat.enter(phase, 9)
    lines = [json.loads(line) for line in (tracker.attempt.folder / "phases.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["restore", "train", "ckpt", "eval", "other"]
    assert lines[1]["step"] == 8
    assert [line["unix_s"] for line in lines] == sorted(line["unix_s"] for line in lines)


def test_rows_at_the_windows_edge_and_the_summary_carry_it(tracker: GoodputTracker) -> None:
    tracker.start({})
    for number in (1, 2, 3):
        tracker.log(step(number))
    tracker.log({"train/step": 2, "ckpt/save_s": 1.0})  # late, and no step
    tracker.finish({"train/step": 3, "run/wall_s": 1.0})
    with_it = ["goodput/productive_pct" in row for row in tracker.sinks.rows]
    assert with_it == [False, True, False, False, True]
    assert tracker.sinks.summary["goodput/restarts"] == 0 and tracker.sinks.summary["run/wall_s"] == 1.0


def test_a_stop_before_the_first_step_adds_no_row_to_the_record(tracker: GoodputTracker) -> None:
    tracker.start({})
    tracker.finish({"train/step": 0})
    assert tracker.sinks.rows == [] and tracker.sinks.summary["train/step"] == 0


def test_a_disk_that_fails_costs_one_warning(tracker: GoodputTracker, caplog: pytest.LogCaptureFixture) -> None:
    tracker.attempt.folder.rmdir()
    tracker.start({})
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            tracker.log(step(number))
            heartbeat.enter("snapshot", number)
    assert caplog.text.count("phases.jsonl cannot be written") == 1 and len(tracker.sinks.rows) == 2
