"""One start of a run: its number, its folder `RUN/attempts/NNNN/`, and the right to train in the run folder.

What comes in: a run folder and the ranks. What goes out: an `Attempt` that every rank knows, or an error that names the
job which trains there. Surprise: there is no lock file. Numbers are drawn by making a folder, which one process in the
world can do; an attempt may train once all earlier ones have ended; and who finds one that died without a word ends it
by writing `ended.json` into its folder, which is how a zombie learns that it is one.
"""

import json
import logging
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from phi3v_dist.attempt import owner
from phi3v_dist.attempt.owner import Owner, read_owner, show_life, write_owner
from phi3v_dist.errors import InUseError, LaunchError, Phi3VError
from phi3v_dist.observe.tracker import last_attempt
from phi3v_dist.survive import fence
from phi3v_dist.survive.durable import write_durably

if TYPE_CHECKING:
    import phi3v_dist.parallel.topology  # named in a string below: it loads torch, and signals must be heard before

ATTEMPTS_NAME, ENDED_NAME = "attempts", "ended.json"
STOPPED_NAME, SUMMARY_NAME = "stopped.json", "summary.json"  # of a run that is to go on, of one that is finished
HOSTS_SAID = 8


@dataclass(frozen=True)
class Attempt:
    """number: from 1, of all starts of the run."""

    number: int
    folder: Path
    is_main: bool = True
    _ended: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    @classmethod
    def begin(cls, run_folder: Path, topology: "phi3v_dist.parallel.topology.Topology") -> "Attempt":
        """Take the run folder for these ranks. Collective.

        Raises:
            InUseError: another job trains there; on every rank.
            LaunchError: the owner of an earlier attempt cannot be read, or a variable is not a number; on every rank.
        """
        hosts = topology.gather(topology.host)
        attempt, by, failed = None, "", None
        if topology.is_main:
            try:
                attempt, by = _begin(run_folder, hosts)
            except Phi3VError as error:
                failed = type(error), error.problems
        number, by, failed = topology.broadcast((attempt.number if attempt else 0, by, failed))
        if failed:
            kind, problems = failed
            raise kind(problems)
        if topology.local_rank == 0:  # once in the log of each node; other ranks than 0 show warnings alone
            level, where = logging.INFO if topology.is_main else logging.WARNING, list(dict.fromkeys(hosts))
            owner.log.log(
                level, "attempt %d of %s: %s; %d rank%s on %s%s", number, run_folder, by, len(hosts),
                "s" * (len(hosts) > 1), ", ".join(where[:HOSTS_SAID]), " …" * (len(where) > HOSTS_SAID),
            )  # fmt: skip
        return attempt or cls(number, folder_of(run_folder, number), is_main=False)

    def lost_to(self) -> str | None:
        """Who has taken the run over from us; None while it is ours. Rank 0 looks, once a step."""
        path = self.folder / ENDED_NAME
        if not self.is_main:
            return None
        return str(json.loads(path.read_text())["by"]) if path.exists() else None

    def end(self) -> None:
        """Give the run folder back."""
        self._ended.set()
        try:
            if self.is_main and not self.lost_to():
                _mark_ended(self.folder, "itself")
        except OSError as error:  # a full disk, say: it must not hide why the run ends
            owner.log.warning("%s could not be marked as ended: %s", self.folder, error)


def folder_of(run_folder: Path, number: int) -> Path:
    return run_folder / ATTEMPTS_NAME / f"{number:04d}"


def folders(run_folder: Path) -> list[Path]:
    """Of all attempts so far, oldest first."""
    found = (run_folder / ATTEMPTS_NAME).glob("[0-9]*")
    return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))


def _begin(run_folder: Path, hosts: list[str]) -> tuple[Attempt, str]:
    """The attempt, and who makes it."""
    ours = Owner.of_this_process(attempt=0)  # first of all, since it may find the environment wrong
    (run_folder / ATTEMPTS_NAME).mkdir(parents=True, exist_ok=True)
    attempt = _draw(run_folder)
    ours = replace(ours, attempt=attempt.number)
    facts = {
        "world_size": len(hosts), "hosts": list(dict.fromkeys(hosts)), "command": sys.argv,
        "start_s": round(time.time() - psutil.Process().create_time(), 1),
    }  # fmt: skip
    write_owner(attempt.folder, ours, **facts)
    alive = show_life(attempt.folder, attempt._ended)
    try:
        for earlier in folders(run_folder):
            if int(earlier.name) < attempt.number and not (earlier / ENDED_NAME).exists():
                _require_gone(run_folder, earlier, ours)
    except LaunchError:
        attempt._ended.set()
        alive.join()
        shutil.rmtree(attempt.folder)
        raise
    for marker in (STOPPED_NAME, SUMMARY_NAME):  # from now on it is neither stopped nor finished
        (run_folder / marker).unlink(missing_ok=True)
    return attempt, ours.who


def _draw(run_folder: Path) -> Attempt:
    """Above every number that anything in the run folder knows: parts of it may be copies, or have been removed."""
    known = last_attempt(run_folder), fence.newest(run_folder / "checkpoints")
    number = max([*known, *(int(path.name) for path in folders(run_folder))])
    while True:
        number += 1
        try:
            folder_of(run_folder, number).mkdir()
            return Attempt(number, folder_of(run_folder, number))
        except FileExistsError:
            continue  # another start was faster: the next number


def _require_gone(run_folder: Path, earlier: Path, ours: Owner) -> None:
    """An attempt that has not said that it ended: end it, or raise InUseError because it lives."""
    other = _owner_of(earlier)
    why = other.why_gone(earlier, ours) if other else "it died before it said who it is"
    if why is None:
        stop = run_folder / "STOP"
        raise InUseError(
            f"{run_folder} is in use by {other}. Stop it first (touch {stop}), wait for it, or give this run another "
            "`run.name`"
        )
    if earlier.exists():  # a start that was refused removes its folder
        owner.log.warning("%s ended without a word: %s", other or earlier, why)
        _mark_ended(earlier, f"{ours}, because {why}")


def _owner_of(folder: Path) -> Owner | None:
    """Whoever has just made a folder says in a moment who it is."""
    deadline_s = time.monotonic() + owner.WATCH_S
    while (found := read_owner(folder)) is None and folder.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return found


def _mark_ended(folder: Path, by: str) -> None:
    write_durably(folder / ENDED_NAME, json.dumps({"by": by, "unix_s": round(time.time(), 3)}) + "\n")
