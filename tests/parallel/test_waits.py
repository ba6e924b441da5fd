"""Waiting for other ranks is told apart from working, although all steps take equally long."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.waits import Waits

RANKS = Path(__file__).parents[1] / "train" / "numbers_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two ranks saw, of which rank 1 sleeps in its forward passes, then is stopped three quarters of the time."""
    folder = tmp_path_factory.mktemp("waits")
    command = [sys.executable, str(RANKS), str(folder), "2:waits:fp32"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "2:waits:fp32.json").read_text())


@pytest.mark.slow
@pytest.mark.fault(14)
@pytest.mark.parametrize("what", ["sleeps", "is stopped"])
def test_a_slow_rank_is_named_once_with_its_host(ranks, what):
    (said,) = ranks[0][what]["said"]
    assert "rank 1 on " in said and "is slow in computing" in said and not ranks[1][what]["said"]
    last = ranks[0][what]["rows"][-1]
    assert last["health/straggler_ratio"] > 1.5 and last["health/slowest_rank"] == 1


def test_with_one_process_nothing_is_wrapped():
    from deepspeed.comm import comm

    before = comm.cdb
    waits = Waits()
    waits.watch(Topology())
    assert comm.cdb is before and waits.take_s() == 0.0


class Backend:
    """One of two ranks, as DeepSpeed communicates through it."""

    def is_initialized(self) -> bool:
        return True

    def barrier(self, *args, **kwargs) -> None:
        time.sleep(0.01)


@pytest.fixture
def backend(monkeypatch) -> Backend:
    from deepspeed.comm import comm

    backend = Backend()
    monkeypatch.setattr(comm, "cdb", backend)
    return backend


def test_a_barrier_is_timed_and_the_one_that_shows_it_is_not_counted(backend):
    import deepspeed.comm

    waits = Waits()
    waits.watch(Topology(world_size=2, local_world_size=2))
    assert waits.take_s() == 0.0
    deepspeed.comm.barrier()
    assert waits.take_s() >= 0.01
    waits.stop()
    assert "barrier" not in vars(backend)


def test_a_deepspeed_that_calls_something_else_than_is_wrapped_is_refused(backend, monkeypatch):
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "barrier", Backend().barrier)  # as if it kept another object
    with pytest.raises(LaunchError, match="collectives are not timed"):
        Waits().watch(Topology(world_size=2, local_world_size=2))
