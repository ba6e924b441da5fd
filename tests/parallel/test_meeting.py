"""Ranks that meet, and what is said of those that do not come: real stores, threads for the ranks."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from conftest import environment
from launching import free_port

from phi3v_dist.errors import LaunchError, LostRankError
from phi3v_dist.parallel import meeting


@pytest.fixture
def env():
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


PATIENT_S = 240.0  # more than a busy machine needs for two threads to connect


def others(ranks, world_size, env, errors, timeout_s):
    def come(rank: int) -> None:
        try:
            meeting.meet(rank, world_size, f"n{rank}", timeout_s, env)
        except LostRankError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


class ClockOfRank0:
    """Stands still until `num_ranks` have arrived, then gains a second each time it is read."""

    def __init__(self, env, num_ranks):
        self.env, self.num_ranks, self.now_s, self.store = env, num_ranks, 0.0, None

    def monotonic(self) -> float:
        if self.store is None:
            tcp = dist.TCPStore("127.0.0.1", int(self.env["MASTER_PORT"]), wait_for_workers=False)
            self.store = dist.PrefixStore("start 0", tcp)
        self.now_s += float(self.store.add(meeting.ARRIVED, 0) >= self.num_ranks)
        return self.now_s

    sleep = staticmethod(time.sleep)


def test_ranks_that_do_not_come_are_named_with_their_nodes_and_nobody_waits_for_hours(env, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "FIRST_WORD_S", 60)
    monkeypatch.setattr(meeting, "NEXT_WORD_S", 60)
    monkeypatch.setattr(meeting, "MARGIN_S", 1.0)
    monkeypatch.setattr(meeting, "time", ClockOfRank0(env, num_ranks=3))
    errors: list[str] = []
    threads = others([1, 2], 5, env, errors, timeout_s=1.0)
    step = {"SLURM_STEP_NODELIST": "n[0-4]"}
    with caplog.at_level(logging.WARNING), pytest.raises(LaunchError) as caught:
        meeting.meet(0, 5, "n0", 100.0, env | step)
    for thread in threads:
        thread.join(PATIENT_S)
    missing = "2 of 5 ranks have not come (3, 4; nobody from n3, n4)"
    assert missing in str(caught.value) and "in 100 s" in str(caught.value)
    assert caplog.messages == [f"{missing} yet, after 60 s"]
    assert len(errors) == 2 and all("rank 0 is not there or gave up" in text for text in errors)


def test_ranks_wait_for_rank_0_longer_than_for_each_other(env, monkeypatch):
    monkeypatch.setattr(meeting, "MARGIN_S", PATIENT_S)
    errors: list[str] = []
    threads = others([1, 2], 3, env, errors, timeout_s=0.01)
    time.sleep(0.5)  # rank 0 looks at the data, longer than the others' timeout
    store = meeting.meet(0, 3, "host0", PATIENT_S, env)
    for thread in threads:
        thread.join(PATIENT_S)
    assert not errors and store.timeout.total_seconds() == PATIENT_S


def test_tasks_of_srun_meet_without_a_word_about_where():
    """As in a plain `salloc`: nothing but what srun sets for each task."""
    code = (
        "from phi3v_dist.cli.app import run_script\n"
        "from phi3v_dist.parallel.topology import Topology\n"
        "def main():\n"
        "    topology = Topology.from_environment(); topology.start(60.0)\n"
        "    print('ranks', topology.sum([topology.rank + 1.0]), flush=True); topology.stop()\n"
        "run_script(main)\n"
    )
    step = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for task in tasks:
        text = task.communicate(timeout=240)[0]
        assert task.returncode == 0 and "ranks [3.0]" in text, text


@pytest.mark.fault(18)
def test_a_taken_port_is_still_an_error_of_rank_0():
    with socket.create_server(("0.0.0.0", 0)) as holder:
        taken = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(holder.getsockname()[1])}
        with pytest.raises(dist.DistNetworkError, match="EADDRINUSE"):
            meeting.meet(0, 2, "host0", 2.0, taken)
