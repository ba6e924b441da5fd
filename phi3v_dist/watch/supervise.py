"""A launch command → the same, started again in place after a crash or a hang.

What comes in: the command that trains, and its run folder. What goes out: its exit code, once there is nothing more to
try. Surprise: the launchers' exit codes are of little use (torchrun answers 1 to everything), so how an attempt ended
is read from what its ranks and watchers left in `RUN/attempts/`.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from phi3v_dist.attempt.attempt import ATTEMPTS_NAME, SUMMARY_NAME
from phi3v_dist.attempt.requests import STOP_NAME
from phi3v_dist.errors import ConfigError, CrashLoopError
from phi3v_dist.watch import processes
from phi3v_dist.watch.attempts import STOPPED, best_step, read_attempts
from phi3v_dist.watch.beat_file import is_watched
from phi3v_dist.watch.checkpoint_names import goes_on, newest_checkpoint
from phi3v_dist.watch.endings import LAST_WORD_NAME, MAX_WITHOUT_STEP, Ending, how_it_ended
from phi3v_dist.watch.heartbeat import LAST_WORD_VARIABLE
from phi3v_dist.watch.node_report import read_reports

FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 300.0
LEFTOVER_S = 10.0  # for processes of the last attempt to end by themselves
REPORT_S = 30.0  # for the watcher to write what it saw, after the last rank is gone
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

log = logging.getLogger(__name__)


class Supervisor:
    """first_wait_s: before the first restart; twice as long before each further one that follows no new step."""

    def __init__(self, command: Sequence[str], run: Path, restarts: int, first_wait_s: float = FIRST_WAIT_S):
        self.command, self.run, self.restarts, self.first_wait_s = list(command), run, restarts, first_wait_s
        self._launcher: subprocess.Popen[bytes] | None = None
        self._asked_to_stop = False

    def supervise(self) -> int:
        """The exit code of the last start.

        Raises:
            ConfigError: the command cannot be started, or does not train in the run folder.
            CrashLoopError: three starts in a row without a new step.
        """
        if shutil.which(self.command[0]) is None:
            raise ConfigError(f"{self.command[0]} cannot be started: there is no such program, or it may not be run")
        for number in FORWARDED:
            signal.signal(number, self._forward)
        without_step, num_restarts, best = 0, 0, best_step(self.run)
        while True:
            ending = self._start_once()
            if not ending.again or self._asked_to_stop:
                log.info("%s", ending.why)
                return ending.exit_code
            reached = best_step(self.run)
            without_step = 0 if reached > best else without_step + 1
            best = max(best, reached)
            log.warning("%s", ending.why)
            if without_step >= MAX_WITHOUT_STEP:
                raise CrashLoopError(
                    f"{MAX_WITHOUT_STEP} starts in a row of {self.run} ended without a new step, at step {best}. The "
                    f"last one: {ending.why}"
                )
            if num_restarts >= self.restarts:
                log.warning("%d restarts are used up (--restarts)", self.restarts)
                return ending.exit_code
            num_restarts += 1
            self._wait(without_step)
            if self._asked_to_stop:
                return 0
            again = goes_on(newest_checkpoint(self.run))
            log.warning("start %d of at most %d: %s", num_restarts + 1, self.restarts + 1, again)

    def _start_once(self) -> Ending:
        before = {attempt.number for attempt in read_attempts(self.run)}
        last_word = self.run / ATTEMPTS_NAME / LAST_WORD_NAME
        last_word.parent.mkdir(parents=True, exist_ok=True)
        last_word.unlink(missing_ok=True)
        env = os.environ | {LAST_WORD_VARIABLE: str(last_word.absolute())}
        try:
            self._launcher = subprocess.Popen(self.command, env=env, start_new_session=True)
        except OSError as error:
            self._remove_if_empty()
            raise ConfigError(f"{self.command[0]} cannot be started: {error}") from error
        code = self._launcher.wait()
        self._end_leftovers()
        self._hear_watchers(before)
        new = [attempt for attempt in read_attempts(self.run) if attempt.number not in before]
        said = json.loads(last_word.read_text()) if last_word.is_file() else {}
        last_word.unlink(missing_ok=True)
        if new:
            return how_it_ended(new[-1], said, code)
        self._remove_if_empty()
        return self._without_attempt(said, code)

    def _without_attempt(self, said: dict[str, object], code: int) -> Ending:
        """Nothing new is in the run folder. Raises ConfigError when the command ended well, and did nothing there."""
        nowhere = f"no attempt was made in {self.run}: does the command train there (run.root and run.name)?"
        if code != 0:
            ending = how_it_ended(None, said, code)
            return replace(ending, why=f"{ending.why}\n{nowhere}") if ending.again else ending
        was_stopped = self._asked_to_stop or said.get("outcome") == STOPPED
        if not was_stopped and not (self.run / SUMMARY_NAME).is_file():
            raise ConfigError(f"{self.command[0]} ended with 0, but {nowhere}")
        return how_it_ended(None, said, code)

    def _remove_if_empty(self) -> None:
        """What was made for rank 0's last word, where nobody else has made anything."""
        for folder in (self.run / ATTEMPTS_NAME, self.run):
            with contextlib.suppress(OSError):  # it is not empty, or is gone
                folder.rmdir()

    def _hear_watchers(self, before: set[int]) -> None:
        """Without a launcher in between, the command ends before the watcher has seen that."""
        deadline_s = time.monotonic() + REPORT_S
        new = [attempt for attempt in read_attempts(self.run) if attempt.number not in before]
        while time.monotonic() < deadline_s and any(is_watched(one.folder, host) for one in new for host in one.hosts):
            time.sleep(0.1)

    def _wait(self, without_step: int) -> None:
        seconds = min(LONGEST_WAIT_S, self.first_wait_s * 2**without_step)
        log.warning("starting again in %.0f s", seconds)
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s and not self._asked_to_stop:
            time.sleep(0.1)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """To the ranks alone: launchers answer a signal by killing them."""
        first, self._asked_to_stop = not self._asked_to_stop, True
        if self._launcher is None or self._launcher.poll() is not None:
            return
        ranks = self._ranks()
        if len(self._hosts()) > 1:
            (self.run / STOP_NAME).touch()  # the way to ranks on other nodes
        if not first or not ranks:  # asked again, or too early: the launcher knows better
            os.killpg(self._launcher.pid, number)
        for pid in ranks if first else ():
            os.kill(pid, number)

    def _hosts(self) -> list[str]:
        attempts = read_attempts(self.run)
        return attempts[-1].hosts if attempts else []

    def _ranks(self) -> list[int]:
        """Ranks of this node that live, of the newest attempt."""
        attempts = read_attempts(self.run)
        reports = read_reports(attempts[-1].folder) if attempts else []
        ranks = [rank for report in reports for rank in report.ranks]
        return [rank.pid for rank in ranks if processes.is_alive(rank.pid, rank.started)]

    def _end_leftovers(self) -> None:
        """No process of the last attempt may still write when the next one starts; ranks have sessions of their own."""
        deadline_s = time.monotonic() + LEFTOVER_S
        while (left := self._ranks()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        for pid in left:
            log.warning("process %d of the last attempt had not ended and was killed", pid)
            os.kill(pid, signal.SIGKILL)
        while self._ranks():
            time.sleep(0.1)
