"""Everything that can end a job of slurm/train.sh, done to it on a real Slurm: it comes back, or stays away, by itself.

Each trial of a fault measures how long training stood still; tests/slurm/recovery_table.py makes a page of that.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from launching import losses

from phi3v_dist.cluster import starts
from slurm.jobs import (
    EVERY_STEPS,
    STEPS,
    Recovery,
    assert_each_sample_once,
    assert_same_run,
    now_s,
    recovery,
    submit,
    time_imports,
)

pytestmark = pytest.mark.slow
SAME_IN_FP32 = 2e-6  # relative, of the first 10 steps: two ranks sum in another order than three
AT_STEP = 9  # of the fault: three steps after a checkpoint
BAD_GPU = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
def nvmlInit(): raise NVMLError("Unable to determine the device handle for GPU0: Unknown Error")
"""  # stands for the module that asks the driver


@pytest.fixture(scope="module")
def imports_s(slurm_cluster) -> dict[str, float]:
    slurm_cluster.reset()
    return time_imports(slurm_cluster)


@pytest.fixture
def measured(imports_s, request) -> Callable[..., Recovery]:
    """Recovery from a fault; a row of the table too, where recovery_table.py asked for one."""

    def measure(job, fault_s: float, title: str) -> Recovery:
        found = recovery(job, fault_s, imports_s)
        print(title, found)
        if path := os.environ.get("PHI3V_RECOVERY_ROWS"):
            with Path(path).open("a") as file:
                file.write(json.dumps({"fault": title} | asdict(found)) + "\n")
        return found

    return measure


def assert_undisturbed(job, reference, found: Recovery, may_lose: int = EVERY_STEPS) -> None:
    assert found.steps_lost <= may_lose
    assert_same_run(job.run, reference)
    assert_each_sample_once(job.run)


# --- notices


@pytest.mark.fault(9)
def test_a_preempted_job_saves_and_comes_back_when_the_other_is_done(slurm, undisturbed, launched, measured):
    job = submit(slurm, *launched, "preempted", options=("--nodes=3", "--partition=spot"))
    job.until_step(AT_STEP)
    fault_s = now_s()
    other = slurm.sbatch("--partition=main", "--nodes=4", "--exclusive", "--wrap", "sleep 1")
    job.until_finished()
    assert slurm.state(other) == "COMPLETED"
    assert_undisturbed(job, undisturbed, measured(job, fault_s, "preemption (spot)"), may_lose=0)


