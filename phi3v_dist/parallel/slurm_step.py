"""One task of Slurm's srun → which rank it is, where the ranks meet, and how many cores are its own.

What comes in: the variables that srun gives to each task. What goes out: numbers and names. Surprise: only those of the
step count, SLURM_STEP_… and SLURM_PROCID. The batch script and salloc's shell carry most of the others as well, with
values that are true for the job and wrong for the task.
"""

import re
from collections.abc import Mapping

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.hostlist import expand
from phi3v_dist.parallel.variables import number

FIRST_PORT, NUM_PORTS = 15000, 15000  # below those that Linux hands out by itself, from 32768 on
PORTS_OF_A_JOB = 101  # jobs that follow each other meet at other ports; without a common factor with NUM_PORTS
OWN_CORES = ("mask_cpu", "map_cpu", "cores", "threads", "rank")  # ways of binding a task; not sockets, none


def num_tasks(env: Mapping[str, str]) -> int:
    """Of this srun; 1 in a batch script, which has none."""
    return number(env, "SLURM_STEP_NUM_TASKS", default=1)


def is_rank(env: Mapping[str, str], rank: int, world_size: int) -> bool:
    """Whether the ranks are srun's tasks, rather than started by another launcher within one."""
    return world_size > 1 and num_tasks(env) == world_size and env.get("SLURM_PROCID") == str(rank)


def require_own_rank(env: Mapping[str, str]) -> None:
    """RANK given by hand in the batch script, where it is the same for every task, makes all of them rank 0."""
    launched = "GROUP_RANK" in env or "CROSS_RANK" in env  # set by torchrun, by deepspeed
    if launched or num_tasks(env) == 1 or env["RANK"] == env.get("SLURM_PROCID"):
        return
    raise LaunchError(
        f"RANK is {env['RANK']}, but Slurm says that this is task {env.get('SLURM_PROCID')} of {num_tasks(env)}: leave "
        "RANK, WORLD_SIZE and LOCAL_RANK out of the batch script, srun's own variables are enough"
    )


def tasks_on_this_node(env: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1" for nodes with 2, 2, 2 and 1 tasks → those of this node."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None:
        return num_tasks(env)
    groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group) for group in text.split(",")]
    counts = [int(group[1]) for group in groups if group for _ in range(int(group[2] or 1))]
    node = number(env, "SLURM_NODEID", default=0)
    if not all(groups) or sum(counts) != num_tasks(env) or node >= len(counts):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE is {text!r} on node {node}, which does not fit "
            f"SLURM_STEP_NUM_TASKS={num_tasks(env)}: check the srun line"
        )
    return counts[node]


def hosts(env: Mapping[str, str]) -> list[str]:
    """Slurm's names of the nodes of this srun; empty when they are not known.

    Raises:
        LaunchError: SLURM_STEP_NODELIST is not a list of hosts.
    """
    return expand(env.get("SLURM_STEP_NODELIST", ""))


def meeting_point(env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, the same on all tasks without a word between them; empty where Slurm says nothing.

    Rank 0 runs on the first node of the step. Each step of a job has another port, so that a second try does not meet
    who held the first one.

    Raises:
        LaunchError: the variables are not what srun sets.
    """
    names = hosts(env)
    if not names or "SLURM_JOB_ID" not in env:
        return {}
    job, step = number(env, "SLURM_JOB_ID"), number(env, "SLURM_STEP_ID", default=0)
    return {"MASTER_ADDR": names[0], "MASTER_PORT": str(FIRST_PORT + (job * PORTS_OF_A_JOB + step) % NUM_PORTS)}


def num_threads(env: Mapping[str, str], cores: int, ranks_here: int, is_task: bool) -> int:
    """How many threads this rank may keep busy.

    Args:
        cores: that the system lets this process use.
        ranks_here: that share them, unless Slurm has divided them already.
        is_task: this rank is a task of srun's.
    """
    if is_task:
        if per_task := number(env, "SLURM_CPUS_PER_TASK", default=0):
            return min(cores, per_task)
        if env.get("SLURM_CPU_BIND_TYPE", "").rstrip(":") in OWN_CORES:
            return cores
    return max(1, cores // ranks_here)
