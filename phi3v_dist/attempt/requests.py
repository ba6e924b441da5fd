"""Notices and wishes from outside → one decision of all ranks at a step's edge.

What comes in: SIGTERM, SIGUSR1 (preemption), the end of the job's time, SIGINT (Ctrl-C), the files `RUN/STOP`,
`RUN/SAVE` and `RUN/PROFILE`. What goes out: `agreed()`, the same answer on every rank, so that all stop or save after
the same step. A clean stop leaves `RUN/stopped.json` and exits 0.

Surprise: a signal only sets a flag, except before the first step. Until then there is nothing to save, and the process
may sit in a wait that no flag ends, so a thread that the signal wakes ends it there and then, also with 0.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from phi3v_dist.attempt.attempt import STOPPED_NAME, Attempt
from phi3v_dist.attempt.time_limit import WHY, TimeLimit
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.watch import heartbeat

NOTICES = (signal.SIGTERM, signal.SIGUSR1)  # somebody is going to kill this job
STOP_NAME, SAVE_NAME, PROFILE_NAME = "STOP", "SAVE", "PROFILE"
LOOK_S, OTHERS_LOOK_S = 1.0, 15.0  # between looks for the files, of rank 0 and of the others, of which there are many

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What any rank was asked for.

    left_s: until the kill that was announced or the end of the job's time, infinite if there is neither. by_hand:
    whether a person wants the save.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False
    lost: bool = False
    left_s: float = math.inf
    by_hand: bool = False


class Requests:
    """What this process has been asked. Listen early: until then a signal kills."""

    def __init__(self, limit: TimeLimit | None = None) -> None:
        self.why = ""
        self.limit = limit or TimeLimit()
        self.folder: Path | None = None
        self.attempt: Attempt | None = None
        self.profile = False  # somebody wants one: the same on all ranks, until `profile_taken`
        self._stop = self._save = self._profile = False
        self._profile_stays = False  # the file cannot be removed, so it is heard of once
        self._grace_s = 0.0
        self._noticed_s = math.inf  # on this host's monotonic clock
        self._come_back = self._rest = self._time_is_up = False  # who asks for a stop: cluster, person, clock; any rank
        self._looked_s = -OTHERS_LOOK_S
        self._training = False

    @classmethod
    def listen(cls) -> "Requests":
        """Take the signals over, from the main thread. Before the first step they end the process at once: with 0 when
        the run folder is ours and a marker says so, else as if nobody listened.

        Raises:
            LaunchError: `PHI3V_TIME_LEFT_S` is not a number.
        """
        requests = cls(TimeLimit.of_job())
        for number in (*NOTICES, signal.SIGINT):
            signal.signal(number, requests._heard)
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        threading.Thread(target=requests._leave_early, args=(readable,), name="signals", daemon=True).start()
        return requests

    def opened(self, folder: Path, attempt: Attempt, grace_s: float) -> None:
        """The run folder is ours: look for files in it, and give it back when a signal comes before the first step.

        grace_s: between a notice and the kill.
        """
        self.folder, self.attempt, self._grace_s = folder, attempt, grace_s

    def training_begins(self) -> None:
        """From now on there is something to save: signals only set a flag."""
        self._training = True

    def heard(self) -> bool:
        """Whether this rank alone has been asked to stop; for long work between two step edges."""
        self._look()
        return self._stop

    def agreed(self, topology: Any, save: bool = False, busy: bool = False, lost: bool = False) -> Asked:
        """Everyone's wishes as one. Collective, once for each step edge.

        Args:
            save: this rank would save now; busy: its last save is still being written; lost: the run is no longer ours.
        """
        self._look()
        left_s = min(self._noticed_s + self._grace_s - time.monotonic(), self.limit.left_s())
        ours = [self._come_back, self._rest, self._time_is_up]
        mine = [self._stop, self._save or save, busy, lost, -left_s, self._save, self._profile, *ours]
        everyones = topology.max([float(value) for value in mine])
        stop, wants_save, is_busy, is_lost, least_s, by_hand, wants_profile, *all_of_us = everyones
        self._come_back, self._rest, self._time_is_up = (value > 0 for value in all_of_us)
        self.profile = self.profile or wants_profile > 0
        if self._time_is_up and not self.why:
            self.why = WHY
            if self.attempt is not None and self.attempt.is_main:
                log.warning("%.0f s are left of %s: stopping to save", -least_s, WHY)
        return Asked(stop > 0, wants_save > 0, is_busy > 0, is_lost > 0, -least_s, by_hand > 0)

    def saved(self) -> None:
        """A save has been begun: nobody waits for one any more."""
        self._save = False
        self._remove(SAVE_NAME)

    @property
    def profile_path(self) -> Path:
        """The file that asks for a profile, and may say what of."""
        assert self.folder is not None
        return self.folder / PROFILE_NAME

    def profile_taken(self) -> None:
        """A profile is being made, or what was asked for cannot be. On all ranks."""
        self.profile = self._profile = False
        if self.attempt is None or not self.attempt.is_main:
            return
        try:
            self._remove(PROFILE_NAME)
        except OSError as error:
            self._profile_stays = True
            log.warning("%s cannot be removed (%s), and is not looked at again", self.profile_path, error)

    def forget(self) -> None:
        """The run is finished: what was still asked of it is void."""
        self._remove(STOP_NAME)
        self._remove(SAVE_NAME)
        self.profile_taken()

    def stopped(self, step: int, why: str) -> None:
        """Leave the marker of a clean stop. Its `notice`: the cluster asked for it and no person did, so the run should
        go on as soon as it may."""
        assert self.folder is not None and self.attempt is not None
        if not self.attempt.is_main:
            return
        notice = self._come_back and not self._rest
        facts = {"step": step, "why": why, "notice": notice, "attempt": self.attempt.number}
        write_durably(self.folder / STOPPED_NAME, json.dumps(facts) + "\n")
        self._remove(STOP_NAME)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop:
            raise KeyboardInterrupt
        self._asked_by(number)
        self._stop, self.why = True, self.why or signal.Signals(number).name

    def _asked_by(self, number: int) -> None:
        if number in NOTICES:
            self._come_back, self._noticed_s = True, min(self._noticed_s, time.monotonic())
        else:
            self._rest = True

    def _look(self) -> None:
        now = time.monotonic()
        if self.folder is None or self.attempt is None:
            return
        if not self._stop and self.limit.is_near(self._grace_s):
            self._stop = self._come_back = self._time_is_up = True
        if now - self._looked_s < (LOOK_S if self.attempt.is_main else OTHERS_LOOK_S):
            return
        self._looked_s = now
        if (self.folder / STOP_NAME).exists():
            self._stop, self._rest, self.why = True, True, self.why or str(self.folder / STOP_NAME)
        self._save = self._save or (self.folder / SAVE_NAME).exists()
        if self.attempt.is_main and not self._profile_stays:  # the only one that reads it
            self._profile = self.profile_path.exists()

    def _remove(self, name: str) -> None:
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)

    def _leave_early(self, readable: int) -> None:
        """Woken by the operating system, also while the main thread sits in code that Python cannot interrupt."""
        while number := os.read(readable, 1)[0]:
            if self._training or number not in (*NOTICES, signal.SIGINT):
                continue
            why = signal.Signals(number).name
            log.warning("%s before the first step: stopped, nothing to save", why)
            self._asked_by(number)
            if self.folder is not None and self.attempt is not None:
                self.stopped(newest_step(self.folder), why)
                self.attempt.end()
            heartbeat.close("stopped", why)
            sys.stdout.flush()
            os._exit(0 if self.attempt is not None else 128 + number)


def newest_step(run_folder: Path) -> int:
    """Of the checkpoints that are there by name; 0 if none is."""
    names = (path.name.removeprefix("step-") for path in (run_folder / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)
