"""Stacks of a rank's threads, asked for from outside, and whether they say that it only waits for others.

What comes in: a process that has registered `faulthandler` for SIGQUIT. What goes out: its stacks as text, and as
frames by thread. Surprise: the process need not cooperate. The handler is C and runs even while the main thread is
blocked in C; only a stopped process, or one deep in the kernel, gives none, and of that the kernel tells the state.
"""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from phi3v_dist.watch import processes
from phi3v_dist.watch.blame import FROZEN

ANSWER_S = 10.0  # for all stacks to be written, on a machine that has far too much to do
FROZEN_S = 1.0  # the same for a process that does nothing, which may never write its own
QUIET_S = 0.5  # nothing more for so long: it was all
THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
FRAME = re.compile(r'\s+File "(.*)", line (\d+|\?\?\?) in (.*)')
INNERMOST = 6  # frames in which a wait for others shows
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/phi3v_dist/parallel/topology.py")
AUTOGRAD = "/torch/autograd/graph.py"  # on GPUs backward runs in a thread of its own, and this one waits for it


@dataclass(frozen=True)
class Frame:
    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"`{self.function}` ({Path(self.file).name}, line {self.line})"


Threads = dict[int, list[Frame]]  # by `threading.get_ident`; innermost frame first


def ask(pids: dict[int, Path]) -> dict[int, str]:
    """Fresh stacks of processes, whose files are given by pid; empty text where none came."""
    sizes = {pid: _size(path) for pid, path in pids.items()}
    for pid in pids:
        try:
            os.kill(pid, signal.SIGQUIT)
        except ProcessLookupError:
            continue
    began_s = changed_s = time.monotonic()
    seen = sizes
    while (now_s := time.monotonic()) - began_s < ANSWER_S:
        now = {pid: _size(path) for pid, path in pids.items()}
        if now != seen:
            seen, changed_s = now, now_s
        missing = [pid for pid in pids if now[pid] == sizes[pid]]
        if now_s - began_s > FROZEN_S:
            missing = [pid for pid in missing if processes.state(pid) not in ("", *FROZEN)]
        if not missing and now_s - changed_s > QUIET_S:
            break
        time.sleep(QUIET_S / 10)
    return {pid: _tail(path, sizes[pid]) for pid, path in pids.items()}


def parse(text: str) -> Threads:
    threads: Threads = {}
    frames: list[Frame] = []
    for line in text.splitlines():
        if thread := THREAD.match(line):
            frames = threads[int(thread[1], 16)] = []
        elif frame := FRAME.match(line):
            frames.append(Frame(*frame.groups()))
    return threads


def waits_for_others(threads: Threads, thread: int) -> bool:
    """Whether a thread is in a collective operation, in which a rank waits until all others have come."""
    frames = threads.get(thread, [])
    if frames and AUTOGRAD in frames[0].file:
        others = [frames for number, frames in threads.items() if number != thread and not _collects(frames)]
        return any(map(_in_collective, others))
    return _in_collective(frames)


def _collects(frames: list[Frame]) -> bool:
    """The thread that gathers metrics waits for other ranks whatever training does."""
    return any(frame.file.endswith("/observe/collect.py") for frame in frames)


def _in_collective(frames: list[Frame]) -> bool:
    inner = frames[:INNERMOST]
    if any(place in frame.file for frame in inner for place in COLLECTIVES):
        return True
    return any(frame.function == "wait" and "/deepspeed/" in frame.file for frame in inner)  # ZeRO's gathers


def place(threads: Threads, thread: int) -> str:
    """The innermost function of ours in a thread, else the innermost at all."""
    frames = threads.get(thread, [])
    ours = [frame for frame in frames if "/phi3v_dist/" in frame.file]
    return str((ours or frames)[0]) if frames else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> str:
    return path.read_bytes()[start:].decode("utf-8", "replace") if path.exists() else ""
