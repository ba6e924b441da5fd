"""Every start of a run under Slurm ↔ `RUN/starts.jsonl`: on which nodes, from which step, and how it ended.

What comes in: what launch/job.py decides. What goes out: `Start`s, oldest first. Surprise: a start may have no end. Its
batch script was ended with it: the node that runs it was lost, or the job was preempted or requeued in haste.
"""

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTS_NAME = "starts.jsonl"
LOOKS_BACK = 10  # starts: what a node did longer ago is forgotten
MAX_BLAMED = 2  # starts that ended because of a node, after which it is left out
MAX_NOTICES = 10  # in a row that end a start before a new step: the time limit is too short
MAX_UNENDED = 10  # starts since the last new step that Slurm ended together with their batch script

DONE, REQUEUE, AGAIN, STOP = "done", "requeue", "again", "stop"

log = logging.getLogger(__name__)


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
    """What the batch script did next (DONE, REQUEUE, AGAIN, STOP), why, and the furthest step of the run by then.

    blamed: hosts; ranks: by blamed host, those that died or hung there, none where the host fell silent.
    """

    action: str
    why: str
    exit_code: int
    step: int
    blamed: list[str] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """step: the furthest of the run when it began; unix_s: for people. end: None if nobody was left to say it."""

    life: Life
    nodes: list[str]
    step: int
    unix_s: float
    end: End | None = None


@dataclass(frozen=True)
class Exclusion:
    """Hosts without which the job was queued again, and earlier ones that it may have back."""

    life: Life
    hosts: list[str]
    forgiven: list[str]


def begin(run: Path, life: Life, nodes: list[str], step: int) -> None:
    _append(run, {"start": {**asdict(life), "nodes": nodes, "step": step, "unix_s": round(time.time(), 1)}})


def end(run: Path, life: Life, ending: End) -> None:
    _append(run, {"end": {**asdict(life), **asdict(ending), "unix_s": round(time.time(), 1)}})


def exclude(run: Path, life: Life, hosts: list[str], forgiven: list[str]) -> None:
    _append(run, {"excluded": {**asdict(life), "hosts": hosts, "forgiven": forgiven}})


def read(run: Path) -> list[Start]:
    """Oldest first. Lines that a kill left unfinished, or that somebody changed, are passed over."""
    return read_all(run)[0]


def read_all(run: Path) -> tuple[list[Start], list[Exclusion]]:
    """Oldest first; nothing where the file cannot be read."""
    found: dict[Life, Start] = {}
    exclusions = []
    for line in _lines(run):
        try:
            kind, tree = next(iter(json.loads(line).items()))
            life = Life(str(tree["job"]), int(tree["restart"]), int(tree["number"]))
            if kind == "excluded":
                hosts, forgiven = ([str(host) for host in tree[name]] for name in ("hosts", "forgiven"))
                exclusions.append(Exclusion(life, hosts, forgiven))
            elif kind == "start":
                nodes = [str(node) for node in tree["nodes"]]
                found[life] = Start(life, nodes, int(tree["step"]), float(tree["unix_s"]))
            elif kind == "end" and life in found:
                ending = End(
                    str(tree["action"]), str(tree["why"]), int(tree["exit_code"]), int(tree["step"]),
                    [str(host) for host in tree["blamed"]],
                    {str(host): [int(rank) for rank in ranks] for host, ranks in tree.get("ranks", {}).items()},
                )  # fmt: skip
                found[life] = Start(**{**found[life].__dict__, "end": ending})
        except (ValueError, KeyError, TypeError, StopIteration, AttributeError):
            continue
    return list(found.values()), exclusions


def without_step(starts: list[Start], job: str, action: str) -> int:
    """How many of the last starts of this job ended so, one after another, and none with a new step.

    One that Slurm ended, with its batch script, is passed over: `unended` counts those.
    """
    count = 0
    for start in reversed([one for one in starts if one.life.job == job and one.end]):
        assert start.end is not None
        if start.end.step > start.step or start.end.action != action:
            break
        count += 1
    return count


def unended(past: list[Start], job: str, step: int) -> int:
    """How many starts of this job, before its present one, Slurm ended with their batch script since the last new step.

    step: the furthest of the run by now.
    """
    return sum(start.life.job == job and start.end is None and start.step >= step for start in past)


def to_blame(starts: list[Start]) -> dict[str, int]:
    """By host, how many of the last starts ended because of it.

    A rank that failed on two hosts takes its trouble with it, in its data for example: neither is blamed for it.
    """
    ended = [start.end for start in starts if start.end][-LOOKS_BACK:]
    places: dict[int, set[str]] = defaultdict(set)
    for ending in ended:
        for host, ranks in ending.ranks.items():
            for rank in ranks:
                places[rank].add(host)
    moved = {rank for rank, hosts in places.items() if len(hosts) > 1}
    return dict(
        Counter(
            host
            for ending in ended
            for host in set(ending.blamed)
            if not ending.ranks.get(host) or not moved.issuperset(ending.ranks[host])
        )
    )


def suspects(past: list[Start], job: str) -> dict[str, int]:
    """By host, how many starts Slurm ended with the batch script that ran there, since one on it came to its end.

    Only where a start with another first node did come to its end: otherwise it is the cluster that ends them.

    Args:
        past: the starts before the present one.
        job: the present one. A start without an end of another job may still run, unless that has begun a later one.
    """
    newest = {start.life.job: start.life for start in past}
    over = [
        start
        for start in past
        if start.nodes and (start.end or start.life.job == job or newest[start.life.job] != start.life)
    ]
    counts: dict[str, int] = defaultdict(int)
    for start in over[-LOOKS_BACK:]:
        counts[start.nodes[0]] = 0 if start.end else counts[start.nodes[0]] + 1
    well = {start.nodes[0] for start in over[-LOOKS_BACK:] if start.end}
    return {host: count for host, count in counts.items() if count >= MAX_BLAMED and well - {host}}


def excluded(
    past: list[Start], exclusions: list[Exclusion], job: str, bad_now: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Hosts that this job does without at our word: those that are still bad, and those that it may have back.

    Slurm does not tell them from those that the user has excluded: all are in one option of the job.

    Args:
        bad_now: hosts that the job has again, which are neither.
    """
    mine = [one for one in exclusions if one.life.job == job]
    ages: dict[str, int] = {}
    for number, one in enumerate(mine):
        later = {other.life for other in mine[number + 1 :]}
        later |= {start.life for start in past if start.life.job == job and _is_after(start.life, one.life)}
        ages |= dict.fromkeys(one.hosts, len(later))
        for host in one.forgiven:
            ages.pop(host, None)
    blames = to_blame(past)
    hosts = [host for host in ages if host not in bad_now]
    bad = [host for host in hosts if ages[host] < LOOKS_BACK or blames.get(host, 0) >= MAX_BLAMED]
    return bad, [host for host in hosts if host not in bad]


def _is_after(life: Life, other: Life) -> bool:
    return (life.restart, life.number) > (other.restart, other.number)


def _lines(run: Path) -> list[str]:
    path = run / STARTS_NAME
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError as error:
        log.warning("%s cannot be read, so earlier starts are not known: %s", path, error)
        return []


def _append(run: Path, row: dict[str, Any]) -> None:
    """On a line of its own, also after one that a kill left unfinished. A failing disk costs the row, not the job."""
    path = run / STARTS_NAME
    try:
        run.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(torn + json.dumps(row).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be written, so this start will not be remembered: %s", path, error)
