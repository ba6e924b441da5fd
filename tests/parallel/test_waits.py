"""A rank that all the others wait for is told apart from those that wait, although all steps take equally long."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.waits import Stragglers, Waits

RANKS = Path(__file__).parents[1] / "train" / "numbers_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two ranks saw, of which rank 1 sleeps in its forward passes, then is stopped three quarters of the time."""
    folder = tmp_path_factory.mktemp("waits")
    command = [sys.executable, str(RANKS), str(folder), "2:waits:fp32"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "2:waits:fp32.json").read_text())


@pytest.mark.fault(14)
@pytest.mark.parametrize("what", ["sleeps", "is stopped"])
def test_a_slow_rank_is_named_once_with_its_host(ranks, what):
    (said,) = ranks[0][what]["said"]
    assert "rank 1 on " in said and "is slow" in said and not ranks[1][what]["said"]
    for notes in ranks:
        *before, last = notes[what]["rows"]
        assert last["health/straggler_ratio"] > 1.5 and not any(before)


def gathered(monkeypatch, own_s: list[float], step_s: float = 1.0) -> None:
    everyone = [(f"node-{rank}", seconds, step_s) for rank, seconds in enumerate(own_s)]
    monkeypatch.setattr(Topology, "gather", lambda self, value: everyone)


def looked(stragglers: Stragglers, num_steps: int = 2) -> dict[str, float]:
    row: dict[str, float] = {}
    for step in range(1, num_steps + 1):
        row = stragglers.look(step, 0.5, 1.0)
    return row


@pytest.mark.fault(14)
def test_it_is_said_again_only_when_the_rank_kept_up_in_between(monkeypatch, caplog):
    stragglers = Stragglers(Topology(world_size=4), every_n_steps=2)
    with caplog.at_level(logging.WARNING):
        for slow_s, said in ((0.9, 1), (0.9, 1), (0.5, 1), (0.9, 2)):
            gathered(monkeypatch, [0.5, 0.5, 0.5, slow_s])
            assert looked(stragglers) == {"health/straggler_ratio": slow_s / 0.5}
            assert len(caplog.records) == said
    assert "rank 3 on node-3 is slow" in caplog.text and "(steps 1 to 2)" in caplog.text


@pytest.mark.parametrize(
    "own_s",
    [[0.5, 0.6, 0.55, 0.7], [0.01, 0.01, 0.01, 0.04], [0.05, 0.05, 0.05, 0.12]],
    ids=["a little slower", "in a step of which nobody works", "less than a tenth of the step"],
)
def test_small_differences_are_no_stragglers(monkeypatch, caplog, own_s):
    gathered(monkeypatch, own_s)
    looked(Stragglers(Topology(world_size=4), every_n_steps=2))
    assert not caplog.records


def test_with_one_process_nothing_is_wrapped_and_nobody_is_slow():
    from deepspeed.comm import comm

    before = comm.cdb
    waits = Waits()
    waits.watch(Topology())
    assert comm.cdb is before and waits.take_s() == 0.0
    assert looked(Stragglers(Topology(), every_n_steps=2)) == {}
