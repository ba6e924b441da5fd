"""Who made an attempt, and whether that process still lives.

What comes in: facts about a process, from its attempt's `owner.json`. What goes out: a name for people, and why it is
gone. Surprise: no clock is compared. An owner on this machine is alive if its process is; one elsewhere is alive if a
counter that it renews moves while we watch.
"""

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import psutil

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.variables import host_name, number
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.watch import processes

OWNER_NAME, COUNTER_NAME = "owner.json", "alive"
START_VARIABLE = "PHI3V_START"  # set by slurm/train.sh, which begins a start when the one before has ended
RENEW_S = 5.0
WATCH_S = 60.0  # how long a foreign counter may stand still: a shared disk may stall for a while

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who made an attempt.

    job: Slurm's number; restart: how often it was requeued; start: of the starts within the job's present life, which
    follow each other, from 1; 0 if nobody counts them. machine: this boot and process namespace, within which a pid
    means something. pid_started: unix time, for the timeline. since: local time, for people.
    start_ticks: with the pid, which process this is (see processes.py); 0 in files of earlier releases.
    """

    attempt: int
    job: str
    restart: int
    host: str
    machine: str
    pid: int
    pid_started: float
    since: str
    token: str
    start: int = 0
    start_ticks: int = 0

    @classmethod
    def of_this_process(cls, attempt: int, env: Mapping[str, str] = os.environ) -> "Owner":
        """Raises LaunchError when SLURM_RESTART_COUNT or PHI3V_START is not a number."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            attempt=attempt, job=env.get("SLURM_JOB_ID", ""), restart=number(env, "SLURM_RESTART_COUNT", default=0),
            host=host_name(env),
            machine=f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}", pid=os.getpid(),
            pid_started=psutil.Process().create_time(),
            since=datetime.now(UTC).astimezone().isoformat(timespec="seconds"), token=secrets.token_hex(8),
            start=number(env, START_VARIABLE, default=0),
            start_ticks=processes.start_ticks(os.getpid()) or 0,
        )  # fmt: skip

    @property
    def who(self) -> str:
        """The Slurm job, and which of its lives and starts where there were several; else the process."""
        if not self.job:
            return f"process {self.pid}"
        restart = f", restart {self.restart}" if self.restart else ""
        return f"Slurm job {self.job}{restart}{f', start {self.start}' if self.start > 1 else ''}"

    def __str__(self) -> str:
        return f"attempt {self.attempt}, {self.who} on {self.host} since {self.since}"

    def why_gone(self, folder: Path, asker: "Owner") -> str | None:
        """Why this owner of an attempt's folder is certainly gone; None when it is alive. May watch for `WATCH_S`."""
        if self.machine == asker.machine:
            if self.start_ticks:
                alive = processes.is_alive(self.pid, self.start_ticks)
            else:  # an earlier release's: in doubt it lives
                alive = processes.start_ticks(self.pid) is not None
            return None if alive else f"process {self.pid} is gone"
        if self.job and self.job == asker.job and self.restart < asker.restart:
            return f"Slurm job {self.job} has been started again"
        same_life = self.job and (self.job, self.restart) == (asker.job, asker.restart)
        if same_life and 0 < self.start < asker.start:
            return f"Slurm job {self.job} has ended its start {self.start}"
        log.warning("waiting %.0f s to see whether %s is alive", WATCH_S, self)
        before, deadline_s = _count(folder), time.monotonic() + WATCH_S
        while time.monotonic() < deadline_s:
            time.sleep(RENEW_S / 5)
            if _count(folder) != before:
                return None
        return f"it has shown no life for {WATCH_S:.0f} s"


def write_owner(folder: Path, owner: Owner, **facts: object) -> None:
    """`facts`: whatever else a person would ask of this attempt."""
    write_durably(folder / OWNER_NAME, json.dumps(asdict(owner) | facts, indent=1) + "\n")


def read_owner(folder: Path) -> Owner | None:
    """None when the file is not there (yet). Raises LaunchError when it cannot be understood."""
    path = folder / OWNER_NAME
    try:
        facts = json.loads(path.read_text())
        known = {field.name: facts[field.name] for field in fields(Owner) if field.name in facts}
        return Owner(**known)  # those of earlier releases lack fields with a default
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LaunchError(f"{path} is damaged ({error!r}): if nobody trains there, remove {folder}") from error


def show_life(folder: Path, ended: threading.Event) -> threading.Thread:
    """Renew the counter until `ended`, from the thread that is returned; the time beside it is for the timeline."""

    def renew() -> None:
        count = 0
        while not ended.wait(RENEW_S if count else 0):
            count += 1
            with contextlib.suppress(OSError):  # a full disk: the saves say so, and a moment later there is room again
                (folder / COUNTER_NAME).write_text(f"{count} {time.time():.3f}")

    thread = threading.Thread(target=renew, name="alive", daemon=True)
    thread.start()
    return thread


def _count(folder: Path) -> str:
    try:
        return (folder / COUNTER_NAME).read_text()
    except OSError:
        return ""
