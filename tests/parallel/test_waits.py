"""Waiting for other ranks is told apart from working, although all steps take equally long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

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
