"""Where this process is: phase, step and what it works on, for whoever watches from outside.

What comes in: `enter("forward", step)` from every place where a run can be slow, die or hang. What goes out: a few
bytes in shared memory (beat_file.py). Surprise: like logging it is a property of the process, so these are functions of
a module and nothing has to be passed through; before `open` they do nothing but ask for injected faults.

Two lanes, since a checkpoint is written while training goes on: `TRAIN` is the main thread, `SAVE` the writer.

A phase hangs when nothing is heard for `hang_s`, and for `hang_factor` times the median between two signs of life in
that phase; this process computes the bound, and the watcher only reads it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from phi3v_dist.watch import faults
from phi3v_dist.watch.beat_file import BeatFile, Lane, stacks_path

TRAIN, SAVE = "train", "save"  # lanes
DONE, STOPPED, FAILED = "done", "stopped", "failed"  # outcomes
NEVER_HANGS, FOREVER_S = "idle", 1e9
READING = ("start", "load", "data", "evaluate")  # phases in which the main thread may wait for data
UNTIMED = ("start", "load", "score", "export", "finish", "flush")  # of unlike parts: none foretells the next
NUMBERED_APART = ("evaluate", "export")  # their steps are numbers of batches or files, not of optimizer steps
REMEMBERED = 65  # intervals per phase, whose median says what is usual
LAST_WORD_S = 5.0  # ranks other than 0 wait so long before they print why they fail: enough for rank 0 to print
LAST_WORD_VARIABLE = "PHI3V_LAST_WORD"  # a file for the supervisor, since launchers swallow exit codes


@dataclass(frozen=True)
class Bounds:
    """When silence is a hang; seconds. See `WatchSettings`."""

    hang_s: float = 30.0
    hang_factor: float = 10.0
    first_s: float = 600.0


class _Heart:
    """One process's beat file, and how long its phases usually take."""

    def __init__(self, file: BeatFile, stacks: TextIO, bounds: Bounds):
        self.file, self.stacks, self.bounds = file, stacks, bounds
        self.lanes = {TRAIN: Lane(), SAVE: Lane()}
        self.locks = {TRAIN: threading.Lock(), SAVE: threading.Lock()}
        self.intervals: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def enter(self, name: str, phase: str, step: int | None, what: str) -> None:
        with self.locks[name]:
            lane = self._sign_of_life(name)
            base = lane.base_step if step is None or phase in NUMBERED_APART else step
            lane.entries = lane.entries + 1 if base == lane.base_step else 1
            lane.phase, lane.step, lane.base_step, lane.what = phase, step, base, what
            lane.thread = threading.get_ident()
            lane.bound_s = self._bound_s(phase)
            self.file.write(name, lane)

    def beat(self, name: str, what: str, only_in: Collection[str] = ()) -> None:
        with self.locks[name]:
            if only_in and self.lanes[name].phase not in only_in:
                return
            lane = self._sign_of_life(name)
            lane.what = what or lane.what
            lane.bound_s = self._bound_s(lane.phase)
            self.file.write(name, lane)

    def describe(self, name: str, what: str) -> None:
        with self.locks[name]:
            self.lanes[name].what = what
            self.file.write(name, self.lanes[name])

    def _sign_of_life(self, name: str) -> Lane:
        lane, now = self.lanes[name], time.monotonic()
        if lane.phase:
            self.intervals[lane.phase].append(now - lane.since_s)
        lane.since_s = now
        lane.beats += 1
        return lane

    def _bound_s(self, phase: str) -> float:
        if phase == NEVER_HANGS:
            return FOREVER_S
        usual = self.intervals.get(phase)
        if not usual or phase in UNTIMED:
            return max(self.bounds.first_s, self.bounds.hang_s)
        return max(self.bounds.hang_s, self.bounds.hang_factor * statistics.median(usual))


_heart: _Heart | None = None
_listener: Callable[[str, int | None], None] | None = None


def open(folder: Path, rank: int, host: str, bounds: Bounds = Bounds()) -> None:  # noqa: A001, B008
    """From now on this process can be watched. From the main thread; opens the phase `start`.

    folder: in shared memory (`beat_file.folder_of`). SIGQUIT then writes the stacks of all threads beside the beats.
    """
    global _heart
    stacks = stacks_path(folder, rank).open("w", encoding="utf-8")
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True)  # in C: works while the main thread is stuck
    _heart = _Heart(BeatFile.create(folder, rank, host), stacks, bounds)
    enter("start")


def enter(phase: str, step: int | None = None, what: str = "", lane: str = TRAIN) -> str | None:
    """This process begins `phase` now. `what`: shard and key, file, or whatever a person would ask for.

    Returns the action of an injected fault that the caller carries out, else None.
    """
    if _heart is not None:
        _heart.enter(lane, phase, step, what)
    if _listener is not None and lane == TRAIN:
        _listener(phase, step)
    return faults.fire(phase, step)


def listen(listener: Callable[[str, int | None], None] | None) -> None:
    """Tell it each phase and step that the main thread enters; None: nobody listens any more. It must not raise."""
    global _listener
    _listener = listener


def beat(what: str = "", lane: str = TRAIN) -> None:
    """Still in the same phase, and not stuck: call it once for each part of a long one."""
    if _heart is not None:
        _heart.beat(lane, what)


def read_on(what: str = "") -> None:
    """Bytes have come, or a sample: a sign of life of a training thread that waits for data. From any thread."""
    if _heart is not None:
        _heart.beat(TRAIN, what, only_in=READING)


def waits_for(what: str) -> None:
    """Say what this process waits for. No sign of life: it may wait for ever."""
    if _heart is not None:
        _heart.describe(TRAIN, what)


def close(outcome: str, message: str = "", exit_code: int = 0) -> None:
    """The last word: `done`, `stopped`, or `failed` with the report. Only the first one counts.

    A process that ends without it has crashed.
    """
    global _heart
    _tell_supervisor(outcome, message, exit_code)
    if _heart is not None:
        _heart.file.close(outcome, message, exit_code)
        _heart = None


def _tell_supervisor(outcome: str, message: str, exit_code: int) -> None:
    path = os.environ.get(LAST_WORD_VARIABLE)
    if path and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" and not Path(path).exists():
        with contextlib.suppress(OSError):  # the supervisor then goes by the exit code alone
            Path(path).write_text(json.dumps({"outcome": outcome, "message": message, "exit_code": exit_code}))
