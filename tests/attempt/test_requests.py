"""Signals and files → one decision at a step's edge; before the first step, a signal ends the process."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from conftest import environment

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Asked, Requests
from phi3v_dist.attempt.time_limit import TimeLimit
from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology

LISTENING = (
    "from phi3v_dist.attempt.requests import Requests; requests = Requests.listen(); print('ready', flush=True)\n"
)


def process(body: str) -> subprocess.Popen:
    """A Python process that listens and then does `body`; comes back once it listens."""
    script = LISTENING + textwrap.dedent(body)
    started = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    return started


@pytest.fixture
def requests(tmp_path):
    """Of this process, which does not listen to signals: they are handed over by hand."""
    made = Requests()
    made.opened(tmp_path, Attempt(1, tmp_path), grace_s=60.0)
    made.training_begins()
    return made


@pytest.mark.fault(9)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_before_the_first_step_a_signal_ends_the_process_cleanly_even_in_a_wait_that_no_flag_ends(number):
    started = process(
        """
        import os, torch.distributed as dist
        os.write(1, b"waiting\\n")
        dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True)  # for a rank that never comes
        """
    )
    assert started.stdout.readline() == "waiting\n"
    started.send_signal(number)
    output = started.communicate(timeout=240)
    assert started.returncode == 128 + number, output  # there is no run folder yet in which a marker could say more
    assert "before the first step" in output[1]


@pytest.mark.fault(9)
@pytest.mark.fault(10)
def test_during_training_signals_only_set_a_flag_however_many_come():
    started = process(
        """
        import os, time
        from phi3v_dist.parallel.topology import Topology
        requests.training_begins()
        print("training", flush=True)
        while not requests.heard():
            time.sleep(0.01)
        os.kill(os.getpid(), 15); os.kill(os.getpid(), 10)
        time.sleep(0.3)
        asked = requests.agreed(Topology())
        print(asked.stop, asked.save, -60 < asked.left_s < -0.2, requests.why, flush=True)
        """
    )
    assert started.stdout.readline() == "training\n"
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=240)
    assert (started.returncode, output[0]) == (0, "True False True SIGTERM\n"), output


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    started = process(
        """
        import time
        requests.training_begins()
        print("training", flush=True)
        while not requests.heard():
            time.sleep(0.01)
        print("heard", flush=True)
        time.sleep(60)
        """
    )
    assert started.stdout.readline() == "training\n"
    started.send_signal(signal.SIGINT)
    assert started.stdout.readline() == "heard\n"
    started.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in started.communicate(timeout=240)[1]
    assert started.returncode != 0


def test_files_ask_for_a_stop_and_a_save_and_are_removed_when_it_is_done(requests, tmp_path):
    assert requests.agreed(Topology()) == Asked()
    (tmp_path / "SAVE").touch()
    requests._looked_s = -10.0
    assert requests.agreed(Topology()) == Asked(save=True, by_hand=True)
    requests.saved()
    assert not (tmp_path / "SAVE").exists() and requests.agreed(Topology()) == Asked()
    (tmp_path / "STOP").touch()
    requests._looked_s = -10.0
    assert requests.agreed(Topology()) == Asked(stop=True)  # nobody announced a kill
    requests.stopped(7, requests.why)
    assert not (tmp_path / "STOP").exists()
    why = str(tmp_path / "STOP")
    assert marker(tmp_path) == {"step": 7, "why": why, "notice": False, "attempt": 1}


def test_a_wish_of_any_rank_is_everyones(requests, tmp_path):
    class OtherRankStops(Topology):
        def max(self, values: list[float]) -> list[float]:
            theirs = [1.0, 0.0, 1.0, 0.0, -5.0, 0.0, 1.0, 1.0, 0.0, 0.0]
            return [max(pair) for pair in zip(values, theirs, strict=True)]

    assert requests.agreed(OtherRankStops(), save=True) == Asked(stop=True, save=True, busy=True, left_s=5.0)
    assert requests.profile, "until it is taken"
    requests.agreed(Topology())
    assert requests.profile
    requests.profile_taken()
    assert not requests.profile
    requests.stopped(3, "another rank was asked to")
    assert marker(tmp_path)["notice"], "the notice to that rank says that the run should go on"


def marker(folder) -> dict:
    return json.loads((folder / "stopped.json").read_text())


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("asked", "come_back"),
    [
        ([signal.SIGTERM], True),
        ([signal.SIGUSR1], True),
        ([signal.SIGINT], False),
        (["STOP"], False),
        ([signal.SIGUSR1, "STOP"], False),  # a person wants it to rest, whatever else comes
    ],
)
def test_the_marker_says_whether_the_run_should_come_back_by_itself(requests, tmp_path, asked, come_back):
    for one in asked:
        (tmp_path / "STOP").touch() if one == "STOP" else requests._heard(one, None)
    requests.stopped(4, requests.why if requests.agreed(Topology()).stop else "")
    assert marker(tmp_path) | {"why": ""} == {"step": 4, "why": "", "notice": come_back, "attempt": 1}


@pytest.mark.fault(9)
def test_a_run_stops_by_itself_while_there_is_time_for_one_more_step_and_a_save(requests, tmp_path, caplog):
    requests.limit = TimeLimit(left_s=100.0)
    for seconds in (70.0, *[30.0] * 8):  # the first step is long, and is forgotten
        requests.limit.step_took(seconds)
    assert not requests.heard() and 80 < requests.agreed(Topology()).left_s <= 100
    requests.limit.step_took(41.0)
    assert requests.heard(), "a long evaluation sees it too"
    with caplog.at_level(logging.WARNING):
        asked = requests.agreed(Topology())
    assert asked.stop and requests.why == "the job's time limit" and "100 s are left of the job's" in caplog.text
    requests.stopped(9, requests.why)
    assert marker(tmp_path) == {"step": 9, "why": requests.why, "notice": True, "attempt": 1}


def test_the_grace_of_a_notice_ends_with_the_job(requests):
    requests.limit = TimeLimit(left_s=1000.0)
    requests._heard(signal.SIGTERM, None)
    assert 40 < requests.agreed(Topology()).left_s <= 60
    requests.limit = TimeLimit(left_s=10.0)
    assert 0 < requests.agreed(Topology()).left_s <= 10


def test_the_time_left_counts_from_the_start_of_this_process():
    age_s = time.time() - psutil.Process().create_time()
    assert TimeLimit.of_job({"PHI3V_TIME_LEFT_S": "5000"}).left_s() == pytest.approx(5000 - age_s, abs=2.0)
    assert TimeLimit.of_job({}).left_s() == math.inf
    with pytest.raises(LaunchError, match="PHI3V_TIME_LEFT_S is 'UNLIMITED', which is not a whole number"):
        TimeLimit.of_job({"PHI3V_TIME_LEFT_S": "UNLIMITED"})


def test_files_are_looked_for_at_most_once_a_second(requests, tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(os.path, "exists", lambda path: looks.append(path) or False)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: looks.append(path) or False)
    for _ in range(100):
        requests.heard()
    assert len(looks) == 3
