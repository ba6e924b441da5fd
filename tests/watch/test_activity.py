"""Whether a silent process works is told from outside, by what its threads and its GPU do and not by its word."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from phi3v_dist.watch import activity, processes
from phi3v_dist.watch.activity import CONFIRM_S, Silence, makes_progress
from phi3v_dist.watch.beat_file import Beats, Lane, Pulse
from phi3v_dist.watch.blame import SAVE, TRAIN

LIMIT_S = 120
BURNS = "while True: pass"
SLEEPS = "import time\nwhile True: time.sleep(1000)"
BESIDE = "import threading\ndef burn():\n    while True: pass\nthreading.Thread(target=burn).start()\n" + SLEEPS
COMPILES = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])"


def beats_of(pid: int, kind: str = "forward", writer: int = 0) -> Beats:
    lanes = {TRAIN: Lane(kind, kind=kind, native_thread=pid), SAVE: Lane("write", kind="write", native_thread=writer)}
    return Beats(pid, 0, 0, 0, "n0", "", 0, 0.0, "", lanes)


@pytest.fixture
def process():
    """A function: a process in a session of its own that runs some code."""
    started = []

    def start(code: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True))
        return started[-1].pid

    yield start
    for one in started:
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def becomes(pid: int, expected: bool, kind: str = "forward", lane: str = TRAIN, writer: int = 0) -> bool:
    """Whether a process is seen to compute, or not to, at some time; it may still have to begin."""
    silence, beats = Silence(time.monotonic()), beats_of(pid, kind, writer)
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        silence.observe(time.monotonic(), beats, lane)
        if silence.observed_s >= activity.EVIDENCE_S and silence.computes() == expected:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        (BURNS, "forward", True),
        (SLEEPS, "forward", False),
        (BESIDE, "forward", False),  # another thread works, for nobody knows whom
        (BESIDE, "data", True),  # it reads the data that is waited for
        (COMPILES, "forward", True),  # the program that it started works
    ],
)
def test_a_process_that_runs_is_told_from_one_that_sleeps(process, code, kind, expected):
    assert becomes(process(code), expected, kind)


def test_a_stopped_process_makes_no_progress(process):
    pid = process(BURNS)
    assert becomes(pid, True)
    os.kill(pid, signal.SIGSTOP)
    assert becomes(pid, False)


def test_the_writer_is_judged_by_its_own_thread(process):
    pid = process(BESIDE)
    deadline_s = time.monotonic() + LIMIT_S
    while len(processes.threads(pid)) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    (writer,) = set(processes.threads(pid)) - {pid}
    assert becomes(pid, True, lane=SAVE, writer=writer) and becomes(pid, False, lane=SAVE, writer=pid)
    assert becomes(pid, False, "data", TRAIN, writer=writer), "the writer does not read data"


@pytest.fixture
def threads(monkeypatch):
    """A function: how long the only thread was active until now, and how many pages it has read."""
    done = {"active_s": 0.0, "page_reads": 0}
    monkeypatch.setattr(processes, "threads", lambda pid: {pid: "python"})
    monkeypatch.setattr(processes, "programs_of", lambda pid, since_ticks: iter(()))
    monkeypatch.setattr(processes, "active_s", lambda pid, thread: done["active_s"])
    monkeypatch.setattr(processes, "page_reads", lambda pid, thread: done["page_reads"])
    return done


def test_only_recent_work_counts(threads):
    silence = Silence(0.0)
    for second in range(20):
        threads["active_s"] += 1.0
        silence.observe(float(second), beats_of(7), TRAIN)
    assert silence.computes()
    for second in range(20, 25):
        silence.observe(float(second), beats_of(7), TRAIN)
    assert not silence.computes()


def test_reading_memory_back_from_a_disk_is_progress(threads):
    silence = Silence(0.0)
    for second in range(8):
        threads["page_reads"] += 1
        silence.observe(float(second), beats_of(7), TRAIN)
    assert silence.computes()


def test_nothing_follows_from_a_single_look(threads):
    """A watcher that did not run for a while has to look again before it judges."""
    silence = Silence(0.0)
    assert silence.computes()
    silence.observe(40.0, beats_of(7), TRAIN)
    assert silence.computes()
    silence.observe(42.0, beats_of(7), TRAIN)
    assert not silence.computes()


def test_waiting_for_others_is_no_progress_although_it_burns_a_processor(threads):
    """NCCL's ranks spin while they wait, and so does the GPU."""
    silence, beats = Silence(0.0), beats_of(7)
    for second in range(30):
        threads["active_s"] += 1.0
        silence.observe(float(second), beats, TRAIN)
    assert makes_progress(silence, 30.0, beats, TRAIN, waits=True, device_is_busy=True), "it may have just come"
    assert not makes_progress(silence, 30.0 + CONFIRM_S, beats, TRAIN, waits=True, device_is_busy=True)
    assert makes_progress(silence, 34.0, beats, TRAIN, waits=False, device_is_busy=True)


