"""Where this process is: phase, step and what it works on, for whoever watches from outside.

What comes in: `enter("forward", step)` from every place where a run can be slow, die or hang. What goes out: a few
bytes in shared memory (beat_file.py). Surprise: like logging it is a property of the process, so these are functions of
a module and nothing has to be passed through; before `open` they do nothing but ask for injected faults.

Two lanes, since a checkpoint is written while training goes on: `TRAIN` is the main thread, `SAVE` the writer.

Each sign of life says which kind of work comes next, and how much of it. From what that kind has taken so far this
process computes how long it may be silent (limits.py); the watcher only reads that.
"""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TextIO

from phi3v_dist.watch import faults
from phi3v_dist.watch.beat_file import BeatFile, Lane, Pulse, stacks_path
from phi3v_dist.watch.limits import Bounds, Limits

TRAIN, SAVE = "train", "save"  # lanes
DONE, STOPPED, FAILED = "done", "stopped", "failed"  # outcomes
READING = ("start", "load", "data", "read")  # kinds of work in which the main thread may wait for data
NUMBERED_APART = ("evaluate", "export")  # their steps are numbers of batches or files, not of optimizer steps
PULSE_S = 1.0  # between two looks at an accelerator's waits
LAST_WORD_S = 5.0  # ranks other than 0 wait so long before they print why they fail: enough for rank 0 to print
LAST_WORD_VARIABLE = "PHI3V_LAST_WORD"  # a file for the supervisor, since launchers swallow exit codes


class _Heart:
    """One process's beat file, and how long its work usually takes."""

    def __init__(self, file: BeatFile, stacks: TextIO, bounds: Bounds):
        self.file, self.stacks, self.limits = file, stacks, Limits(bounds)
        self.lanes = {TRAIN: Lane(), SAVE: Lane()}
        self.locks = {TRAIN: threading.Lock(), SAVE: threading.Lock()}
        self.pulse, self.pulse_lock = Pulse(), threading.Lock()

    def enter(self, name: str, phase: str, step: int | None, what: str, kind: str, work: int) -> None:
        with self.locks[name]:
            lane = self._sign_of_life(name)
            base = lane.base_step if step is None or phase in NUMBERED_APART else step
            lane.entries = lane.entries + 1 if base == lane.base_step else 1
            lane.phase, lane.step, lane.base_step, lane.what = phase, step, base, what
            lane.thread, lane.native_thread = threading.get_ident(), threading.get_native_id()
            self._begin(lane, kind or phase, work)
            self.file.write(name, lane)

    def beat(
        self, name: str, what: str, kind: str = "", work: int | None = None, only_in: Collection[str] = ()
    ) -> None:
        with self.locks[name]:
            if only_in and self.lanes[name].kind not in only_in:
                return
            lane = self._sign_of_life(name)
            lane.what = what or lane.what
            keeps_work = work is None and not kind
            self._begin(lane, kind or lane.kind, lane.work if keeps_work else work or 0)
            self.file.write(name, lane)

    def describe(self, name: str, what: str) -> None:
        with self.locks[name]:
            self.lanes[name].what = what
            self.file.write(name, self.lanes[name])

    def passed(self) -> None:
        with self.pulse_lock:
            self.pulse.num_waits += 1
            self.file.write_pulse(self.pulse)

    def device_waits(self, num_waits: int, is_in_one: bool) -> None:
        with self.pulse_lock:
            if not is_in_one:
                self.pulse.waits_since_s = 0.0
            elif num_waits > self.pulse.num_waits or not self.pulse.waits_since_s:
                self.pulse.waits_since_s = time.monotonic()
            self.pulse.num_waits = max(num_waits, self.pulse.num_waits)
            self.file.write_pulse(self.pulse)

    def _sign_of_life(self, name: str) -> Lane:
        lane, now = self.lanes[name], time.monotonic()
        if lane.phase:
            self.limits.add(lane.kind, lane.work, now - lane.since_s)
        lane.since_s = now
        lane.beats += 1
        return lane

    def _begin(self, lane: Lane, kind: str, work: int) -> None:
        lane.kind, lane.work = kind, work
        lane.bound_s = self.limits.limit_s(kind, work)
        lane.slow_bound_s = self.limits.slow_limit_s(lane.bound_s)


_heart: _Heart | None = None
_listeners: list[Callable[[str, int | None], None]] = []


def open(folder: Path, rank: int, host: str, bounds: Bounds = Bounds(), device: str = "") -> None:  # noqa: A001, B008
    """From now on this process can be watched. From the main thread; opens the phase `start`.

    folder: in shared memory (`beat_file.folder_of`). SIGQUIT then writes the stacks of all threads beside the beats.
    device: UUID of its GPU, if it has one.
    """
    global _heart
    stacks = stacks_path(folder, rank).open("w", encoding="utf-8")
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True)  # in C: works while the main thread is stuck
    _heart = _Heart(BeatFile.create(folder, rank, host, device), stacks, bounds)
    enter("start")


def enter(
    phase: str, step: int | None = None, what: str = "", lane: str = TRAIN, *, kind: str = "", work: int = 0
) -> str | None:
    """This process begins `phase` now.

    Args:
        what: shard and key, file, or whatever a person would ask for.
        kind: of work, where a phase has several that take unlike times; empty: the phase itself.
        work: size of what comes until the next sign of life, in a unit of the kind's own, such as tokens; 0 where all
            are alike.

    Returns the action of an injected fault that the caller carries out, else None.
    """
    if _heart is not None:
        _heart.enter(lane, phase, step, what, kind, work)
    if lane == TRAIN:
        for listener in tuple(_listeners):
            listener(phase, step)
    return faults.fire(phase, step)


def listen(listener: Callable[[str, int | None], None]) -> None:
    """From now on it is told each phase and step that the main thread enters. It must not raise."""
    _listeners.append(listener)


def forget(listener: Callable[[str, int | None], None]) -> None:
    """It is told nothing more."""
    if listener in _listeners:
        _listeners.remove(listener)


def beat(what: str = "", lane: str = TRAIN, *, kind: str = "", work: int | None = None) -> None:
    """Still in the same phase, and not stuck: call it once for each part of a long one, before the part.

    kind, work: as for `enter`; without them they stay as they are.
    """
    if _heart is not None:
        _heart.beat(lane, what, kind, work)


def passed() -> None:
    """This process has waited in a collective operation, and all ranks have come."""
    if _heart is not None:
        _heart.passed()


def follow_device(look: Callable[[], tuple[int, bool]]) -> None:
    """Report the waits of an accelerator, from a thread, since the main thread may be blocked by one of them.

    look: how many waits for other ranks have ended in all, and whether the accelerator is in one now.
    """
    if _heart is not None:
        threading.Thread(target=_follow_device, args=(_heart, look), name="device-waits", daemon=True).start()


def _follow_device(heart: _Heart, look: Callable[[], tuple[int, bool]]) -> None:
    while _heart is heart:
        heart.device_waits(*look())
        time.sleep(PULSE_S)


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
