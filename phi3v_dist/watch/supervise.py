"""A launch command → the same, started again in place after a crash or a hang.

What comes in: the command that trains, and its run folder. What goes out: its exit code, once there is nothing more to
try. Surprise: the launchers' exit codes are of little use (torchrun answers 1 to everything), so how an attempt ended
is read from what its ranks and watchers left in `RUN/attempts/`.
"""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from phi3v_dist.attempt.requests import STOP_NAME
from phi3v_dist.errors import CheckpointError, ConfigError, CrashLoopError, DataError
from phi3v_dist.watch import processes
from phi3v_dist.watch.attempts import FINISHED, STOPPED, PastAttempt, best_step, read_attempts
from phi3v_dist.watch.checkpoint_names import goes_on, newest_checkpoint
from phi3v_dist.watch.heartbeat import LAST_WORD_VARIABLE
from phi3v_dist.watch.node_report import DIED, HANG, read_reports

HOPELESS = {error.exit_code: error.kind for error in (ConfigError, DataError, CheckpointError)}
MAX_WITHOUT_STEP = 3
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 300.0
LEFTOVER_S = 10.0  # for processes of the last attempt to end by themselves
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAST_WORD_NAME = "last-word.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ending:
    """How one start ended. again: whether another one may help; why: for people."""

    again: bool
    why: str
    exit_code: int = 1


class Supervisor:
    """first_wait_s: before the first restart; twice as long before each further one that follows no new step."""

    def __init__(self, command: Sequence[str], run: Path, restarts: int, first_wait_s: float = FIRST_WAIT_S):
        self.command, self.run, self.restarts, self.first_wait_s = list(command), run, restarts, first_wait_s
        self._launcher: subprocess.Popen[bytes] | None = None
        self._asked_to_stop = False

    def supervise(self) -> int:
        """The exit code of the last start.

        Raises:
            CrashLoopError: three starts in a row without a new step.
        """
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

    def _start_once(self) -> _Ending:
        before = {attempt.number for attempt in read_attempts(self.run)}
        last_word = self.run / "attempts" / LAST_WORD_NAME
        last_word.parent.mkdir(parents=True, exist_ok=True)
        last_word.unlink(missing_ok=True)
        env = os.environ | {LAST_WORD_VARIABLE: str(last_word.absolute())}
        try:
            self._launcher = subprocess.Popen(self.command, env=env, start_new_session=True)
        except OSError as error:
            raise ConfigError(f"{self.command[0]} cannot be started: {error}") from error
        code = self._launcher.wait()
        self._end_leftovers()
        new = [attempt for attempt in read_attempts(self.run) if attempt.number not in before]
        said = json.loads(last_word.read_text()) if last_word.is_file() else {}
        last_word.unlink(missing_ok=True)
        return _how_it_ended(new[-1] if new else None, said, code)

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


def _how_it_ended(attempt: PastAttempt | None, said: dict[str, object], code: int) -> _Ending:
    """said: rank 0's own last word, which also comes when it ends before there is an attempt."""
    said_code = int(str(said.get("exit_code", 0)))
    if code == 0:
        return _Ending(False, "finished, or stopped cleanly", 0)
    if attempt is not None and attempt.ending in (FINISHED, STOPPED):
        return _Ending(False, f"{attempt.ending}, although the launcher says {code}", 0)
    failed = (attempt.exit_code if attempt else 0) or said_code or code
    was_ended = attempt is not None and attempt.ending in (DIED, HANG)  # whatever others said for want of that rank
    if failed in HOPELESS and not was_ended:
        return _Ending(False, f"not started again: another start would not mend this {HOPELESS[failed]} error", failed)
    if attempt is not None and attempt.verdict and attempt.verdict.verdict:
        return _Ending(True, "\n".join(attempt.verdict.verdict.lines), failed)
    message = str(said.get("message", "")) or f"the launcher ended with {code} and no rank said why"
    return _Ending(True, message, failed)