def test_a_rank_that_comes_from_one_wait_to_the_next_makes_progress(threads):
    """Looked at during a wait each time, it has worked in between."""
    silence = Silence(0.0)
    for second in range(30):
        threads["active_s"] += 1.0
        beats = beats_of(7)
        beats.pulse.num_waits = second
        silence.observe(float(second), beats, TRAIN)
        assert makes_progress(silence, float(second), beats, TRAIN, waits=True, device_is_busy=False)


def test_a_busy_gpu_is_progress_while_the_thread_sleeps(threads):
    silence, beats = Silence(0.0), beats_of(7)
    for second in range(30):
        silence.observe(float(second), beats, TRAIN)
    assert makes_progress(silence, 30.0, beats, TRAIN, waits=False, device_is_busy=True)
    assert not makes_progress(silence, 30.0, beats, TRAIN, waits=False, device_is_busy=False)
    assert not makes_progress(silence, 30.0, beats, SAVE, waits=False, device_is_busy=True), "not of a writer"


class NoDriver(Exception):
    pass


def nvml(**functions) -> types.SimpleNamespace:
    return types.SimpleNamespace(NVMLError=NoDriver, nvmlInit=lambda: None, **functions)


def test_a_gpu_is_asked_by_its_uuid(monkeypatch):
    monkeypatch.setattr(activity.importlib.util, "find_spec", lambda name: object())
    busy = {"GPU-1": 100, "GPU-2": 0}
    fake = nvml(
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=busy[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    is_busy = activity.device_busy()
    assert is_busy("GPU-1") and not is_busy("GPU-2") and not is_busy("")


def test_without_a_driver_no_gpu_is_busy(monkeypatch):
    def missing():
        raise NoDriver

    monkeypatch.setattr(activity.importlib.util, "find_spec", lambda name: object())
    fake = nvml()
    fake.nvmlInit = missing
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert not activity.device_busy()("GPU-1")
    monkeypatch.setattr(activity.importlib.util, "find_spec", lambda name: None)
    assert not activity.device_busy()("GPU-1")


def test_the_waits_of_a_gpu_are_counted_and_the_present_one_is_known():
    from phi3v_dist.parallel.waits import Waits

    def event(has_passed: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(query=lambda: has_passed, elapsed_time=lambda other: 1000.0)

    waits = Waits()
    waits._pairs = [(event(True), event(True)), (event(True), event(True)), (event(True), event(False))]
    assert waits.device_waits() == (2, True)
    assert waits.take_s() == 2.0 and waits.device_waits() == (2, True), "read at the end of the step"
    waits._pairs = [(event(False), event(False))]
    assert waits.device_waits() == (2, False), "still computing what comes before"


def test_a_wait_of_the_gpu_is_reported_with_its_beginning(tmp_path, monkeypatch):
    from phi3v_dist.watch import heartbeat
    from phi3v_dist.watch.beat_file import BeatFile, beats_path, read_beats
    from phi3v_dist.watch.limits import Bounds

    clock = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    heart = heartbeat._Heart(BeatFile.create(tmp_path, 0, "n0", "GPU-1"), (tmp_path / "stacks").open("w"), Bounds())

    def pulse(num_waits: int, is_in_one: bool) -> Pulse:
        clock[0] += 1
        heart.device_waits(num_waits, is_in_one)
        return read_beats(beats_path(tmp_path, 0)).pulse

    assert pulse(3, True) == pulse(3, True) == Pulse(3, 101.0)
    assert pulse(4, True) == Pulse(4, 103.0), "another one"
    assert pulse(4, False) == Pulse(4, 0.0)
    assert read_beats(beats_path(tmp_path, 0)).device == "GPU-1"
