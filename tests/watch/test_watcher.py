"""Dead and stuck ranks are found from outside, named rightly, and take the job down with them.

Bounds are 2 s here, so that a test is short; in production they are 30 s or more.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment
from simulated import COMPUTES, FOREVER_S, SLEEPS, WAITS, Simulation
from watching import TIMEOUT_S, Loop

from phi3v_dist.watch import neighbours, processes, stacks
from phi3v_dist.watch.activity import EVIDENCE_S
from phi3v_dist.watch.attempts import read_attempts
from phi3v_dist.watch.beat_file import BeatFile, Lane, folder_of, read_beats
from phi3v_dist.watch.blame import TRAIN, Actor
from phi3v_dist.watch.limits import Bounds
from phi3v_dist.watch.node_report import NodeReport, Verdict, read_report, report_path, stacks_text_path
from phi3v_dist.watch.watcher import TICK_S, Watcher

HANG_S = 2.0
FIRST_S = 60.0  # of watched_ranks.py
PHASES = ("data", "forward", "backward", "optimizer")
GONE_S = 5.0  # docs/faults.md: after a death all other ranks are gone


def blamed(loop: Loop, node: str = "n0") -> list[tuple]:
    verdict = loop.report(node).verdict
    return [(actor.rank, actor.phase, actor.step) for actor in verdict.blamed] if verdict else []


def test_a_clean_loop_ends_with_a_report_and_without_a_word(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, steps=200)  # long enough for the watcher to look at their memory
    assert loop.wait() == [0, 0]
    report = loop.report("n0")
    assert report.status == "ended" and [rank.outcome for rank in report.ranks] == ["done", "done"]
    assert all(rank.peak_bytes > 10 * 2**20 for rank in report.ranks)
    assert "hang" not in loop.said() and "died" not in loop.said()


@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "phase, code", [("forward", 11), *(pytest.param(phase, 1, marks=pytest.mark.slow) for phase in PHASES)]
)
def test_a_killed_rank_is_named_and_the_others_are_ended(tmp_path, phase, code):
    """code: with which the other one ends, for want of the dead one."""
    loop = Loop.start(tmp_path, ["n0"], 2, PHI3V_FAULT=f"1:{phase}:5:kill9", WATCHED_CODE=str(code))
    codes = loop.wait()
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    assert loop.report("n0").status == "died" and blamed(loop) == [(1, phase, 5)]
    said = loop.said()
    assert f"rank 1 on n0 (process {loop.processes[1].pid}) is gone without a word" in said
    assert f"last in phase {phase}, step 5" in said
    assert "no checkpoint was written yet: the same command begins at the first step" in said


@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.fault(4)
@pytest.mark.parametrize("says_so", [False, True], ids=["which only wait", "which say that they lost it"])
def test_after_a_death_the_others_are_gone_within_five_seconds(tmp_path, monkeypatch, says_so):
    """On a clock of its own, so that no other load of the machine counts: all that the watcher waits for."""
    simulation = Simulation(tmp_path, monkeypatch, 2, Bounds())
    died_s = []

    def dies(heart):
        heart.enter("train", "forward", 5, "", "", 0)
        yield COMPUTES, 3.1
        died_s.append(simulation.now_s)
        simulation.die(1)
        yield SLEEPS, FOREVER_S

    def survives(heart):
        heart.enter("train", "forward", 5, "", "", 0)
        yield WAITS, 3.2
        if says_so:
            heart.file.close("failed", "connection closed by peer", 11)
        yield SLEEPS, FOREVER_S

    report = simulation.run(survives, dies)
    assert report.status == "died" and [actor.rank for actor in report.verdict.blamed] == [1]
    assert 0 < simulation.ranks[0].died_s - died_s[0] < GONE_S


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    "fault", ["0:data:5:stop", "1:write:5:hang", pytest.param("1:forward:5:hang", marks=pytest.mark.slow)]
)
def test_a_stuck_rank_is_named_with_phase_and_step_and_all_stacks_are_kept(tmp_path, fault):
    rank, phase, step, action = fault.split(":")
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, PHI3V_FAULT=fault)
    codes = loop.wait()
    report = loop.report("n0")
    assert codes == [-signal.SIGKILL] * 2 and report.status == "hang"
    assert blamed(loop) == [(int(rank), phase, int(step))]
    (guilty,) = report.verdict.blamed[:1]
    assert guilty.bound_s == HANG_S and not guilty.progresses, (
        "found by the limit of its kind, and not as one that works"
    )
    assert guilty.silent_s < FIRST_S
    text = stacks_text_path(loop.attempt_folder, "n0").read_text()
    assert "rank 0 on n0" in text and "rank 1 on n0" in text and "all_reduce" in text
    if action == "stop":
        assert "stopped by a signal" in loop.said()
    else:
        assert "_carry_out" in text and "in `_carry_out` (faults.py" in loop.said()


@pytest.mark.slow
@pytest.mark.fault(12)
def test_ranks_that_are_all_stuck_are_found(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, PHI3V_FAULT="*:backward:4:stop")
    assert loop.wait() == [-signal.SIGKILL] * 2
    assert blamed(loop) == [(0, "backward", 4), (1, "backward", 4)]


@pytest.mark.slow
@pytest.mark.fault(13)
def test_ranks_that_went_different_ways_are_named_with_their_places(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, WATCHED_RANKS="skip")
    assert loop.wait() == [-signal.SIGKILL] * 2
    said = loop.said()
    assert "took different ways" in said and "rank 0 (forward, step 5)" in said and "rank 1 (evaluate" in said


@pytest.mark.slow
def test_a_rank_that_is_slow_but_alive_raises_no_alarm(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, WATCHED_RANKS="slow")
    assert loop.wait() == [0, 0], loop.said()
    assert loop.report("n0").status == "ended"


def test_a_rank_that_computes_for_longer_than_its_limit_is_warned_of_and_not_ended(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, WATCHED_RANKS="burns", WATCHED_SLOW_FACTOR="1000")
    loop.wait_until_said("slow, not hung: rank 1 on n0")
    (tmp_path / "go").touch()
    assert loop.wait() == [0, 0], loop.said()
    assert loop.report("n0").verdict is None and "it is ended after 2000 s" in loop.said()
    assert "rank 0 on n0" not in loop.said(), "which waits for it"


@pytest.mark.fault(11)
def test_a_rank_in_an_endless_loop_is_ended_after_the_longer_limit(tmp_path):
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=HANG_S, WATCHED_RANKS="burns", WATCHED_SLOW_FACTOR="2")
    assert loop.wait() == [-signal.SIGKILL] * 2
    assert blamed(loop) == [(1, "forward", 6)]
    assert loop.report("n0").verdict.blamed[0].silent_s > 2 * HANG_S
    assert "(allowed: 4 s, since it computes)" in loop.said()


def test_a_first_prefill_that_takes_much_longer_than_the_copy_before_it_is_not_ended(tmp_path):
    """Issue 19: an evaluation with a large vision tower was ended, since its limit came from copying the model. This
    one sleeps: nothing but the kind of work saves it."""
    loop = Loop.start(tmp_path, ["n0"], 2, hang_s=2 * HANG_S, WATCHED_RANKS="evaluates")
    assert loop.wait() == [0, 0], loop.said()
    assert loop.report("n0").status == "ended" and "hang" not in loop.said()


@pytest.mark.fault(11)
@pytest.mark.fault(21)
def test_watchers_of_two_nodes_agree_through_files_alone(tmp_path):
    """The clocks of the nodes are never compared: nothing in the files but durations."""
    loop = Loop.start(tmp_path, ["n0", "n1"], 1, hang_s=HANG_S, PHI3V_FAULT="1:forward:5:hang")
    waiting, stuck = loop.wait()
    assert stuck == -signal.SIGKILL
    assert waiting in (-signal.SIGKILL, 1), "its own watcher ends it, or the connection to the other, ended before it"
    assert blamed(loop, "n0") == blamed(loop, "n1") == [(1, "forward", 5)]
    for node in loop.nodes:
        assert "most recent call first" in stacks_text_path(loop.attempt_folder, node).read_text()
    assert "waiting for it: rank 0 (forward, step 5)" in loop.said()


@pytest.mark.parametrize("nodes", [["n0", "n1"], pytest.param(["n0"], marks=pytest.mark.slow)])
def test_ranks_that_wait_for_one_that_was_stopped_while_it_loaded_are_stopped_too(tmp_path, nodes):
    loop = Loop.start(tmp_path, nodes, 2 // len(nodes), hang_s=HANG_S, WATCHED_RANKS="leaves")
    codes = loop.wait()
    assert codes[1] == 0 and codes[0] in (-signal.SIGTERM, -signal.SIGKILL)
    assert [loop.report(node).verdict for node in nodes] == [None] * len(nodes), loop.said()
    assert read_attempts(tmp_path)[-1].ending == "stopped" and "the others are stopped too" in loop.said()


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """A watcher on n0 whose one rank waits in a collective for too long, in a job of two nodes."""
    attempt_folder = tmp_path / "attempts" / "0001"
    attempt_folder.mkdir(parents=True)
    (attempt_folder / "owner.json").write_text('{"hosts": ["n0", "n1"]}')
    one = Watcher(tmp_path, attempt_folder, "n0", 1)
    alive = BeatFile.create(tmp_path, 0, "n0")
    alive.write(TRAIN, Lane("forward", 5, 5, 2, 1, bound_s=HANG_S))
    one._look()
    one.now_s += 40
    monkeypatch.setattr(stacks, "ask", lambda pids: dict.fromkeys(pids, ""))
    monkeypatch.setattr(stacks, "waits_for_others", lambda threads, thread: True)
    monkeypatch.setattr(one, "_end", lambda grace_s, whom: None)
    return one, alive


def heard(one, seconds: float) -> str:
    """Time passes, and the watcher goes round; a moment before it has looked, too."""
    for part in (seconds, EVIDENCE_S):
        one.now_s += part
        one._look()
    one._hear_others() or one._find_stuck()
    return one.status


REPORT = "data: 2 problems\n  - no such shard\n  - no such index"


@pytest.fixture
def failing(tmp_path, monkeypatch, capfd):
    """A function: a rank fails with an exit code, after that lives for some seconds → what its watcher prints."""
    attempt_folder = tmp_path / "runs" / "own" / "attempts" / "0001"
    attempt_folder.mkdir(parents=True)

    def fail(rank: int, exit_code: int, lived_s: float) -> str:
        one = Watcher(tmp_path, attempt_folder, "n0", 1)
        beats = BeatFile.create(tmp_path, rank, "n0")
        beats.write(TRAIN, Lane("data", 5, 5, 2, 1, bound_s=HANG_S))
        beats.close("failed", REPORT, exit_code)
        monkeypatch.setattr(processes, "is_alive", lambda pid, started: False)
        one._look()
        one.ranks[rank].died_s = one.ranks[rank].beats.ended_s + lived_s
        assert one._find_failed()
        told = read_report(report_path(attempt_folder, "n0")).verdict.lines
        assert "no such index" in " ".join(told), "the report has all of it in any case"
        return capfd.readouterr().err

    return fail


@pytest.mark.parametrize("rank, exit_code, lived_s", [(0, 3, 0.0), (1, 1, 0.0), (1, 3, 5.1)])
def test_what_a_rank_has_printed_itself_is_not_printed_again(failing, rank, exit_code, lived_s):
    printed = failing(rank, exit_code, lived_s).splitlines()
    assert len(printed) == 2 and "no such" not in printed[0]
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d ERROR failed: rank {rank} on n0", printed[0])
    assert printed[1].strip().startswith("more: phi3v-diagnose /") and printed[1].endswith("runs/own")


def test_a_rank_that_was_ended_before_it_could_print_why_it_failed_is_quoted(failing):
    printed = failing(1, 3, 2.0)
    assert "no such shard" in printed and "no such index" in printed and "phi3v-diagnose" in printed


def test_a_node_that_does_not_answer_may_be_the_one_that_works(asking):
    """NFS shows its report a minute late; it was in a long phase all the time."""
    one, _ = asking
    assert heard(one, 0) == "suspect" and heard(one, 10) == "suspect" and heard(one, 60) == "suspect"
    works = actor(1, "evaluate", host="n1", waits=False)
    NodeReport("n1", "running", [], [works], seen={"n0": one.neighbours.round}).write(one.attempt_folder)
    assert heard(one, 2) == "running"


def test_a_node_that_never_answers_does_not_hold_up_the_verdict_for_ever(asking):
    one, _ = asking
    assert heard(one, 0) == "suspect" and heard(one, 80) == "suspect" and heard(one, 11) == "hang"
    assert "no answer from n1" in " ".join(one.verdict.lines)


def test_a_suspicion_ends_with_a_sign_of_life(asking):
    one, alive = asking
    assert heard(one, 0) == "suspect"
    alive.write(TRAIN, Lane("forward", 5, 5, 2, 2, bound_s=HANG_S))
    assert heard(one, 1) == "running"


def test_reports_of_other_nodes_are_read_again_only_when_they_have_changed(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(neighbours, "read_report", lambda path: reads.append(path.name) or read_report(path))
    for number in range(1, 4):
        NodeReport(f"n{number}", "running", []).write(tmp_path)
    one = neighbours.Neighbours(tmp_path, "n0")
    for second in range(20):
        one.look(float(second))
    assert sorted(reads) == ["node-n1.json", "node-n2.json", "node-n3.json"]
    NodeReport("n2", "suspect", [], round=1).write(tmp_path)
    one.look(30.0)
    assert reads[3:] == ["node-n2.json"] and one.questions() == {"n2": 1} and len(one.missing()) == 3


def actor(rank: int, phase: str, **facts) -> Actor:
    known = {"pid": 1, "lane": TRAIN, "step": 5, "what": "", "position": (5, 9), "silent_s": 1.0, "bound_s": 30.0}
    return Actor(rank=rank, phase=phase, **known | facts)


@pytest.mark.slow
def test_a_death_on_one_node_ends_the_ranks_of_the_other(tmp_path):
    loop = Loop.start(tmp_path, ["n0", "n1"], 1, PHI3V_FAULT="1:optimizer:5:kill9")
    codes = loop.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert blamed(loop, "n1") == [(1, "optimizer", 5)]


def test_time_in_which_the_watcher_did_not_run_is_nobodys_silence(asking, monkeypatch):
    one, _ = asking
    monkeypatch.setattr(time, "monotonic", lambda: one.now_s + 100)
    silence = one.ranks[0].silences[TRAIN]
    since_s = silence.since_s
    one._read_clock()
    assert silence.since_s - since_s == 100 - TICK_S and silence.observed_s == 0


@pytest.mark.slow
def test_a_machine_that_slept_is_not_taken_for_a_hang(tmp_path):
    """Ranks and watcher stopped together for longer than the bound, as by a suspended laptop or a paused job."""
    loop = Loop.start(tmp_path, ["n0"], 2, steps=60, hang_s=HANG_S)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not _is_training(loop):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    watcher = [pid for pid in _children(loop.processes[0].pid) if b"watch.watcher" in _command(pid)]
    assert len(watcher) == 1
    everyone = [*watcher, *(process.pid for process in loop.processes)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3 * HANG_S)
    for pid in reversed(everyone):
        os.kill(pid, signal.SIGCONT)
    assert loop.wait() == [0, 0], loop.said()


def _is_training(loop: Loop) -> bool:
    found = [read_beats(path) for path in folder_of(loop.attempt_folder, "n0").glob("rank-*.beats")]
    return len(found) == 2 and all(beats and (beats.lanes[TRAIN].step or 0) > 3 for beats in found)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_watcher_loads_neither_torch_nor_numpy():
    code = "import sys, phi3v_dist.watch.watcher; print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_stack_says_whether_a_rank_waits_for_others():
    zero = """Thread 0x0000000000000010 (most recent call first):
  File "/x/deepspeed/runtime/zero/partition_parameters.py", line 106 in wait
  File "/x/deepspeed/runtime/zero/partitioned_param_coordinator.py", line 300 in fetch_sub_module
