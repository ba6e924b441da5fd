"""Where the wall time of several attempts went: worked out by hand, and as laws that hold for any record."""

import json
import logging
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v_dist.survive.goodput import Span, parts, timeline
from phi3v_dist.survive.timeline import WHATS, Account, History, Step, tell


def write_attempt(run: Path, number: int, owner: dict | str | None, phases=(), alive="", ended: dict | None = None):
    folder = run / f"attempts/{number:04d}"
    folder.mkdir(parents=True)
    if owner is not None:
        (folder / "owner.json").write_text(owner if isinstance(owner, str) else json.dumps(owner))
    lines = [json.dumps({"unix_s": at_s, "phase": name} | more) for at_s, name, more in phases]
    if lines:
        (folder / "phases.jsonl").write_text("\n".join(lines) + "\n")
    if alive:
        (folder / "alive").write_text(alive)
    if ended:
        (folder / "ended.json").write_text(json.dumps(ended))


def write_rows(run: Path, rows: list[tuple[float, int, int, dict]]) -> None:
    lines = [json.dumps({"time": t, "run/attempt": number, "train/step": n} | row) for t, number, n, row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def step(step_s: float, data_s: float) -> dict:
    return {"time/step_s": step_s, "time/data_s": data_s}


def write_run(run: Path) -> Path:
    """Attempt 1 is killed after step 3, of which step 2 was saved; 2 dies while it loads; 3 ends by itself."""
    run.mkdir()
    write_rows(
        run,
        [
            (1035.0, 1, 1, step(5.0, 1.0)),
            (1040.5, 1, 2, step(5.0, 1.0)),
            (1047.0, 1, 3, step(5.0, 2.0)),
            (1047.5, 1, 2, {"ckpt/blocked_s": 0.5, "ckpt/save_s": 2.5}),
            (1105.0, 3, 3, step(6.0, 0.5)),
            (1110.0, 3, 4, step(4.0, 0.0)),
            (1113.0, 3, 4, {"time/eval_s": 2.5}),
            (1114.0, 3, 2, {"goodput/restarts": 2}),  # late, and of an earlier step
        ],
    )
    go = "train"
    write_attempt(
        run, 1, {"pid_started": 1000.0, "start_s": 20.0, "job": "7", "restart": 0, "start": 1}, alive="9 1048.0",
        phases=[(1022.0, "restore", {}), (1028.0, go, {"step": 1}), (1040.5, "ckpt", {}), (1041.25, go, {"step": 3})],
        ended={"by": "attempt 2", "unix_s": 1085.0},
    )  # fmt: skip
    write_attempt(run, 2, {"pid_started": 1060.0, "start_s": 5.0}, phases=[(1066.0, "restore", {})], alive="1 1070.0")
    write_attempt(
        run, 3, {"pid_started": 1075.0, "start_s": 10.0}, ended={"by": "itself", "unix_s": 1120.0},
        phases=[(1086.0, "restore", {}), (1090.0, go, {"step": 3}), (1110.5, "eval", {}), (1113.0, "other", {})],
    )  # fmt: skip
    (run / "starts.jsonl").write_text(
        '{"start": {"job": "7", "restart": 0, "number": 1, "nodes": [], "step": 0, "unix_s": 990.0}}\n'
    )
    return run


BY_HAND = {
    "init": 32.0 + 6.0 + 11.0,  # from the batch script's start, then from the launch of each process
    "restore": 6.0 + 4.0 + 4.0,  # the second one until its last sign of life
    "data": 1.0 + 1.0 + 0.5,
    "productive": 4.0 + 4.0 + 5.5 + 4.0,
    "replay": 5.0,  # step 3 of the first attempt, its wait for data included
    "ckpt": 0.75,
    "eval": 2.5,
    "down": (1060.0 - 1048.0) + (1075.0 - 1070.0),
    "other": 2.0 + 0.5 + 0.75 + 1.0 + 9.0 + 1.0 + 0.5 + 7.0,
}


def test_three_attempts_come_to_the_sums_that_one_makes_by_hand(tmp_path: Path) -> None:
    spans = timeline(write_run(tmp_path / "run"))
    assert parts(spans) == pytest.approx(BY_HAND, abs=1e-9)
    assert sum(BY_HAND.values()) == 1120.0 - 990.0 == spans[-1].end_s - spans[0].begin_s
    assert spans[0] == Span(1, "init", 990.0, 1022.0) and spans[-1] == Span(3, "other", 1113.0, 1120.0)
    assert [span.attempt for span in spans if span.what == "down"] == [1, 2]
    assert Span(1, "replay", 1042.0, 1047.0) in spans


def test_the_metrics_are_the_same_sums(tmp_path: Path) -> None:
    from phi3v_dist.survive.timeline import histories

    account = Account()
    tell(account, histories(write_run(tmp_path / "run")))
    found = account.metrics()
    assert found.pop("goodput/productive_pct") == pytest.approx(100 * 17.5 / 130) and found.pop("goodput/restarts") == 2
    assert found == pytest.approx({f"goodput/lost_{what}_s": BY_HAND[what] for what in WHATS if what != "productive"})


def test_an_attempt_that_goes_on_from_before_makes_steps_a_replay_though_it_does_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_attempt(run, 4, {"pid_started": 1130.0, "start_s": 1.0}, phases=[(1135.0, "train", {"step": 1})])
    spans = timeline(run)
    assert parts(spans)["productive"] == 0 and parts(spans)["data"] == 0
    assert parts(spans)["replay"] == 25.0 and spans[-1] == Span(4, "init", 1130.0, 1135.0)


def test_who_was_taken_over_and_goes_on_is_heard_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [(1010.0, 1, 1, step(5.0, 0.0)), (1100.0, 1, 2, step(90.0, 0.0)), (1095.0, 2, 2, step(5.0, 0.0))]
    write_rows(run, rows)
    write_attempt(run, 1, {"pid_started": 1000.0}, alive="30 1200.0")
    write_attempt(run, 2, {"pid_started": 1020.0, "start_s": 60.0})
    assert timeline(run) == [
        Span(1, "init", 1000.0, 1005.0), Span(1, "productive", 1005.0, 1010.0), Span(1, "other", 1010.0, 1080.0),
        Span(2, "init", 1080.0, 1090.0), Span(2, "productive", 1090.0, 1095.0),
    ]  # fmt: skip


def test_a_run_of_an_earlier_release_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in [*run.glob("attempts/*/phases.jsonl"), *run.glob("attempts/*/alive"), run / "starts.jsonl"]:
        path.unlink()
    found = parts(timeline(run))
    assert found["init"] == 30.0 + 5.0 + 24.0 and found["restore"] == 0.0
    assert found["ckpt"] == 0.5 and found["eval"] == 2.5 and found["productive"] == 17.5 and found["replay"] == 5.0


def test_damage_costs_what_the_file_said_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run")
    (run / "attempts/0001/owner.json").write_text("{")
    (run / "attempts/0003/ended.json").write_text('["by"]')
    (run / "attempts/0002/alive").write_text("1 soon")
    (run / "attempts/0009").mkdir()
    with (run / "attempts/0001/phases.jsonl").open("a") as file:
        file.write('7\n{"unix_s": "now"}\n{"unix_s": 1e999, "phase": "ckpt"}\n{"unix_s": 10')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": "x", "run/attempt": 3, "train/step": 5}\n{"time": 1.0}\n{"tim')
    with caplog.at_level(logging.WARNING):
        spans = timeline(run)
    assert "attempts/0001/owner.json is damaged" in caplog.text
    assert spans[0].begin_s == 1022.0 and spans[-1].end_s == 1114.0
    assert parts(spans)["productive"] == 17.5


def test_where_nothing_was_launched_there_is_nothing(tmp_path: Path) -> None:
    assert timeline(tmp_path) == [] and Account().metrics() == {}


moments = st.floats(0.0, 1000.0)
some_steps = st.lists(
    st.builds(Step, number=st.integers(1, 9), end_s=moments, step_s=st.floats(0.0, 300.0), data_s=st.floats(0.0, 300.0))
)
some_histories = st.lists(
    st.builds(
        History, number=st.integers(1, 99), launched_s=st.none() | moments, taken_s=st.none() | moments,
        last_s=st.none() | moments, resumed_step=st.none() | st.integers(0, 9), steps=some_steps,
        phases=st.lists(st.tuples(moments, st.sampled_from(["restore", "train", "ckpt", "eval", "?"]))).map(sorted),
    ),
    max_size=5,
)  # fmt: skip


@given(attempts=some_histories, resumed_step=st.none() | st.integers(0, 9))
def test_whatever_the_files_say_no_second_is_missing_or_counted_twice(
    attempts: list[History], resumed_step: int | None
) -> None:
    account = Account(keep_spans=True)
    tell(account, attempts, resumed_step)
    spans = account.spans
    assert all(before.end_s == after.begin_s for before, after in pairwise(spans))
    assert all(span.seconds > 0 for span in spans)
    wall_s = spans[-1].end_s - spans[0].begin_s if spans else 0.0
    assert math.fsum(parts(spans).values()) == pytest.approx(wall_s, abs=1e-9)
    assert parts(spans) == pytest.approx(account.seconds, abs=1e-9)
