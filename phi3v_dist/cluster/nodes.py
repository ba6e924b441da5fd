"""The nodes of an allocation → those to train on, or the reason why not.

What comes in: what the doctor found on each node, and how earlier starts ended. What goes out: a `Choice`. Surprise: a
node that passes every test is left out all the same when two of the last ten starts ended because of it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from phi3v_dist.cluster import starts
from phi3v_dist.cluster.starts import Start
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.survive.goodput import costs_of
from phi3v_dist.survive.interval import about

TRAIN, REQUEUE, STOP, WAIT = "train", "requeue", "stop", "wait"
MAX_WAITS = 5  # in a row, before what is wrong on all nodes ends the job


@dataclass(frozen=True)
class Choice:
    """action: TRAIN on `use`; REQUEUE without `bad`; STOP because of `why`. bad: host → what is wrong with it."""

    action: str
    use: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    why: str = ""


def choose(hosts: list[str], unfit: dict[str, str], past: list[Start], wanted: int, least: int) -> Choice:
    """Which of these hosts train.

    Args:
        hosts: of the allocation, in its order, so that neighbours in the network stay neighbours.
        unfit: host → what the doctor found.
        wanted: nodes to train on; those beyond are spares. least: with fewer than these it is better to wait.
    """
    blamed = {host: n for host, n in starts.to_blame(past).items() if n >= starts.MAX_BLAMED}
    bad = {host: f"{n} of the last starts ended because of it" for host, n in blamed.items()} | unfit
    good = [host for host in hosts if host not in bad]
    bad = {host: why for host, why in bad.items() if host in hosts}
    if len(good) >= min(wanted, least):
        return Choice(TRAIN, good[:wanted], bad)
    why = f"{len(good)} of {len(hosts)} nodes are fit, and at least {least} are wanted"
    return Choice(REQUEUE, [], bad, why)


def common_problem(waited: int, has_trained: bool) -> str:
    """What is wrong on all nodes may be an outage of a file server where all was well before: STOP or WAIT.

    waited: how often in a row the job has waited for it. has_trained: this run has made a step, or this job a start.
    """
    return WAIT if has_trained and waited < MAX_WAITS else STOP


def suspected(past: list[Start], job: str) -> dict[str, str]:
    """Host → why it should not run the batch script, going by starts that Slurm ended together with theirs."""
    found = starts.suspects(past, job)
    return {host: f"{n} of the last starts were lost with their batch script on it" for host, n in found.items()}


def in_time(choice: Choice, run: Path, left_s: float | None, is_first: bool) -> Choice:
    """The same, unless the job ends before a start, one step and its save are done, going by earlier starts.

    left_s: until Slurm ends the job, None without a limit. is_first: of the job's present life, so that queueing it
    again would not give it more time.
    """
    try:
        costs = costs_of(run)
    except (ConfigError, DataError):
        return choice  # nothing is known yet
    needed_s = costs.restart_s + costs.step_s + costs.blocked_s + costs.write_s
    if left_s is None or left_s >= needed_s:
        return choice
    why = f"a start, a step and its save take {about(needed_s)}, and the job has {about(left_s)} left"
    if is_first:
        return Choice(STOP, why=f"{why}: ask for more (sbatch --time)")
    return Choice(REQUEUE, bad=choice.bad, why=why)