Current thread 0x0000000000000020 (most recent call first):
  File "/x/phi3v_dist/data/store.py", line 12 in _stream
  File "/x/python3.11/threading.py", line 12 in run
"""
    threads = stacks.parse(zero)
    assert stacks.waits_for_others(threads, 0x10) and not stacks.waits_for_others(threads, 0x20)
    assert stacks.place(threads, 0x20) == "`_stream` (store.py, line 12)"


@pytest.mark.fault(15)
def test_a_kill_for_want_of_memory_is_called_so(tmp_path):
    """In a real control group with a limit, where this machine lets us make one."""
    group = Path(f"/sys/fs/cgroup/memory/phi3v-test-{os.getpid()}") if Path("/sys/fs/cgroup/memory").is_dir() else None
    try:
        assert group is not None
        group.mkdir()
    except (OSError, AssertionError):
        pytest.skip("no memory control group of version 1 can be made here")
    (group / "memory.limit_in_bytes").write_text(str(60 * 2**20))
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom phi3v_dist.watch import heartbeat, watcher\n"
        "folder, attempt_folder, group = map(Path, sys.argv[1:])\n"
        "heartbeat.open(folder, 0, 'n0'); watcher.start(folder, attempt_folder, 'n0', 1)\n"
        "while not (attempt_folder / 'node-n0.json').exists(): time.sleep(0.05)\n"  # it has looked at the counters
        "heartbeat.enter('data', 3); group.write_text(str(os.getpid())); x = [bytearray(2**20) for _ in range(200)]"
    )
    attempt_folder = tmp_path / "attempts" / "0001"
    attempt_folder.mkdir(parents=True)
    try:
        process = subprocess.run(
            [sys.executable, "-c", code, str(folder_of(attempt_folder, "n0")), str(attempt_folder),
             str(group / "cgroup.procs")],
            env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert process.returncode == -signal.SIGKILL
        report = read_report(report_path(attempt_folder, "n0"))
        assert report.status == "died"
        assert "killed by the kernel, probably memory" in " ".join(report.verdict.lines)
        assert "GiB of memory" in " ".join(report.verdict.lines)
    finally:
        deadline_s = time.monotonic() + TIMEOUT_S
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        group.rmdir()


def test_a_counter_of_memory_kills_that_rises_is_seen(tmp_path, monkeypatch):
    """Control groups of version 2, as files laid out the same way."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text("0::/job\n")
    (groups / "job").mkdir(parents=True)
    events = groups / "job" / "memory.events"
    events.write_text("low 0\noom 0\noom_kill 1\n")
    monkeypatch.setattr(processes, "PROC", proc)
    monkeypatch.setattr(processes, "CGROUPS", groups)
    counters = processes.out_of_memory_kills(7)
    assert not processes.kills_again(counters)
    events.write_text("low 0\noom 1\noom_kill 2\n")
    assert processes.kills_again(counters)


@pytest.mark.parametrize(("kind", "is_taken"), [("hang", True), ("failed", False)])
def test_a_rank_that_lost_its_connection_to_a_node_that_judged_a_hang_is_not_to_blame(asking, kind, is_taken):
    """Other verdicts may come from a rank that was lost because of ours."""
    one, alive = asking
    said = Verdict(kind, [f"{kind}: rank 1 on n1"], [actor(1, "forward", host="n1", waits=False)])
    NodeReport("n1", kind, [], [], verdict=said).write(one.attempt_folder)
    alive.close("failed", "connection reset by peer", 1)
    one._look()
    assert one._find_ended_elsewhere() == is_taken
    assert [found.rank for found in one.verdict.blamed] == [1] if is_taken else one.verdict is None
