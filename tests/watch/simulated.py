"""A watcher and its ranks under a clock that moves only when the watcher sleeps: hours of a job take seconds.

Everything of the product runs as it is, but for the kernel: a rank is a generator that yields for how long it does
what, and its processes, threads and stacks are what this file says of them.
"""

import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from phi3v_dist.watch import heartbeat, processes, stacks, watcher
from phi3v_dist.watch.beat_file import BeatFile
from phi3v_dist.watch.limits import Bounds
from phi3v_dist.watch.node_report import NodeReport, read_report, report_path

FIRST_PID = 2**23  # above any process of Linux
WRITER = 1  # added to a pid: its thread that writes checkpoints
FOREVER_S = 1e7
FRAME = 'Thread {:#018x} (most recent call first):\n  File "{}", line 7 in {}\n'
WAITING = ("/x/torch/distributed/distributed_c10d.py", "all_reduce")
WORKING = ("/x/phi3v_dist/model/vision.py", "forward")

COMPUTES, SLEEPS, WAITS, SPINS, STOPPED = "computes", "sleeps", "waits", "spins", "stopped"
Behaviour = tuple[str, float]  # what, and for how many seconds


@dataclass
class Rank:
    """pid: number of the process and of its main thread. active_s: of the main thread, then of the writer's."""

    pid: int
    heart: heartbeat._Heart
    script: Generator[Behaviour, None, None] | None = None
    does: str = SLEEPS
    until_s: float = 0.0
    active_s: dict[int, float] = field(default_factory=dict)
    on_writer: bool = False
    alive: bool = True
    died_s: float = 0.0


class Simulation:
    """Ranks of one node; `run` is over when all of them are."""

    def __init__(self, folder: Path, monkeypatch, num_ranks: int, bounds: Bounds):
        self.now_s, self.monkeypatch = 1000.0, monkeypatch
        self.attempt_folder = folder / "attempts" / "0001"
        self.attempt_folder.mkdir(parents=True)
        self.beats_folder = folder / "beats"
        self.beats_folder.mkdir()
        self.current = FIRST_PID
        self.ranks: list[Rank] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self._sleep)
        monkeypatch.setattr(heartbeat.threading, "get_native_id", lambda: self.current)
        monkeypatch.setattr(heartbeat.threading, "get_ident", lambda: self.current)
        monkeypatch.setattr(os, "kill", self._kill)
        for name in ("is_alive", "state", "threads", "active_s"):
            monkeypatch.setattr(processes, name, getattr(self, f"_{name}"))
        for name, value in {"waits_in": "", "peak_memory_bytes": 0, "page_reads": 0, "out_of_memory_kills": {}}.items():
            monkeypatch.setattr(processes, name, lambda *_, value=value: value)
        monkeypatch.setattr(processes, "programs_of", lambda pid, since_ticks: iter(()))
        monkeypatch.setattr(stacks, "ask", self._stacks)
        for number in range(num_ranks):
            pid = FIRST_PID + 10 * number
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda pid=pid: pid)
                file = BeatFile.create(self.beats_folder, number, "n0")
            self.ranks.append(Rank(pid, heartbeat._Heart(file, (self.beats_folder / "stacks").open("w"), bounds)))

    def run(
        self, *scripts: Callable[[heartbeat._Heart], Generator[Behaviour, None, None]], tick_s: float = watcher.TICK_S
    ) -> NodeReport:
        """What the watcher, who looks every `tick_s`, reports of ranks that do this. A rank whose script ends has
        finished."""
        self.monkeypatch.setattr(watcher, "TICK_S", tick_s)
        for rank, script in zip(self.ranks, scripts, strict=True):
            rank.script, rank.until_s = script(rank.heart), self.now_s
            self._next(rank)
        watcher.Watcher(self.beats_folder, self.attempt_folder, "n0", len(self.ranks)).run()
        report = read_report(report_path(self.attempt_folder, "n0"))
        assert report is not None
        return report

    def _sleep(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while due := [rank for rank in self.ranks if rank.alive and rank.until_s <= end_s]:
            rank = min(due, key=lambda one: one.until_s)
            self._advance(max(rank.until_s, self.now_s))
            self._next(rank)
        self._advance(end_s)

    def _advance(self, now_s: float) -> None:
        for rank in self.ranks:
            if rank.alive and rank.does in (COMPUTES, SPINS):
                thread = rank.pid + (WRITER if rank.on_writer else 0)
                rank.active_s[thread] = rank.active_s.get(thread, 0.0) + now_s - self.now_s
        self.now_s = now_s

    def _next(self, rank: Rank) -> None:
        """The rank goes on to what it does next."""
        self.current = rank.pid
        try:
            rank.does, seconds = next(rank.script)
            rank.until_s += seconds
        except StopIteration:
            rank.heart.file.close(heartbeat.DONE, "", 0)
            self._die(rank)

    def number_of(self, heart: heartbeat._Heart) -> int:
        return next(number for number, rank in enumerate(self.ranks) if rank.heart is heart)

    def on_writer(self, number: int, is_on_writer: bool) -> None:
        """What a rank enters and does from now on is its writer's."""
        self.ranks[number].on_writer = is_on_writer
        self.current = self.ranks[number].pid + (WRITER if is_on_writer else 0)

    def die(self, number: int) -> None:
        """A rank is gone without a word, as by `kill -9`."""
        self._die(self.ranks[number])

    def _die(self, rank: Rank) -> None:
        rank.alive, rank.died_s = False, self.now_s

    def _kill(self, pid: int, number: int) -> None:
        rank = self._of(pid)
        if rank.alive and number == signal.SIGKILL:
            self._die(rank)

    def _of(self, pid: int) -> Rank:
        return next(rank for rank in self.ranks if rank.pid == pid)

    def _is_alive(self, pid: int, started: int) -> bool:
        return self._of(pid).alive

    def _state(self, pid: int) -> str:
        return {STOPPED: "T", COMPUTES: "R", SPINS: "R"}.get(self._of(pid).does, "S")

    def _threads(self, pid: int) -> dict[int, str]:
        return {pid: "python", pid + WRITER: "python"}

    def _active_s(self, pid: int, thread: int) -> float:
        return self._of(pid).active_s.get(thread, 0.0)

    def _stacks(self, pids: dict[int, Path]) -> dict[int, str]:
        return {pid: self._stack(self._of(pid)) for pid in pids}

    def _stack(self, rank: Rank) -> str:
        if rank.does == STOPPED:
            return ""
        place = WAITING if rank.does in (WAITS, SPINS) else WORKING
        busy, other = (WRITER, 0) if rank.on_writer else (0, WRITER)
        return FRAME.format(rank.pid + busy, *place) + FRAME.format(rank.pid + other, *WORKING)
