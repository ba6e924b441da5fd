"""slurm/train.sh on a real Slurm: a run over three nodes is the one of one process, and a notice costs no step."""

import json

import pytest
from launching import launch, losses

from slurm.jobs import SETTINGS, assert_each_sample_once, assert_same_run, submit

SAME_IN_FP32 = 2e-6  # relative, of the first 10 steps: three ranks sum in another order


@pytest.mark.supports("srun", "full", "zero3", "local", on="Slurm")
def test_three_nodes_train_to_the_losses_of_one_process(slurm, undisturbed, launched):
    config, root = launched
    done = launch("single", config, "run.name=one-process", *SETTINGS, "train.rows_per_step=3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = losses(undisturbed), losses(root / "one-process")
    assert json.loads((undisturbed / "attempts/0001/owner.json").read_text())["hosts"] == ["node1", "node2", "node3"]
    assert {step: ours[step] for step in range(1, 11)} == pytest.approx(
        {step: theirs[step] for step in range(1, 11)}, rel=SAME_IN_FP32
    )
    assert_each_sample_once(undisturbed)


@pytest.mark.fault(8, 9)
@pytest.mark.supports("stop", "resume", on="Slurm")
def test_a_notice_costs_no_step_and_the_job_comes_back_by_itself(slurm, undisturbed, launched):
    job = submit(slurm, *launched, "noticed")
    job.until_step(8)
    slurm.signal(job.id, "USR1")
    job.until_finished()
    steps = [row["train/step"] for row in job.rows()]
    assert sorted(steps) == sorted(set(steps)), "a step was trained twice"
    assert int(slurm.job(job.id)["Restarts"]) == 1
    assert_same_run(job.run, undisturbed)
    assert_each_sample_once(job.run)


@pytest.mark.fault(100)
def test_a_finished_run_submitted_again_ends_at_once(slurm, undisturbed, launched):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    job = submit(slurm, *launched, undisturbed.name)
    assert slurm.wait(job.id, "COMPLETED")["ExitCode"] == "0:0"
    assert f"{undisturbed} is finished: nothing to do" in slurm.output(job.id)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
