"""PHI3V_STAGE → every node in use has the shards on its own disk before the ranks begin."""

import fcntl
import sys

import pytest

from phi3v_dist.data.cache import ShardCache


@pytest.mark.slow
@pytest.mark.supports("cache", on="Slurm")
def test_each_node_of_a_job_copies_the_shards_before_training_and_keeps_them(slurm, config_file, settings_tree) -> None:
    local = slurm.folder / "local" / "shards"
    words = ("--nodes=2", "slurm/train.sh", config_file, "train.steps=3", "eval.final_samples=2")
    env = {"PHI3V_STAGE": str(local), "PHI3V_VENV": sys.prefix}
    job = slurm.sbatch(*words, env=env)
    slurm.wait(job, "COMPLETED", timeout_s=240)
    nodes = slurm.job(job)["NodeList"]
    assert nodes == "node[1-2]"
    listed = [slurm.on(node, "ls", str(local)).split() for node in ("node1", "node2")]
    assert listed[0] == listed[1] and len(listed[0]) == 4  # three shards and the lock
    assert not local.exists() or not list(local.iterdir())  # nothing where no node is
    assert f"each node copies the shards to {local}" in slurm.output(job)
    again = slurm.sbatch(*words, "run.name=again", env=env)
    slurm.wait(again, "COMPLETED", timeout_s=240)
    for node in ("node1", "node2"):
        log = next((config_file.parent / "runs" / "again" / "logs").glob(f"{node}.log")).read_text()
        assert "already: nothing to do" in log


@pytest.mark.slow
def test_a_notice_while_shards_are_copied_ends_that_and_the_job_comes_back(slurm, config_file, shards) -> None:
    local = slurm.folder / "local" / "shards"
    one = shards / "train-000.tar"
    name = ShardCache(local, 1, local_shards=True).path(str(one), one.stat().st_size, one.stat().st_mtime_ns).name
    on_node1 = slurm.folder / "nodes" / "node1" / "local" / "shards"
    on_node1.mkdir()
    with (on_node1 / f"{name}.partial").open("w") as copy:
        fcntl.flock(copy, fcntl.LOCK_EX)  # as if another process were at it
        env = {"PHI3V_STAGE": str(local), "PHI3V_VENV": sys.prefix}
        job = slurm.sbatch("--nodes=1", "slurm/train.sh", config_file, env=env)
        log = config_file.parent / "runs" / "run" / "logs" / "node1.log"
        slurm.until("staging began", lambda: log.exists() and " to copy, " in log.read_text(), 180, job)
        slurm.signal(job, "USR1")
        slurm.wait_for_output(job, "queued again", timeout_s=240)
        slurm.until("the job is back in the queue", lambda: int(slurm.job(job)["Restarts"]) == 1, 60, job)
        assert "another call goes on" in log.read_text()
    slurm.cancel(job)
