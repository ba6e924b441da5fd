"""What srun says to a task → where the ranks meet, and how many threads each may keep busy."""

import pytest

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.slurm_step import FIRST_PORT, NUM_PORTS, is_rank, meeting_point, num_threads

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07-08],node11",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1",
}  # fmt: skip


def port(**changes: int) -> int:
    return int(meeting_point(STEP | {name: str(value) for name, value in changes.items()})["MASTER_PORT"])


def test_the_ranks_meet_on_the_first_node_of_the_step():
    assert meeting_point(STEP)["MASTER_ADDR"] == "node07"


@pytest.mark.fault(18)
def test_each_step_of_a_job_and_each_job_beside_it_meets_at_another_port_below_the_systems_own():
    ports = [port(SLURM_STEP_ID=step) for step in range(50)]
    ports += [port(SLURM_JOB_ID=4711 + job, SLURM_STEP_ID=step) for job in range(1, 50) for step in range(2)]
    assert len(set(ports)) == len(ports)
    ports += [port(SLURM_JOB_ID=4294967295, SLURM_STEP_ID=4294967290)]
    assert min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + NUM_PORTS < 32768


def test_where_slurm_says_nothing_nothing_is_made_up():
    assert meeting_point({}) == {} and meeting_point({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_STEP_NODELIST": "node[07-"}, "'node[07-' is not a list of hosts"),
        ({"SLURM_JOB_ID": "4711_2"}, "SLURM_JOB_ID is '4711_2'"),
        ({"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID is 'batch', which is not a whole number"),
    ],
)
def test_what_srun_would_not_say_is_refused(change, message):
    with pytest.raises(LaunchError) as caught:
        meeting_point(STEP | change)
    assert message in str(caught.value)


def test_ranks_of_another_launcher_inside_a_step_are_not_its_tasks():
    assert is_rank(STEP, 1, 3)
    assert not is_rank(STEP, 1, 8) and not is_rank(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, 0, 1) and not is_rank({}, 0, 2)


@pytest.mark.parametrize(
    ("env", "cores", "expected"),
    [
        ({}, 64, 16),  # nobody divided them
        ({"SLURM_CPUS_PER_TASK": "16"}, 16, 16),  # Slurm has
        ({"SLURM_CPUS_PER_TASK": "16"}, 8, 8),
        ({"SLURM_CPUS_PER_TASK": "12"}, 64, 12),  # it said how many, and bound nothing
        ({"SLURM_CPU_BIND_TYPE": "mask_cpu:"}, 16, 16),
        ({"SLURM_CPU_BIND_TYPE": "cores"}, 2, 2),
        ({"SLURM_CPU_BIND_TYPE": "none"}, 64, 16),
        ({"SLURM_CPU_BIND_TYPE": "sockets"}, 32, 8),  # which tasks share
        ({}, 2, 1),
    ],
)
def test_cores_that_slurm_gave_to_a_task_are_not_divided_again(env, cores, expected):
    assert num_threads(env, cores, ranks_here=4, is_task=True) == expected


def test_ranks_under_another_launcher_share_what_slurm_gave_to_it():
    env = {"SLURM_CPUS_PER_TASK": "16", "SLURM_CPU_BIND_TYPE": "mask_cpu:"}
    assert num_threads(env, cores=16, ranks_here=4, is_task=False) == 4
