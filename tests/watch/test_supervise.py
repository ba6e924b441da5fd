"""phi3v-supervise starts a run again where that helps, and nowhere else. The launchers here are small scripts that
leave what ranks and watchers leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, environment

TIMEOUT_S = 300  # however busy the machine is
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from phi3v_dist.watch import heartbeat
from phi3v_dist.watch.node_report import NodeReport, RankReport, Verdict
from phi3v_dist.watch.processes import start_ticks
run = Path(sys.argv[1])
number = 1 + len(list((run / "attempts").glob("[0-9]*")))
folder = run / "attempts" / f"{number:04d}"
def begin():
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps({"hosts": ["n0"], "world_size": 1}))
def step(count):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"train/step": count, "run/attempt": number}) + "\\n")
def rank(outcome="", exit_code=0, message="", pid=None, verdict=None):
    pid = pid or os.getpid()
    ranks = [RankReport(0, pid, start_ticks(pid), outcome, exit_code, message)]
    NodeReport("n0", verdict.kind if verdict else "running", ranks, verdict=verdict).write(folder)
"""


def supervise(run, code: str, *options: str, wait: bool = True):
    words = [sys.executable, "launch/supervise.py", *options, str(run), "--", sys.executable, "-c", SCRIPT + code]
    process = subprocess.Popen(
        [*words, str(run)], cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return (*process.communicate(timeout=TIMEOUT_S)[:1], process.returncode) if wait else process


def starts(run) -> int:
    return len(list((run / "attempts").glob("[0-9]*")))


def test_a_crash_is_started_again_until_the_run_finishes(tmp_path):
    text, code = supervise(
        tmp_path / "run",
        "begin(); step(number)\nif number < 3: sys.exit(1)\n(run / 'summary.json').write_text('{}')",
    )
    assert code == 0 and starts(tmp_path / "run") == 3, text
    assert "start 2 of at most 6: no checkpoint was written yet" in text


@pytest.mark.fault(17)
def test_three_starts_without_a_new_step_are_enough(tmp_path):
    run = tmp_path / "run"
    text, code = supervise(run, "begin(); step(5 if number == 1 else 4); rank('failed', 1, 'boom')\nsys.exit(1)")
    assert code == 8 and starts(run) == 4, text  # the first one made steps
    assert "3 starts in a row" in text and "at step 5" in text


@pytest.mark.parametrize("exit_code", [2, 3, 4, 13])
def test_errors_that_another_start_cannot_mend_end_it_at_once(tmp_path, exit_code):
    run = tmp_path / "run"
    text, code = supervise(run, f"begin(); rank('failed', {exit_code}, 'x')\nsys.exit(1)")
    assert code == exit_code and starts(run) == 1 and "would not mend" in text


@pytest.mark.parametrize(
    "ending",
    ["rank('failed', 11, 'lost another rank')", "rank('failed', 4, 'x', verdict=Verdict('died', ['gone'], []))"],
)
def test_what_follows_from_a_lost_rank_is_not_hopeless(tmp_path, ending):
    run = tmp_path / "run"
    end = "(run / 'summary.json').write_text('{}')"
    text, code = supervise(run, f"begin(); step(number)\nif number == 1: {ending}; sys.exit(1)\n{end}")
    assert code == 0 and starts(run) == 2, text


def test_an_error_before_there_is_an_attempt_is_heard_too(tmp_path):
    text, code = supervise(tmp_path / "run", "heartbeat.close('failed', 'configuration: 1 problem', 2)\nsys.exit(1)")
    assert code == 2 and "would not mend this configuration error" in text


def test_a_signal_goes_to_the_ranks_once_and_leads_to_a_clean_stop(tmp_path):
    run = tmp_path / "run"
    code = (
        "import signal, subprocess\n"
        "begin()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, sys, time; "
        'signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); open(sys.argv[1], "w"); time.sleep(999); sys.exit(1)\','
        " str(run / 'ready')], start_new_session=True)\n"
        "rank(pid=child.pid)\n"
        "code = child.wait(); rank('stopped' if code == 0 else 'died')\n"
        "sys.exit(code)"
    )
    process = supervise(run, code, wait=False)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (run / "ready").exists():
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0 and starts(run) == 1, text


def test_no_process_of_the_last_attempt_lives_when_the_next_one_starts(tmp_path):
    run = tmp_path / "run"
    code = (
        "import subprocess\n"
        "begin(); step(number)\n"
        "if number == 1:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)'], start_new_session=True)\n"
        "    rank(pid=child.pid); (run / 'child').write_text(str(child.pid)); sys.exit(1)\n"
        "pid = int((run / 'child').read_text())\n"
        "(run / 'summary.json').write_text(json.dumps({'alive': start_ticks(pid) is not None}))"
    )
    text, exit_code = supervise(run, code)
    assert exit_code == 0 and json.loads((run / "summary.json").read_text()) == {"alive": False}, text
    assert "had not ended and was killed" in text
    with pytest.raises(ProcessLookupError):
        os.kill(int((run / "child").read_text()), 0)


def test_a_command_that_does_not_exist_is_a_clear_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/supervise.py", str(tmp_path / "run"), "--", "no-such-launcher"], cwd=REPOSITORY,
        env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 2 and "no-such-launcher cannot be started" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_number_of_restarts_below_none_is_refused(tmp_path):
    text, code = supervise(tmp_path / "run", "begin()", "--restarts", "-1")
    assert code == 2 and "--restarts is -1" in text and starts(tmp_path / "run") == 0


def test_a_command_that_ends_well_without_an_attempt_is_no_finished_run(tmp_path):
    run = tmp_path / "run"
    text, code = supervise(run, "heartbeat.close('done')")
    assert code == 2 and f"no attempt was made in {run}: does the command train there" in text and not run.exists()
    run.mkdir()
    (run / "summary.json").write_text("{}")
    assert supervise(run, "heartbeat.close('done')")[1] == 0, "finished before"


def test_a_command_that_is_stopped_before_its_attempt_is_stopped_cleanly(tmp_path):
    assert supervise(tmp_path / "run", "heartbeat.close('stopped', 'SIGTERM')")[1] == 0


def test_a_run_folder_in_which_nothing_happens_is_named_after_each_crash(tmp_path):
    text, code = supervise(tmp_path / "mistyped", "sys.exit(1)", "--restarts", "0")
    assert code == 1 and "no attempt was made in" in text and "mistyped: does the command train there" in text
    assert not (tmp_path / "mistyped").exists()


def test_without_a_launcher_the_watcher_is_heard_and_the_exit_code_is_that_of_the_signal(tmp_path):
    """The rank is the command itself, and ends before its watcher has seen that."""
    run = tmp_path / "run"
    text, code = supervise(
        run,
        "import signal\nfrom phi3v_dist.watch import beat_file, watcher\nbegin()\n"
        "place = beat_file.folder_of(folder, 'n0')\nheartbeat.open(place, 0, 'n0')\n"
        "watcher.start(place, folder, 'n0', 1)\nheartbeat.enter('forward', 2)\n"
        "while not (folder / 'node-n0.json').exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        "--restarts", "0",
    )  # fmt: skip
    assert code == 128 + signal.SIGKILL, text
    assert "no rank said why" not in text
    assert "rank 0 on n0" in text[: text.index("restarts are used up")] and "phase forward, step 2" in text
