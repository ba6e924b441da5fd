"""Who may train in a run folder: attempts that live, are gone, sit elsewhere, or come back."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from phi3v_dist.attempt import owner as owner_module
from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.owner import COUNTER_NAME, Owner, read_owner, write_owner
from phi3v_dist.errors import InUseError, LaunchError
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.fence import Fence
from phi3v_dist.watch.processes import start_ticks


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch):
    monkeypatch.setattr(owner_module, "RENEW_S", 0.1)
    monkeypatch.setattr(owner_module, "WATCH_S", 1.5)


@pytest.fixture
def no_watch(monkeypatch):
    """Waiting would never end."""
    monkeypatch.setattr(owner_module, "WATCH_S", 1e9)


def leave(folder, **changes) -> None:
    """Attempt 1 as a killed job leaves it."""
    (folder / "attempts" / "0001").mkdir(parents=True)
    write_owner(folder / "attempts" / "0001", replace(Owner.of_this_process(1, {}), **changes))


def begin(folder) -> Attempt:
    return Attempt.begin(folder, Topology())


@pytest.mark.fault(19)
def test_a_second_job_is_told_who_trains_there_and_since_when(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = begin(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(InUseError) as refused:
        begin(tmp_path)
    assert refused.value.exit_code == 13
    held = read_owner(first.folder)
    text = str(refused.value)
    assert "Slurm job 4711" in text and held.host in text and held.since in text and "run.name" in text
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["0001"] and first.lost_to() is None
    first.end()
    second = begin(tmp_path)
    assert second.number == 2
    second.end()


@pytest.mark.fault(19)
@pytest.mark.usefixtures("no_watch")
def test_the_place_of_a_killed_process_is_taken_over_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        leave(tmp_path, pid=process.pid, start_ticks=start_ticks(process.pid))
        with pytest.raises(LaunchError, match=f"process {process.pid}"):
            begin(tmp_path)
        process.kill()
        process.wait()
    begin(tmp_path).end()


@pytest.mark.fault(19)
@pytest.mark.usefixtures("no_watch")
def test_a_process_with_the_number_of_the_dead_one_is_not_mistaken_for_it(tmp_path):
    leave(tmp_path, start_ticks=1)
    begin(tmp_path).end()


@pytest.mark.fault(19)
@pytest.mark.usefixtures("no_watch")
def test_a_process_is_the_same_after_the_clock_was_set(tmp_path):
    leave(tmp_path, pid_started=time.time() - 3600)
    with pytest.raises(InUseError, match=f"process {os.getpid()}"):
        begin(tmp_path)


@pytest.mark.fault(19)
def test_an_owner_on_another_machine_is_alive_while_its_counter_moves(tmp_path):
    leave(tmp_path, machine="another/1", host="node7")
    ended = threading.Event()
    owner_module.show_life(tmp_path / "attempts" / "0001", ended)
    try:
        with pytest.raises(LaunchError, match="node7"):
            begin(tmp_path)
    finally:
        ended.set()
    begin(tmp_path).end()
    assert (tmp_path / "attempts" / "0001" / COUNTER_NAME).exists()


@pytest.mark.fault(19)
@pytest.mark.usefixtures("no_watch")
def test_a_requeued_slurm_job_takes_over_from_itself_without_waiting(tmp_path, monkeypatch):
    leave(tmp_path, machine="another/1", host="node7", job="4711")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin(tmp_path).end()


@pytest.mark.fault(19)
def test_two_programs_of_one_slurm_job_do_not_take_over_from_each_other(tmp_path, monkeypatch):
    leave(tmp_path, machine="another/1", host="node7", job="4711")
    ended = threading.Event()
    owner_module.show_life(tmp_path / "attempts" / "0001", ended)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(LaunchError, match="Slurm job 4711 on node7"):
        begin(tmp_path)
    ended.set()


@pytest.mark.fault(19)
@pytest.mark.usefixtures("no_watch")
@pytest.mark.parametrize("restart", [0, 2])
def test_a_start_in_place_takes_over_from_the_start_before_it_without_waiting(tmp_path, monkeypatch, restart, caplog):
    leave(tmp_path, machine="another/1", host="node7", job="4711", restart=restart, start=1)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("PHI3V_START", "2")
    with caplog.at_level(logging.INFO):
        attempt = begin(tmp_path)
    again = ", restart 2" if restart else ""
    said = f"attempt 2 of {tmp_path}: Slurm job 4711{again}, start 2; 1 rank on "
    assert caplog.messages[-1].startswith(said) and "Slurm job 4711 has ended its start 1" in caplog.text
    assert f"Slurm job 4711{again}, start 2 on " in str(read_owner(attempt.folder))
    attempt.end()


@pytest.mark.fault(19)
@pytest.mark.parametrize("changes", [{"start": 2}, {"start": 3}, {"start": 0}, {"job": "4712"}, {"restart": 1}])
def test_only_an_earlier_start_of_the_same_life_of_the_same_job_is_known_to_be_gone(tmp_path, monkeypatch, changes):
    leave(tmp_path, **{"machine": "another/1", "host": "node7", "job": "4711", "start": 1} | changes)
    ended = threading.Event()
    owner_module.show_life(tmp_path / "attempts" / "0001", ended)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PHI3V_START", "2")
    with pytest.raises(InUseError, match="node7"):
        begin(tmp_path)
    ended.set()


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "PHI3V_START"])
def test_a_count_that_is_no_number_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "two")
    with pytest.raises(LaunchError, match=f"{name} is 'two', which is not a whole number"):
        begin(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_watch")
def test_an_owner_of_an_earlier_release_is_still_understood(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        leave(tmp_path, pid=process.pid)
        path = tmp_path / "attempts" / "0001" / "owner.json"
        facts = json.loads(path.read_text())
        del facts["start"], facts["start_ticks"]
        path.write_text(json.dumps(facts))
        with pytest.raises(InUseError, match=f"process {process.pid}"):
            begin(tmp_path)
        process.kill()
    begin(tmp_path).end()


@pytest.mark.fault(23)
def test_a_run_whose_attempts_were_removed_is_not_fenced_off_by_its_own_checkpoints(tmp_path):
    Fence(tmp_path / "checkpoints", 5).claim()
    attempt = begin(tmp_path)
    Fence(tmp_path / "checkpoints", attempt.number).claim()
    assert attempt.number == 6
    attempt.end()


@pytest.mark.fault(23)
def test_an_attempt_that_comes_back_from_the_dead_learns_who_has_the_run(tmp_path):
    zombie = begin(tmp_path)
    write_owner(zombie.folder, replace(read_owner(zombie.folder), start_ticks=1))  # as if its process were gone
    newer = begin(tmp_path)
    assert "attempt 2" in zombie.lost_to() and newer.lost_to() is None
    zombie.end()
    assert newer.lost_to() is None
    with pytest.raises(LaunchError, match="in use by attempt 2"):
        begin(tmp_path)
    newer.end()


def test_of_many_who_start_at_once_one_trains(tmp_path):
    leave(tmp_path, start_ticks=1)
    taken, refused = [], []

    def start() -> None:
        try:
            taken.append(begin(tmp_path))
        except LaunchError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7 and taken[0].lost_to() is None
    taken[0].end()


def test_a_start_that_died_before_it_said_who_it_is_blocks_nobody(tmp_path):
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    begin(tmp_path).end()


def test_a_damaged_owner_is_named(tmp_path):
    leave(tmp_path)
    (tmp_path / "attempts" / "0001" / "owner.json").write_text('{"attempt": 1')
    with pytest.raises(LaunchError, match=r"owner.json is damaged .*remove"):
        begin(tmp_path)


def test_an_attempt_says_what_it_runs_and_removes_the_marker_of_a_stop(tmp_path):
    (tmp_path / "stopped.json").write_text("{}")
    attempt = begin(tmp_path)
    facts = json.loads((attempt.folder / "owner.json").read_text())
    assert facts["world_size"] == 1 and facts["pid"] == os.getpid() and facts["start_s"] > 0
    assert not (tmp_path / "stopped.json").exists()
    attempt.end()


def test_numbers_go_on_after_runs_of_a_release_without_attempt_folders(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "run/attempt": 4, "train/step": 1}\n')
    attempt = begin(tmp_path)
    assert attempt.number == 5
    attempt.end()
