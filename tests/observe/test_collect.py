"""Windows of steps, and what becomes of them when something is wrong."""

import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from conftest import environment

from phi3v_dist.data.plan import PlannedRow, PlannedStep
from phi3v_dist.data.pool import Meter
from phi3v_dist.observe import collect
from phi3v_dist.observe.collect import Collector
from phi3v_dist.observe.gather import Nodes
from phi3v_dist.observe.tracker import AllOf, JsonlTracker, Tracker, read_rows
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.laps import Lapped
from phi3v_dist.train.step import RankStep, StepResult

RANKS = Path(__file__).with_name("collect_ranks.py")
ROW = PlannedRow((0,), tokens=4, squared_tokens=16, label_tokens=4, crops=0)


def add(collector: Collector, number: int, own_s: float = 0.5, loss: float = 1.0) -> None:
    plan = PlannedStep(number, (ROW,), 4, 4, {})
    result = StepResult(
        step=number, loss=loss, grad_norm=1.0, learning_rates={}, label_tokens=4, tokens=4, images=0, samples=1,
        quarantined=0, sample_ids=(0,), rows=1, own=RankStep(data_s=0.1, compute_s=own_s, loss=loss),
    )  # fmt: skip
    seconds = {"data": 0.1, "fwd": 0.2, "bwd": 0.2, "opt": 0.1, "ckpt": 0.0, "log": 0.1}
    collector.add(plan, result, Lapped(seconds, 0.7, (("data", 1.0, 2.0), ("fwd", 2.0, 3.0))))


def alone(folder: Path, tracker: Tracker | None = None, every_n_steps: int = 2) -> Collector:
    nodes = Nodes.meet(Topology(host="node-a"))
    return Collector(
        nodes, torch.device("cpu"), tracker or started(folder), folder, 3, every_n_steps, Meter(), lambda: 1, None
    )  # fmt: skip


def started(folder: Path, *mirrors: Tracker) -> AllOf:
    tracker = AllOf(JsonlTracker(folder, 3), list(mirrors))
    tracker.start({})
    return tracker


def test_windows_end_at_multiples_and_with_the_loop(tmp_path):
    with alone(tmp_path, every_n_steps=3) as collector:
        for number in range(5, 11):  # an attempt that goes on after step 4
            add(collector, number, loss=float(number))
    rows = read_rows(tmp_path)
    assert [row["train/step"] for row in rows] == [6, 9, 10]
    assert [row["train/rank_loss/max"] for row in rows] == [5.5, 8.0, 10.0]
    assert [row["ckpt/age_steps"] for row in rows] == [5, 8, 9]
    lines = [json.loads(line) for line in (tmp_path / "ranks" / "node-a.jsonl").read_text().splitlines()]
    assert [line["train/step"] for line in lines] == [6, 9, 10] and lines[0]["run/attempt"] == 3
    assert lines[0]["values"]["health/compute_s"] == [0.5] and lines[0]["values"]["comm/wait_s"] == [None]
    ((data, fwd),) = lines[0]["spans"]
    assert (data[0], fwd[0]) == ("data", "fwd") and data[2] == fwd[1] == pytest.approx(data[1] + 1.0)
    assert "health/straggler_ratio" not in rows[0] and "comm/wait_s/mean" not in rows[0]


def test_a_loop_that_ends_in_an_error_waits_for_nothing_and_logs_nothing_more(tmp_path):
    collector = alone(tmp_path)
    with pytest.raises(ZeroDivisionError), collector:
        add(collector, 1)
        raise ZeroDivisionError
    assert read_rows(tmp_path) == []


class Broken(Tracker):
    def log(self, row) -> None:
        raise OSError(28, "No space left on device")


def test_a_failure_is_said_once_and_the_loop_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), alone(tmp_path, Broken()) as collector:
        for number in range(1, 9):
            add(collector, number)
            collector._windows.unfinished_tasks and collector._thread.join(0.2)
    (said,) = caplog.records
    assert "numbers of all ranks are not collected any more (OSError: [Errno 28] No space left" in said.getMessage()