@pytest.mark.fault(9)
def test_a_job_at_its_time_limit_saves_and_comes_back(slurm, undisturbed, launched, measured):
    options = ("--nodes=3", "--time=20", "--signal=B:USR1@90")
    job = submit(slurm, *launched, "time-limit", options=options, slow=8)
    job.until_step(3)
    hours, minutes, _ = (int(part) for part in slurm.job(job.id)["RunTime"].split(":"))
    slurm.client("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    slurm.wait_for_output(job.id, "USR1", timeout_s=120)  # Slurm looks every 30 s
    fault_s = now_s()
    slurm.wait_for_output(job.id, "queued again", timeout_s=120)
    slurm.client("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    job.until_finished()
    assert_undisturbed(job, undisturbed, measured(job, fault_s, "notice of the time limit"), may_lose=0)


@pytest.mark.fault(9, 23)
def test_a_job_that_is_requeued_by_hand_goes_on(slurm, undisturbed, launched, measured):
    job = submit(slurm, *launched, "requeued")
    job.until_step(AT_STEP)
    fault_s = now_s()
    slurm.client("scontrol", "requeue", job.id)
    job.until_finished()
    assert_undisturbed(job, undisturbed, measured(job, fault_s, "`scontrol requeue`"))


# --- nodes


@pytest.mark.fault(8, 23)
@pytest.mark.parametrize("where", ["first", "other"])
@pytest.mark.parametrize("what", ["kill", "freeze", "cut"])
@pytest.mark.supports("killed", on="Slurm")
def test_a_job_whose_node_is_lost_goes_on_and_the_lost_ranks_change_nothing(
    slurm, undisturbed, launched, measured, what, where
):
    job = submit(slurm, *launched, f"{what}-{where}")
    job.until_step(AT_STEP)
    node = job.batch_host() if where == "first" else "node2"
    fault_s = now_s()
    getattr(slurm, what)(node)
    job.until_step(1, attempt=2)
    done = {"kill": "node lost its power", "freeze": "node stands still", "cut": "node lost its network"}[what]
    found = measured(job, fault_s, f"{done}, {'the batch script runs there' if where == 'first' else 'another node'}")
    {"kill": slurm.start, "freeze": slurm.thaw, "cut": slurm.heal}[what](node)  # its old ranks wake beside the new
    job.until_finished()
    assert_undisturbed(job, undisturbed, found)
    assert node not in job.owner(2)["hosts"]
    before = job.checkpoints()
    assert not (job.run / "checkpoints/.attempt-0001").exists()
    slurm.until("every node is idle", lambda: set(slurm.nodes().values()) == {"idle"})
    assert job.checkpoints() == before


@pytest.mark.fault(8)
@pytest.mark.supports("resume elsewhere", on="Slurm")
def test_a_job_that_comes_back_with_a_node_less_goes_on(slurm, undisturbed, launched):
    slurm.drain("node4", "test")
    job = submit(slurm, *launched, "node-less", options=("--nodes=2-3",))
    job.until_step(AT_STEP)
    slurm.kill("node3")
    job.until_finished()
    assert job.owner(1)["world_size"] == 3 and job.owner(2)["hosts"] == ["node1", "node2"]
    assert_close_to(job.run, undisturbed)


@pytest.mark.fault(8)
def test_a_job_that_may_use_fewer_nodes_goes_on_in_place(slurm, undisturbed, launched, measured):
    job = submit(slurm, *launched, "in-place", options=("--nodes=3", "--no-kill"), PHI3V_MIN_NODES="2")
    job.until_step(AT_STEP)
    fault_s = now_s()
    slurm.kill("node2")
    job.until_finished()
    measured(job, fault_s, "node lost its power, `PHI3V_MIN_NODES=2`")
    assert int(slurm.job(job.id)["Restarts"]) == 0
    assert job.owner(2)["hosts"] == ["node1", "node3"]
    assert_close_to(job.run, undisturbed)


def assert_close_to(run: Path, reference: Path) -> None:
    """The run of another number of ranks."""
    ours, theirs = losses(run), losses(reference)
    assert max(ours) == STEPS
    assert [ours[n] for n in range(1, 11)] == pytest.approx([theirs[n] for n in range(1, 11)], rel=SAME_IN_FP32)
    assert_each_sample_once(run)


@pytest.mark.fault(24)
def test_a_node_that_fails_its_examination_is_left_out(slurm, undisturbed, launched):
    job = submit(slurm, *launched, "unfit", PYTHONPATH=slurm.module("node2", "pynvml", BAD_GPU))
    job.until_finished()
    assert job.owner(1)["hosts"] == ["node1", "node3", "node4"]
    assert slurm.job(job.id)["ExcNodeList"] == "node2"
    assert "node2 is left out: GPUs: NVML fails: Unable to" in slurm.output(job.id)
    assert_same_run(job.run, undisturbed)


# --- ranks


@pytest.mark.fault(24)
def test_a_node_whose_rank_dies_twice_is_left_out(slurm, undisturbed, launched, measured):
    job = submit(slurm, *launched, "dies-twice")
    job.until_step(AT_STEP)
    fault_s = now_s()
    slurm.on("node2", "kill", "-KILL", job.rank_on("node2"))
    job.until_step(AT_STEP + 4, attempt=2)
    again_s = now_s()
    slurm.on("node2", "kill", "-KILL", job.rank_on("node2"))
    job.until_finished()
    found = measured(job, fault_s, "a rank is killed")
    assert found.how == "in place"
    assert_undisturbed(job, undisturbed, found)
    found = measured(job, again_s, "a rank on the same node is killed again")
    assert found.steps_lost <= EVERY_STEPS
    assert job.owner(2)["hosts"] == ["node1", "node2", "node3"] and job.owner(3)["hosts"] == ["node1", "node3", "node4"]
    assert [start.end.blamed for start in starts.read(job.run) if start.end.blamed] == [["node2"], ["node2"]]


@pytest.mark.fault(11)
@pytest.mark.supports("hang", on="Slurm")
def test_a_rank_that_hangs_is_ended_and_training_goes_on(slurm, undisturbed, launched, measured):
    job = submit(slurm, *launched, "hangs")
    job.until_step(AT_STEP)
    fault_s = now_s()
    slurm.on("node2", "kill", "-STOP", job.rank_on("node2"))
    job.until_finished()
    assert_undisturbed(job, undisturbed, measured(job, fault_s, "a rank hangs (`watch.hang_s=10`)"))


@pytest.mark.fault(17)
def test_a_job_that_fails_each_time_at_the_same_step_ends(slurm, launched):
    job = submit(slurm, *launched, "crash-loop", PHI3V_FAULT="0:forward:3:raise")
    fields = slurm.wait(job.id, "FAILED", timeout_s=900)
    assert fields["ExitCode"] == "8:0"
    assert "3 starts in a row ended without a new step" in slurm.output(job.id)


# --- people


def test_a_cancelled_job_does_not_come_back(slurm, launched):
    job = submit(slurm, *launched, "cancelled")
    job.until_step(AT_STEP)
    slurm.cancel(job.id)
    slurm.until("every node is idle", lambda: set(slurm.nodes().values()) == {"idle"})
    fields = slurm.job(job.id)
    assert fields["JobState"] == "CANCELLED" and fields["Restarts"] == "0", slurm.report(job.id)


def test_a_run_that_was_asked_to_stop_does_not_come_back_until_it_is_submitted_again(slurm, undisturbed, launched):
    job = submit(slurm, *launched, "stopped")
    job.until_step(AT_STEP)
    (job.run / "STOP").touch()
    fields = slurm.wait(job.id, "COMPLETED", timeout_s=180)
    assert fields["Restarts"] == "0" and not (job.run / "summary.json").exists()
    again = submit(slurm, *launched, "stopped")
    again.until_finished()
    assert_same_run(job.run, undisturbed)


@pytest.mark.fault(19)
def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(slurm, undisturbed, launched):
    first = submit(slurm, *launched, "shared", options=("--nodes=2",), slow=4)
    first.until_step(2)
    second = submit(slurm, *launched, "shared", options=("--nodes=2",))
    fields = slurm.wait(second.id, "FAILED", timeout_s=400)
    assert fields["ExitCode"] == "13:0"
    assert f"Slurm job {first.id}" in slurm.output(second.id)
    first.until_finished()
    assert len({row["run/attempt"] for row in first.rows()}) == 1
