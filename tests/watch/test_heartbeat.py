"""What a rank says about itself arrives whole, costs next to nothing, and ends with a last word."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import environment

from phi3v_dist.watch import heartbeat
from phi3v_dist.watch.beat_file import (
    BeatFile,
    Lane,
    beats_path,
    folder_of,
    hold,
    read_beats,
    remove_leftovers,
    shared_memory,
    stacks_path,
)
from phi3v_dist.watch.heartbeat import SAVE, TRAIN
from phi3v_dist.watch.limits import Bounds

TIMEOUT_S = 300  # however busy the machine is
CHEAP = 10  # rows written and read as JSON; measured: 0.6


@pytest.fixture
def folder(tmp_path):
    """This process is watched (by nobody) for the length of a test."""
    path = tmp_path / "beats"
    path.mkdir()
    heartbeat.open(path, 3, "node-a", Bounds(hang_s=30.0, hang_factor=10.0, first_s=600.0))
    yield path
    heartbeat.close(heartbeat.DONE)


def beats(folder):
    found = read_beats(beats_path(folder, 3))
    assert found is not None
    return found


def test_phase_step_and_sample_are_read_back_by_another_process(folder):
    heartbeat.enter("data", 7, "train-001.tar:grün")
    heartbeat.enter("write", 4, "rank-00003.safetensors", lane=SAVE)
    code = (
        "import sys; from pathlib import Path; from phi3v_dist.watch.beat_file import read_beats; "
        "b = read_beats(Path(sys.argv[1])); l = b.lanes; "
        "print(b.pid, b.rank, b.host, l['train'].phase, l['train'].step, l['train'].what, l['save'].phase)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(beats_path(folder, 3))], env=environment(PYTHONIOENCODING="utf-8"),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout.split() == [str(os.getpid()), "3", "node-a", "data", "7", "train-001.tar:grün", "write"]


def test_a_long_name_is_cut_between_letters(folder):
    heartbeat.enter("data", 1, "ü" * 150)
    assert beats(folder).lanes[TRAIN].what == "ü" * 100


def test_the_limits_follow_the_kind_of_work_and_its_size(folder, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])

    def lane(name=TRAIN):
        found = beats(folder).lanes[name]
        return found.phase, found.kind, found.bound_s, found.slow_bound_s

    heartbeat.enter("evaluate", what="a copy of the model", kind="copy")
    assert lane() == ("evaluate", "copy", 600, 6000), "not timed yet"
    clock[0] += 4
    heartbeat.beat("lm_head", work=0)
    assert lane() == ("evaluate", "copy", 40, 400)
    heartbeat.beat(kind="prefill", work=300)
    assert lane() == ("evaluate", "prefill", 600, 6000)
    clock[0] += 1
    heartbeat.beat(kind="prefill", work=3000)
    assert lane() == ("evaluate", "prefill", 100, 1000)
    clock[0] += 5
    heartbeat.beat()
    assert beats(folder).lanes[TRAIN].work == 3000 and lane() == ("evaluate", "prefill", 50, 500)
    heartbeat.enter("forward", 1)
    assert lane() == ("forward", "forward", 600, 6000)
    heartbeat.enter("idle", lane=SAVE)
    assert beats(folder).lanes[SAVE].bound_s > 10**6


def test_waits_for_other_ranks_that_have_ended_are_counted(folder):
    heartbeat.passed()
    heartbeat.passed()
    assert beats(folder).pulse.num_waits == 2


def test_the_kernels_number_of_the_thread_is_told(folder):
    thread = threading.Thread(target=lambda: heartbeat.enter("write", 1, lane=SAVE))
    thread.start()
    thread.join()
    lanes = beats(folder).lanes
    assert lanes[SAVE].native_thread == thread.native_id and lanes[TRAIN].native_thread == threading.get_native_id()


def test_bytes_that_arrive_are_a_sign_of_life_only_while_training_waits_for_them(folder):
    heartbeat.enter("data", 1)
    before = beats(folder).lanes[TRAIN].beats
    heartbeat.read_on()
    assert beats(folder).lanes[TRAIN].beats == before + 1
    heartbeat.waits_for("shard:key")
    assert beats(folder).lanes[TRAIN].beats == before + 1 and beats(folder).lanes[TRAIN].what == "shard:key"
    heartbeat.enter("forward", 1)
    thread = threading.Thread(target=heartbeat.read_on)
    thread.start()
    thread.join()
    assert beats(folder).lanes[TRAIN].beats == before + 2
    heartbeat.enter("evaluate", 0, kind="read")
    heartbeat.read_on()
    heartbeat.beat(kind="prefill", work=300)
    heartbeat.read_on("of the training data, which is read ahead")
    assert beats(folder).lanes[TRAIN].beats == before + 5


def test_a_reader_never_sees_half_of_a_write(tmp_path):
    file = BeatFile.create(tmp_path, 3, "node-a")
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            phase = "forward" if number % 2 else "backward"
            file.write(TRAIN, Lane(phase, number % 2, number % 2, 1, number, what=phase * 20))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            lane = beats(tmp_path).lanes[TRAIN]
            expected = "forward" if lane.step else "backward"
            assert lane.phase in ("", expected) and (not lane.phase or lane.what == expected * 20)
    finally:
        ended.set()
        thread.join()


def test_saying_where_one_is_costs_next_to_nothing(tmp_path):
    """In a process of its own, where shapes are not checked. The unit is the JSON of a small row, so that it
    does not matter how fast the machine is; the best of many turns, since it is busy."""
    code = (
        "import json, sys, time\nfrom pathlib import Path\nfrom phi3v_dist.watch import heartbeat\n"
        "heartbeat.open(Path(sys.argv[1]), 0, 'n0')\n"
        "row = {f'train/{number}': number / 7 for number in range(20)}\n"
        "def best(call):\n"
        "    def turn():\n"
        "        begin = time.perf_counter()\n"
        "        for number in range(50): call(number)\n"
        "        return time.perf_counter() - begin\n"
        "    return min(turn() for _ in range(100))\n"
        "enter = best(lambda number: heartbeat.enter('forward', number, 'train-001.tar:00042', work=number))\n"
        "print(enter / best(lambda number: json.loads(json.dumps(row))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert float(done.stdout) < CHEAP, done.stderr


def test_the_first_last_word_counts(folder):
    heartbeat.close(heartbeat.FAILED, "data: 1 problem\n  - x", 3)
    heartbeat.close(heartbeat.DONE)
    found = beats(folder)
    assert (found.outcome, found.exit_code, found.message) == ("failed", 3, "data: 1 problem\n  - x")


def test_stacks_of_all_threads_come_on_request(folder):
    os.kill(os.getpid(), signal.SIGQUIT)
    text = stacks_path(folder, 3).read_text()
    assert "test_stacks_of_all_threads_come_on_request" in text


@pytest.mark.fault(101)
def test_what_dead_processes_left_in_shared_memory_is_removed_and_nothing_else(tmp_path):
    def folder_with_rank(name: str, code: str) -> tuple:
        folder = folder_of(tmp_path / name / "attempts" / "0001", "node-a")
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; from pathlib import Path; from phi3v_dist.watch import heartbeat; "
             f"heartbeat.open(Path(sys.argv[1]), 0, 'node-a'); print('open', flush=True); {code}", str(folder)],
            env=environment(), stdout=subprocess.PIPE,
        )  # fmt: skip
        process.stdout.readline()
        return folder, process

    dead, killed = folder_with_rank("dead", "import time; time.sleep(1000)")
    killed.kill()
    killed.wait()
    living, alive = folder_with_rank("living", "import time; time.sleep(1000)")
    unread, ended = folder_with_rank("unread", "pass")
    ended.wait()
    watcher = hold(unread)
    buffer = shared_memory() / f"deepspeed_allreduce_buffer_{os.getuid()}_test_{os.getpid()}_0"
    buffer.write_bytes(b"x")
    try:
        assert remove_leftovers(keep=tmp_path) >= 2
        assert not dead.exists() and not buffer.exists() and living.exists()
        assert unread.exists(), "its watcher has yet to read how it ended"
    finally:
        watcher.close()
        alive.kill()
        alive.wait()
        remove_leftovers(keep=tmp_path)
    assert not living.exists() and not unread.exists()
