"""Whole training runs, two ranks under torchrun, with a fault in each phase: who is stuck or dead is named rightly."""

import random
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, environment
from launching import free_port

from phi3v_dist.watch.attempts import PastAttempt, read_attempts

HANG_S, FIRST_S = 5.0, 90.0
TIMEOUT_S = 600  # however busy the machine is
SEED = 5
PLACES = ("data:5", "forward:6", "backward:5", "optimizer:6", "write:6", "commit:6", "evaluate:1")
ACTIONS = ("hang", "stop")
CLEAN_S = 20 * 60


def train(tree: dict, folder, fault: str = "", timeout_s: float = TIMEOUT_S) -> tuple[int, PastAttempt, str]:
    """Exit code, the attempt, and everything that was printed."""
    config = folder / "watched.yaml"
    config.write_text(yaml.safe_dump(tree))
    words = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "launch/train.py"]
    done = subprocess.run(
        [*words, "--config", str(config)], cwd=REPOSITORY, env=environment(PHI3V_FAULT=fault), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
    )  # fmt: skip
    return done.returncode, read_attempts(Path(tree["run"]["root"]) / tree["run"]["name"])[-1], done.stdout


@pytest.fixture
def watched_tree(settings_tree):
    """Enough steps, saves and evaluations that every phase has been timed before it is made to hang."""
    settings_tree["watch"] = {"hang_s": HANG_S, "first_s": FIRST_S}
    settings_tree["checkpoint"] = {"every_steps": 2}
    settings_tree["eval"] |= {"every_steps": 3, "samples": 12, "batch_samples": 2}
    settings_tree["train"]["steps"] = 5000
    return settings_tree


def require_named(tree: dict, folder, fault: str) -> None:
    rank, phase, _, action = fault.split(":")
    code, attempt, text = train(tree, folder, fault)
    assert code != 0 and attempt.ending == "hang", (fault, text[-3000:])
    blamed = attempt.verdict.verdict.blamed
    assert {actor.rank for actor in blamed} == {int(rank)}, (fault, attempt.verdict.verdict.lines)
    assert phase in {actor.phase for actor in blamed}, (fault, attempt.verdict.verdict.lines)
    assert action == "stop" or len(blamed) == 1, (fault, attempt.verdict.verdict.lines)
    found = [actor for actor in blamed if actor.overdue and not actor.progresses and actor.bound_s < FIRST_S]
    assert found, ("by the limit of its kind of work", attempt.verdict.verdict.lines)
    stacks = (attempt.folder / f"stacks-{blamed[0].host}.txt").read_text()
    assert "rank 0 on" in stacks and "rank 1 on" in stacks


@pytest.mark.fault(11)
@pytest.mark.supports("hang", on="2 ranks")
def test_a_rank_that_hangs_in_a_real_run_is_named(watched_tree, tmp_path):
    require_named(watched_tree, tmp_path, "1:backward:5:hang")


@pytest.mark.slow
@pytest.mark.fault(11)
def test_twenty_hangs_in_all_phases_are_named_twenty_times(watched_tree, tmp_path):
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    faults = [(place, action) for place in PLACES for action in ACTIONS]
    faults += draw.sample(faults, 20 - len(faults))
    for number, (place, action) in enumerate(faults):
        watched_tree["run"]["name"] = f"trial-{number}"
        require_named(watched_tree, tmp_path, f"{draw.randrange(2)}:{place}:{action}")


@pytest.mark.slow
def test_twenty_clean_minutes_raise_no_alarm(watched_tree, tmp_path):
    """With evaluations and saves, at the bound of production."""
    watched_tree["watch"] = {}
    watched_tree["train"]["steps"] = 10**6
    watched_tree["eval"]["every_steps"] = 50
    config = tmp_path / "watched.yaml"
    config.write_text(yaml.safe_dump(watched_tree))
    words = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "launch/train.py"]
    run = Path(watched_tree["run"]["root"]) / watched_tree["run"]["name"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--config", str(config)], cwd=REPOSITORY, env=environment(), stdout=log, stderr=log
        )
        try:
            deadline_s = time.monotonic() + CLEAN_S
            while time.monotonic() < deadline_s:
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
            (run / "STOP").touch()
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
    attempt = read_attempts(run)[-1]
    assert attempt.ending == "stopped" and attempt.verdict is None
