"""Signals and files → one decision at a step's edge; before the first step, a signal ends the process."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import environment

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Asked, Requests
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
    made.opened(tmp_path, Attempt(1, tmp_path))
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
    output = started.communicate(timeout=60)
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
        print(asked.stop, asked.save, 0.2 < asked.notice_age_s < 60, requests.why, flush=True)
        """
    )
    assert started.stdout.readline() == "training\n"
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)
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
    assert "KeyboardInterrupt" in started.communicate(timeout=60)[1]
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
    assert (tmp_path / "stopped.json").read_text().startswith('{"step": 7, "why": "')


def test_a_wish_of_any_rank_is_everyones(requests):
    class OtherRankStops(Topology):
        def max(self, values: list[float]) -> list[float]:
            return [max(pair) for pair in zip(values, [1.0, 0.0, 1.0, 0.0, 5.0, 0.0], strict=True)]

    assert requests.agreed(OtherRankStops(), save=True) == Asked(stop=True, save=True, busy=True, notice_age_s=5.0)


def test_files_are_looked_for_at_most_once_a_second(requests, tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(os.path, "exists", lambda path: looks.append(path) or False)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: looks.append(path) or False)
    for _ in range(100):
        requests.heard()
    assert len(looks) == 2