def test_a_disk_that_does_not_take_the_nodes_file_costs_that_file_alone(tmp_path, caplog):
    (tmp_path / "ranks").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), alone(tmp_path) as collector:
        for number in range(1, 7):
            add(collector, number)
    assert len(caplog.records) == 1 and "node-a.jsonl cannot be written" in caplog.text
    assert [row["train/step"] for row in read_rows(tmp_path)] == [2, 4, 6]


def test_a_line_torn_by_a_kill_is_cut_before_the_next_attempt_writes(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "node-a.jsonl").write_text('{"whole": 1}\n{"torn": ')
    with alone(tmp_path) as collector:
        add(collector, 1)
    whole, ours = (tmp_path / "ranks" / "node-a.jsonl").read_text().splitlines()
    assert json.loads(whole) == {"whole": 1} and json.loads(ours)["train/step"] == 1


class Slow(Tracker):
    """A sink in whose rows two callers would meet."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.inside = 0

    def log(self, row) -> None:
        self.inside += 1
        time.sleep(0.001)
        assert self.inside == 1
        self.seen.append(int(row["train/step"]))
        self.inside -= 1


def test_rows_of_two_threads_reach_every_sink_whole_and_in_one_order(tmp_path, caplog):
    sinks = Slow(), Slow()
    tracker = started(tmp_path, *sinks)

    def log(steps: range) -> None:
        for step in steps:
            tracker.log({"train/step": step, "train/loss": 1.0})

    threads = [threading.Thread(target=log, args=(range(begin, 100, 4),)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [int(row["train/step"]) for row in read_rows(tmp_path)]
    assert sorted(written) == list(range(100)) and sinks[0].seen == sinks[1].seen == written
    assert not caplog.records


def test_the_meter_knows_what_waits_and_the_slowest_sample():
    meter = Meter()
    done: Future = Future()
    done.set_result(None)
    meter.ahead.extend([done, Future()])
    assert meter.queue_depth() == 1
    for seconds in (0.2, 0.5, 0.1):
        meter.took(seconds)
    assert meter.take_slowest_s() == 0.5
    assert not meter.take_slowest_s() >= 0, "none since it was asked"


@pytest.fixture(scope="module")
def lost(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """Ranks of a job whose rank 1 stops sending, and leaves without a word."""
    folder = tmp_path_factory.mktemp("lost")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(RANKS), str(folder)], env=environment(), capture_output=True, text=True, timeout=120
    )
    return folder, done, time.monotonic() - began


def test_of_a_node_and_of_all_nodes_each_first_rank_has_the_numbers_in_order(lost):
    folder, done, _ = lost
    assert (folder / "gathered.json").exists(), done.stderr[-3000:]
    seen = json.loads((folder / "gathered.json").read_text())
    assert seen["0"] == {"node": [0, 2], "all": [[0, 2], [1, 3]]}  # ranks 0 and 2 are on one host, 1 and 3 on another
    assert seen["1"] == {"node": [1, 3], "all": None} and seen["2"] == seen["3"] == {"node": None, "all": None}


def test_when_a_rank_is_gone_the_others_are_told_once_and_their_processes_end(lost):
    folder, done, took_s = lost
    assert took_s < collect.FINISH_S + 60
    said = [line for line in done.stderr.splitlines() if "not collected any more" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert {path.name for path in folder.glob("left-*")} == {"left-0", "left-2", "left-3"}
    assert [row["train/step"] for row in read_rows(folder)] == [2]


def test_a_thread_that_collects_is_no_sign_that_training_waits():
    from phi3v_dist.watch import stacks

    collects = [
        stacks.Frame("/x/torch/distributed/distributed_c10d.py", "3000", "gather_object"),
        stacks.Frame(collect.__file__, "120", "_collect"),
    ]
    waits = [stacks.Frame("/x/torch/autograd/graph.py", "800", "_engine_run_backward")]
    assert not stacks.waits_for_others({1: waits, 2: collects}, 1)
    assert stacks.waits_for_others({1: waits, 2: collects[:1]}, 1), "another thread in a collective"
