import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from phi3v_dist.observe.tracker import AllOf, JsonlTracker, NoTracker, Tracker, last_attempt, read_metrics


def attempt(run: Path, steps: Sequence[int], loss: float) -> JsonlTracker:
    tracker = JsonlTracker(run, last_attempt(run) + 1)
    tracker.start({})
    for step in steps:
        tracker.log({"train/step": step, "train/loss": loss + step})
    return tracker


def test_every_row_is_a_line_on_disk_before_log_returns(tmp_path: Path) -> None:
    attempt(tmp_path, [1, 2], loss=10.0)  # never finished, like a killed run
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == [1, 2]
    assert all(row["run/attempt"] == 1 and row["time"] > 1.7e9 for row in rows)


def test_a_line_torn_by_a_kill_is_cut_before_the_next_attempt_writes(tmp_path: Path) -> None:
    attempt(tmp_path, [1, 2], loss=10.0).finish({})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1764000000.0, "run/attempt": 1, "train/st')
    assert [row["train/step"] for row in read_metrics(tmp_path)] == [1, 2]  # readers do not need the repair
    attempt(tmp_path, [3], loss=10.0).finish({})
    assert [json.loads(line)["train/step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3]
    assert [row["run/attempt"] for row in read_metrics(tmp_path)] == [1, 1, 2]


def test_a_record_that_is_nothing_but_a_torn_line_starts_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"ti')
    attempt(tmp_path, [1], loss=0.0).finish({})
    assert [row["run/attempt"] for row in read_metrics(tmp_path)] == [1]


def test_a_replayed_step_counts_once_and_the_later_attempt_wins(tmp_path: Path) -> None:
    attempt(tmp_path, range(1, 8), loss=10.0).finish({})
    attempt(tmp_path, range(5, 10), loss=20.0).finish({})
    history = read_metrics(tmp_path)
    assert [row["train/step"] for row in history] == list(range(1, 10))
    assert [row["train/loss"] - row["train/step"] for row in history] == [10] * 4 + [20] * 5


def test_steps_rolled_back_and_not_reached_again_are_gone(tmp_path: Path) -> None:
    attempt(tmp_path, range(1, 10), loss=10.0).finish({})
    attempt(tmp_path, [5, 6], loss=20.0)
    assert [row["train/step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_row_joins_the_training_row_of_its_step(tmp_path: Path) -> None:
    tracker = attempt(tmp_path, [1], loss=2.0)
    tracker.log({"train/step": 1, "eval/loss": 4.0})
    (row,) = read_metrics(tmp_path)
    assert (row["train/loss"], row["eval/loss"]) == (3.0, 4.0)


def test_a_loss_that_is_not_finite_is_strict_json_and_comes_back_as_nan(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, 1)
    tracker.start({})
    tracker.log({"train/step": 1, "train/loss": math.inf})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert math.isnan(read_metrics(tmp_path)[0]["train/loss"])


def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt(tmp_path, [1, 2, 3], loss=0.0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff garbage\n" + lines[2])
    assert [row["train/step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert "line 2 is damaged" in caplog.text


def test_the_record_refuses_a_name_that_is_not_registered(tmp_path: Path) -> None:
    tracker = attempt(tmp_path, [1], loss=0.0)
    with pytest.raises(AssertionError, match="train/perplexity"):
        tracker.log({"train/step": 2, "train/perplexity": 3.0})
    assert len(read_metrics(tmp_path)) == 1


class Broken(Tracker):
    def start(self, config: Mapping[str, Any]) -> None:
        raise ConnectionResetError("the client's service died")

    def log(self, row: Mapping[str, float]) -> None:
        raise RuntimeError("still dead")


class Listening(Tracker):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.summary: dict[str, float] = {}

    def log(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))

    def finish(self, summary: Mapping[str, float]) -> None:
        self.summary = dict(summary)


def test_a_mirror_that_raises_is_said_once_and_hurts_neither_the_run_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listening = Listening()
    tracker = AllOf(JsonlTracker(tmp_path, 1), [Broken(), listening])
    tracker.start({})
    for step in (1, 2, 3):
        tracker.log({"train/step": step, "train/loss": 1.0})
    tracker.finish({"train/step": 3})
    assert [row["train/step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [row["train/step"] for row in listening.rows] == [1, 2, 3]
    assert all(row["run/attempt"] == 1 for row in listening.rows)
    assert listening.summary == {"train/step": 3}
    assert len(caplog.records) == 1 and "the client's service died" in caplog.text


def test_ranks_other_than_0_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = NoTracker()
    tracker.start({})
    tracker.log({"train/step": 1})
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []
