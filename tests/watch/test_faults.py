"""The injection of faults: what is asked for happens, and what cannot be understood is refused before a run starts."""

import errno
import logging

import pytest

from phi3v_dist.errors import ConfigError
from phi3v_dist.watch import faults


def test_a_fault_fires_on_its_rank_in_its_phase_from_its_step_on(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(faults.VARIABLE, "1:forward:5+:nan,*:write:*:enospc,0:data:*:raise")
    assert [faults.fire("forward", step) for step in (4, 5, 6)] == [None, "nan", "nan"]
    assert faults.fire("backward", 5) is None and faults.fire("data", 1) is None
    with pytest.raises(OSError, match="injected") as full:
        faults.fire("write", None)
    assert full.value.errno == errno.ENOSPC


def test_a_rank_is_slowed_by_as_much_as_was_asked_for(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    monkeypatch.setenv(faults.VARIABLE, "0:data:3:slow=0.06,0:data:*:slow")
    monkeypatch.setenv("RANK", "0")
    faults.fire("data", 2)
    faults.fire("data", 3)
    assert slept == [faults.SLOW_S, 0.06, faults.SLOW_S]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("1:forward:5", "it must be rank:phase:step:action, such as 1:forward:5:kill9"),
        ("one:forward:5:nan", "rank 'one': a number"),
        ("1:forwards:5:nan", "phase 'forwards': one of start, load, data, forward"),
        ("1:forward:x+:nan", r"step 'x\+': a number"),
        ("1:forward:5:kill", "action 'kill': one of kill9"),
        ("1:forward:5:slow=-1", "action 'slow=-1': one of kill9"),
    ],
)
def test_a_typo_is_refused_with_what_there_is(monkeypatch, asked, message):
    monkeypatch.setenv(faults.VARIABLE, asked)
    with pytest.raises(ConfigError, match=message):
        faults.announce()


def test_a_run_with_a_fault_says_so(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        faults.announce()
        assert not caplog.records
        monkeypatch.setenv(faults.VARIABLE, "1:forward:5:kill9")
        faults.announce()
    assert "rank 1, phase forward, step 5 (kill9) will go wrong on purpose" in caplog.text
