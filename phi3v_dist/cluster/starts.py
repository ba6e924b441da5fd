"""Every start of a run under Slurm ↔ `RUN/starts.jsonl`: on which nodes, from which step, and how it ended.

What comes in: what launch/job.py decides. What goes out: `Start`s, oldest first. Surprise: a start may have no end. Its
batch script was ended with it: the node that runs it was lost, or the job was preempted or requeued in haste.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTS_NAME = "starts.jsonl"
LOOKS_BACK = 10  # starts: what a node did longer ago is forgotten
MAX_BLAMED = 2  # starts that ended because of a node, after which it is left out

MAX_NOTICES = 10  # in a row that end a start before a new step: the time limit is too short

DONE, REQUEUE, AGAIN, STOP = "done", "requeue", "again", "stop"


@dataclass(frozen=True)
class Life:
    """Which start: restart counts how often Slurm has started the job anew, number the starts within that."""

    job: str
    restart: int
    number: int

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}.{self.number}"


@dataclass(frozen=True)
class End:
    """What the batch script did next (DONE, REQUEUE, AGAIN, STOP), why, and the furthest step of the run by then."""

    action: str
    why: str
    exit_code: int
    step: int
    blamed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """step: the furthest of the run when it began; unix_s: for people. end: None if nobody was left to say it."""

    life: Life
    nodes: list[str]
    step: int
    unix_s: float
    end: End | None = None


def begin(run: Path, life: Life, nodes: list[str], step: int) -> None:
    _append(run, {"start": {**asdict(life), "nodes": nodes, "step": step, "unix_s": round(time.time(), 1)}})


def end(run: Path, life: Life, ending: End) -> None:
    _append(run, {"end": {**asdict(life), **asdict(ending), "unix_s": round(time.time(), 1)}})


def read(run: Path) -> list[Start]:
    """Oldest first. Lines that a kill left unfinished, or that somebody changed, are passed over."""
    found: dict[Life, Start] = {}
    path = run / STARTS_NAME
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            kind, tree = next(iter(json.loads(line).items()))
            life = Life(str(tree["job"]), int(tree["restart"]), int(tree["number"]))
            if kind == "start":
                nodes = [str(node) for node in tree["nodes"]]
                found[life] = Start(life, nodes, int(tree["step"]), float(tree["unix_s"]))
            elif kind == "end" and life in found:
                ending = End(
                    str(tree["action"]), str(tree["why"]), int(tree["exit_code"]), int(tree["step"]),
                    [str(host) for host in tree["blamed"]],
                )  # fmt: skip
                found[life] = Start(**{**found[life].__dict__, "end": ending})
        except (ValueError, KeyError, TypeError, StopIteration, AttributeError):
            continue
    return list(found.values())


def without_step(starts: list[Start], job: str, action: str) -> int:
    """How many of the last starts of this job ended so, one after another, and none with a new step.

    One that Slurm ended, with its batch script, tells nothing and is passed over.
    """
    count = 0
    for start in reversed([one for one in starts if one.life.job == job and one.end]):
        assert start.end is not None
        if start.end.step > start.step or start.end.action != action:
            break
        count += 1
    return count


def to_blame(starts: list[Start]) -> dict[str, int]:
    """By host, how many of the last starts ended because of it."""
    ended = [start.end for start in starts if start.end][-LOOKS_BACK:]
    return dict(Counter(host for ending in ended for host in set(ending.blamed)))


def _append(run: Path, row: dict[str, Any]) -> None:
    with (run / STARTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
