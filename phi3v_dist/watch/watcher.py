"""One process per node that watches the ranks from outside and ends them together when one is dead or stuck.

What comes in: the ranks' beat files in shared memory. What goes out: `node-HOST.json` and `stacks-HOST.txt` in the
attempt's folder, a few plain lines on stderr, and no rank left behind. Surprise: it holds no clock but its own host's
monotonic one, and knows other nodes only by their files. It imports neither torch nor numpy and takes about 15 MB.

    python -m phi3v_dist.watch.watcher FOLDER ATTEMPT_FOLDER HOST NUM_RANKS     (local rank 0 starts it)
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3v_dist.printable import printable
from phi3v_dist.watch import blame, flight_recorder, heartbeat, processes, stacks, verdicts
from phi3v_dist.watch.activity import EVIDENCE_S, Silence, device_busy, makes_progress
from phi3v_dist.watch.beat_file import (
    Beats,
    folder_of,
    hold,
    read_beats,
    remove_leftovers,
    remove_own,
    stacks_path,
)
from phi3v_dist.watch.blame import Actor
from phi3v_dist.watch.checkpoint_names import newest_checkpoint
from phi3v_dist.watch.limits import Bounds
from phi3v_dist.watch.neighbours import Neighbours
from phi3v_dist.watch.node_report import (
    CRASHED,
    DIED,
    ENDED,
    FAILED,
    HANG,
    LOST_RANK,
    RUNNING,
    SUSPECT,
    NodeReport,
    RankReport,
    Verdict,
    left_early,
    stacks_text_path,
    tells_why,
)

if TYPE_CHECKING:
    import phi3v_dist.parallel.topology  # loads torch
    from phi3v_dist.config import WatchSettings

TICK_S = 0.25
OTHERS_S = 1.0  # between looks at the files of other nodes
MEMORY_S = 1.0  # between looks at the ranks' memory
ANSWER_S = 20.0  # how long a suspicion waits for the other nodes, one of which may be far too busy
PATIENCE_S = 90.0  # the same while all ranks that were heard wait: NFS hides a new file for up to a minute
SURFACE_S = 1.0  # for the error of a peer to be printed before it is ended too
SPOKEN_S = 2.0  # more, for one that has said why it ends and only has to leave
LAST_WORDS_S = 30.0  # ranks may take this long in all to say why they fail and to exit; see heartbeat.LAST_WORD_S
CAUSE_S = 6.0  # a rank that failed so long before another one was lost is the reason
LEFT_S = 5.0  # all ranks are usually asked to stop, one a little after the other
GAP_S = 1.0  # this process itself did not run for so long: the machine is too busy or was asleep, nobody hangs
FIRST_RANK_S = 600.0
RECHECK = 0.1  # of the silence so far, before ranks that have an excuse are looked at again
OBSERVED_FROM = 0.25  # of its bound: from then on it is observed what a silent rank does
WARN_AGAIN_S = 60.0  # between two warnings of the same slow rank
WARN_GROWTH = 2.0  # but within one silence, only when it has become so many times longer
WARN_FROM = 1.05  # times the bound: at the second look, which can tell a wait that burns processor time from work


def attach(attempt_folder: Path, topology: "phi3v_dist.parallel.topology.Topology", watch: "WatchSettings") -> None:
    """Have this rank watched from now on. Every rank calls it; local rank 0 starts the watcher of its node."""
    folder = folder_of(attempt_folder, topology.host)
    bounds = Bounds(watch.hang_s, watch.hang_factor, watch.first_s, watch.slow_factor)
    heartbeat.open(folder, topology.rank, topology.host, bounds, topology.device_uuid)
    if topology.device.type == "cuda":
        from phi3v_dist.parallel.waits import WAITS  # loads torch

        heartbeat.follow_device(WAITS.device_waits)
    if topology.local_rank == 0:
        start(folder, attempt_folder, topology.host, topology.local_world_size)


def start(folder: Path, attempt_folder: Path, host: str, num_ranks: int) -> "subprocess.Popen[bytes]":
    """Watch `num_ranks` ranks of this node in a process of its own. It ends when they have."""
    words = [str(folder), str(attempt_folder), host, str(num_ranks)]
    command = [sys.executable, "-m", "phi3v_dist.watch.watcher", *words]
    with hold(folder) as held:  # the watcher inherits the lock, so that there is no moment without it
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            pass_fds=[held.fileno()],
        )  # fmt: skip


@dataclass
class _Rank:
    """A rank as it is seen from outside.

    beats_seen, silences: by lane, the last sign of life and what was observed since it was seen.
    num_waits, passed_s: how many waits for other ranks have ended, and when that was seen to change.
    warned: when it was last called slow, in which silence and how long that was.
    """

    beats: Beats
    alive: bool = True
    outcome: str = ""
    died_s: float = 0.0
    peak_bytes: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    beats_seen: dict[str, int] = field(default_factory=dict)
    silences: dict[str, Silence] = field(default_factory=dict)
    num_waits: int = 0
    passed_s: float = float("-inf")
    warned: tuple[float, int, float] = (float("-inf"), -1, 0.0)


class Watcher:
    def __init__(self, folder: Path, attempt_folder: Path, host: str, num_ranks: int):
        self.folder, self.attempt_folder, self.host = folder, attempt_folder, host
        self.run_folder, self.num_ranks = attempt_folder.parents[1], num_ranks
        self.ranks: dict[int, _Rank] = {}
        self.status = RUNNING
        self.verdict: Verdict | None = None
        self.actors: list[Actor] = []
        self.neighbours = Neighbours(attempt_folder, host)
        self._left_s, self._asked_to_leave = 0.0, False
        self._suspects, self._suspected_s = dict[tuple[int, str], int](), 0.0
        # Limits that had been passed at the last look: of which rank and lane, in which silence, of a slow rank or not.
        self._passed = set[tuple[tuple[int, str], int, bool]]()
        self._device_is_busy = device_busy()
        self._asked_s = 0.0  # what asking for stacks took since the last look at the clock
        self.now_s = time.monotonic()
        self._next_s = dict.fromkeys(("memory", "others", "suspicion"), 0.0)
        self._reported: object = None

    def run(self) -> None:
        """Until all ranks have ended."""
        began_s = self.now_s
        while True:
            time.sleep(TICK_S)
            self._read_clock()
            self._look()
            self._report()
            running = [rank for rank in self.ranks.values() if rank.alive]
            all_came = len(self.ranks) >= self.num_ranks
            if not running and (all_came or self.verdict or self.now_s - began_s > FIRST_RANK_S):
                break
            looks = (self._find_ended_elsewhere, self._find_dead, self._find_failed, self._hear_others, self._find_left)
            if not any(find() for find in looks):
                self._find_stuck()
        if self.verdict is None:
            self._find_ended_elsewhere() or self._find_dead() or self._find_failed()
        self.status = self.verdict.kind if self.verdict else ENDED
        self._report()
        remove_own(self.folder)

    def _read_clock(self) -> None:
        """Time in which this process did not run is nobody's silence."""
        before_s, self.now_s = self.now_s, time.monotonic()
        gap_s = self.now_s - before_s - TICK_S - self._asked_s
        self._asked_s = 0.0
        if gap_s > GAP_S:
            for rank in self.ranks.values():
                for silence in rank.silences.values():
                    silence.skip(gap_s)

    def _is_time(self, what: str, every_s: float) -> bool:
        if self.now_s < self._next_s[what]:
            return False
        self._next_s[what] = self.now_s + every_s
        return True

    def _look(self) -> None:
        """Read every rank's file, and the kernel's word on whether it lives."""
        for path in self.folder.glob("rank-*.beats"):
            beats = read_beats(path)
            if beats is not None and beats.host == self.host:
                if beats.rank not in self.ranks:
                    flight_recorder.forget(self.attempt_folder, [beats.rank])
                rank = self.ranks.setdefault(beats.rank, _Rank(beats))
                rank.beats = beats
        look_at_memory = self._is_time("memory", MEMORY_S)
        for rank in self.ranks.values():
            pid = rank.beats.pid
            if rank.alive and (look_at_memory or not rank.kills):
                rank.peak_bytes = max(rank.peak_bytes, processes.peak_memory_bytes(pid))
                rank.kills = rank.kills or processes.out_of_memory_kills(pid)
            for name, lane in rank.beats.lanes.items():
                if lane.beats != rank.beats_seen.get(name):
                    rank.beats_seen[name], rank.silences[name] = lane.beats, Silence(self.now_s)
                elif rank.alive and self.now_s - rank.silences[name].since_s > OBSERVED_FROM * lane.bound_s:
                    rank.silences[name].observe(self.now_s, rank.beats, name)
            if rank.beats.pulse.num_waits != rank.num_waits:
                rank.num_waits, rank.passed_s = rank.beats.pulse.num_waits, self.now_s
            if rank.alive and not processes.is_alive(pid, rank.beats.started):
                rank.alive, rank.died_s = False, self.now_s
            rank.outcome = rank.outcome or rank.beats.outcome

    def _find_ended_elsewhere(self) -> bool:
        """Whether ranks are gone because another node has judged a hang: it says so before it ends its own ranks, and
        ours may lose the connection to them before we have read it."""
        gone = any(rank.outcome == FAILED or not (rank.alive or rank.outcome) for rank in self.ranks.values())
        if self.verdict or not gone:
            return False
        self.neighbours.look(self.now_s)
        judged = self.neighbours.judged()
        if judged is None or judged.verdict is None or judged.verdict.kind != HANG:
            return False
        self._conclude(judged.verdict, 0.0, elsewhere=judged.host)
        return True

    def _find_dead(self) -> bool:
        """A process that is gone without a last word. The others are given a second to say what they saw of it."""
        if self._left():
            return False
        dead = [rank for rank in self.ranks.values() if not rank.alive and not rank.outcome]
        for rank in dead:
            rank.outcome = DIED
        if not dead or self.verdict:
            return bool(dead)
        if any(self._came_first(rank) for rank in self._failed()):
            return False
        of_memory = any(processes.kills_again(rank.kills) for rank in dead)
        actors = [self._actor(rank) for rank in dead]
        peaks = [rank.peak_bytes for rank in dead]
        machine_bytes, checkpoint = processes.machine_memory_bytes(), newest_checkpoint(self.run_folder)
        self._conclude(verdicts.of_death(actors, peaks, machine_bytes, of_memory, checkpoint), SURFACE_S)
        return True

    def _left(self) -> bool:
        """Whether a rank was asked to stop before the first step and left, and nothing else went wrong.

        The others are then not lost without a reason, nor do they hang.
        """
        left = any(not rank.alive and left_early(rank.outcome, self._actor(rank).where) for rank in self.ranks.values())
        reasons = any(tells_why(rank.beats.exit_code) for rank in self._failed())
        return (left or self.neighbours.left_early()) and not reasons

    def _find_left(self) -> bool:
        """Ranks that nobody has asked to stop wait for one that has left: ask them too, then end them."""
        if not self._left():
            return False
        self._left_s = self._left_s or self.now_s
        waited_s, running = self.now_s - self._left_s, [rank for rank in self.ranks.values() if rank.alive]
        if waited_s > LEFT_S and not self._asked_to_leave:
            self._asked_to_leave = True
            _say([f"watcher on {self.host}: a rank was stopped before the first step; the others are stopped too"])
            for rank in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.beats.pid, signal.SIGTERM)
        if waited_s > 2 * LEFT_S:
            self._end(0.0, lambda rank: True)
        return True

    def _came_first(self, failed: _Rank) -> bool:
        """Whether a failure explains why another rank is gone: the launcher then ended that one."""
        code = failed.beats.exit_code
        return tells_why(code) or (code != LOST_RANK and self.now_s - failed.beats.ended_s > CAUSE_S)

    def _failed(self) -> list[_Rank]:
        """Those first that had a reason of their own, then by time."""
        failed = [rank for rank in self.ranks.values() if rank.beats.outcome == FAILED]
        return sorted(
            failed,
            key=lambda rank: (
                not tells_why(rank.beats.exit_code),
                rank.beats.exit_code == LOST_RANK,
                rank.beats.ended_s,
            ),
        )

    def _find_failed(self) -> bool:
        """A rank that has said why it ends; those that do not end with it are ended."""
        failed = self._failed()
        if not failed or self.verdict or self._left():
            return bool(failed and self.verdict)
        waited_s = self.now_s - min(rank.beats.ended_s for rank in failed)
        if waited_s < LAST_WORDS_S and any(rank.alive for rank in failed):
            return True
        actor = self._actor(failed[0], blame.TRAIN)
        verdict = verdicts.of_failure(actor, failed[0].beats.message)
        printed = any(_has_printed(rank) for rank in failed if rank.beats.message == failed[0].beats.message)
        self._conclude(verdict, SURFACE_S, said=verdict.lines[:1] if printed else verdict.lines)
        return True

    def _hear_others(self) -> bool:
        """Answer other nodes' suspicions; end with them when one has a verdict."""
        if self._is_time("others", OTHERS_S):
            self.neighbours.look(self.now_s)
            judged = self.neighbours.judged()
            if judged and judged.verdict and not self.verdict:
                if judged.verdict.kind == HANG:
                    self._dump_stacks()
                grace_s = 0.0 if judged.verdict.kind == HANG else SURFACE_S
                self._conclude(judged.verdict, grace_s, elsewhere=judged.host)
            elif questions := self.neighbours.questions():
                self._dump_stacks()
                self.neighbours.seen |= questions
                self._report()
        return self.verdict is not None

    def _find_stuck(self) -> None:
        """Suspect ranks that are silent for too long, ask all other nodes, and judge when they have answered."""
        silent = [
            actor
            for rank in self.ranks.values()
            for actor in self._actors_of(rank)
            if actor.silent_s > actor.bound_s and rank.silences[actor.lane].observed_s >= EVIDENCE_S
        ]
        beats = {(actor.rank, actor.lane): self.ranks[actor.rank].beats_seen[actor.lane] for actor in silent}
        if self.status == SUSPECT and not self._suspects.items() <= beats.items():
            self._withdraw()  # one of them lives
        if not silent:
            return
        if self.status != SUSPECT:
            # Those with an excuse are looked at again from time to time, and at once when a limit is passed.
            late = {(actor.rank, actor.lane): actor.silent_s > actor.slow_bound_s for actor in silent}
            passed = {(who, number, late[who]) for who, number in beats.items()}
            is_time = self._is_time("suspicion", RECHECK * max(actor.silent_s for actor in silent))
            if not is_time and passed <= self._passed:
                return
            self._suspects, self._suspected_s, self.status, self._passed = beats, self.now_s, SUSPECT, passed
            self._dump_stacks()
            self.neighbours.ask()
            self._report()
        self._judge()

    def _judge(self) -> None:
        """A node that does not answer is waited for, longer when only it can have the rank that all others wait for."""
        everyone = self.actors + self.neighbours.answers()
        guilty, absent = blame.judge(everyone), self.neighbours.missing()
        all_wait = bool(guilty) and all(actor.waits for actor in guilty)
        if absent and self.now_s - self._suspected_s < (PATIENCE_S if all_wait else ANSWER_S):
            return
        if not guilty:
            self._warn_of_slow()
            return self._withdraw()
        where = stacks_text_path(self.attempt_folder, self.host)
        self._conclude(verdicts.of_hang(guilty, everyone, absent, where, newest_checkpoint(self.run_folder)), 0.0)

    def _warn_of_slow(self) -> None:
        """Name the ranks of this node that take long and work: once a minute, and of one silence when it has grown."""
        for actor in self.actors:
            rank = self.ranks[actor.rank]
            warned_s, beats, silent_s = rank.warned
            is_same = beats == rank.beats_seen[actor.lane]
            is_new = actor.silent_s >= WARN_GROWTH * silent_s if is_same else self.now_s - warned_s >= WARN_AGAIN_S
            if actor.slow and actor.silent_s > WARN_FROM * actor.bound_s and is_new:
                rank.warned = self.now_s, rank.beats_seen[actor.lane], actor.silent_s
                _say([f"watcher on {self.host}: {verdicts.of_slow(actor)}"])

    def _withdraw(self) -> None:
        self.status = RUNNING
        self._report()

    def _dump_stacks(self) -> None:
        """Ask all ranks for their stacks; keep the text, and what it says about each."""
        running = [rank for rank in self.ranks.values() if rank.alive]
        paths = {rank.beats.pid: stacks_path(self.folder, rank.beats.rank) for rank in running}
        began_s = time.monotonic()
        texts = stacks.ask(paths)
        self._asked_s += time.monotonic() - began_s
        self.actors, parts = [], []
        for rank in sorted(running, key=lambda rank: rank.beats.rank):
            threads = stacks.parse(texts[rank.beats.pid])
            for actor in self._actors_of(rank):
                thread = rank.beats.lanes[actor.lane].thread
                waits = stacks.waits_for_others(threads, thread) or self._device_waits(rank, actor.lane)
                self.actors.append(
                    replace(
                        actor, state=processes.state(actor.pid), kernel=processes.waits_in(actor.pid), waits=waits,
                        place=stacks.place(threads, thread), progresses=self._progresses(rank, actor.lane, waits),
                    )
                )  # fmt: skip
            parts.append(verdicts.stack_text(self._actor(rank), texts[rank.beats.pid]))
        try:
            stacks_text_path(self.attempt_folder, self.host).write_text("\n".join(parts), encoding="utf-8")
        except OSError as error:
            _say([f"watcher on {self.host}: the stacks could not be written: {error}"])

    def _device_waits(self, rank: _Rank, lane: str) -> bool:
        return lane == blame.TRAIN and rank.beats.pulse.waits_since_s > 0

    def _progresses(self, rank: _Rank, lane: str, waits: bool) -> bool:
        """Whether a lane works by itself, or its waits for other ranks still end: then the whole job moves on."""
        device_is_busy = self._device_is_busy(rank.beats.device)
        alone = makes_progress(rank.silences[lane], self.now_s, rank.beats, lane, waits, device_is_busy)
        moves = lane == blame.TRAIN and self.now_s - rank.passed_s <= rank.beats.lanes[lane].bound_s
        return alone or moves

    def _actors_of(self, rank: _Rank) -> list[Actor]:
        """The lanes of a running rank that can hang."""
        if not rank.alive or rank.outcome:
            return []
        return [self._actor(rank, name) for name, lane in rank.beats.lanes.items() if lane.phase not in ("", "idle")]

    def _actor(self, rank: _Rank, name: str = blame.TRAIN) -> Actor:
        lane, beats = rank.beats.lanes[name], rank.beats
        silent_s = round(self.now_s - rank.silences[name].since_s, 1)
        return Actor(
            rank=beats.rank, host=self.host, pid=beats.pid, lane=name, phase=lane.phase, step=lane.step,
            what=printable(lane.what), position=lane.position, silent_s=silent_s, bound_s=lane.bound_s,
            kind=lane.kind, slow_bound_s=lane.slow_bound_s,
        )  # fmt: skip

    def _conclude(self, verdict: Verdict, grace_s: float, said: list[str] | None = None, elsewhere: str = "") -> None:
        """Say it, write it, and end all ranks of this node. said: the lines that nobody has printed yet; None: all."""
        self.verdict, self.status = verdict, verdict.kind
        lines = verdict.lines if said is None else said
        more = f"  more: phi3v-diagnose {self.run_folder}"
        _say([*([f"(node {elsewhere} says:)"] if elsewhere else []), *lines, more], "ERROR")
        self._report()
        if verdict.kind == HANG:
            running = [rank.beats for rank in self.ranks.values() if rank.alive]
            able = [beats.rank for beats in running if processes.state(beats.pid) not in blame.STOPPED]
            flight_recorder.ask(self.attempt_folder, able)
        self._end(grace_s, lambda rank: not rank.beats.outcome)
        self._end(SPOKEN_S if grace_s else 0.0, lambda rank: True)

    def _end(self, grace_s: float, whom: Callable[[_Rank], bool]) -> None:
        """Kill these ranks, as far as they have not ended by themselves in time."""
        deadline_s = time.monotonic() + grace_s
        while time.monotonic() < deadline_s and any(rank.alive and whom(rank) for rank in self.ranks.values()):
            time.sleep(TICK_S / 5)
            self.now_s = time.monotonic()
            self._look()
        ended = [rank for rank in self.ranks.values() if rank.alive and whom(rank)]
        for rank in ended:
            rank.outcome = rank.outcome or "ended"
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, none sees another one go and says so
            for rank in ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.beats.pid, number)

    def _report(self) -> None:
        """Write the file of this node, when it says something new."""
        ranks = [
            RankReport(
                rank=rank.beats.rank, pid=rank.beats.pid, started=rank.beats.started, outcome=rank.outcome,
                exit_code=rank.beats.exit_code, message=rank.beats.message,
                where=self._actor(rank).where, what=printable(rank.beats.lanes[blame.TRAIN].what),
                peak_bytes=rank.peak_bytes,
            )
            for _, rank in sorted(self.ranks.items())
        ]  # fmt: skip
        number, seen = self.neighbours.round, dict(self.neighbours.seen)
        news = (self.status, [(rank.pid, rank.outcome) for rank in ranks], number, seen)
        if news == self._reported:
            return
        self._reported = news
        report = NodeReport(self.host, self.status, ranks, self.actors, self.verdict, number, seen)
        try:
            report.write(self.attempt_folder)
        except OSError as error:
            _say([f"watcher on {self.host}: its report could not be written: {error}"])


def _has_printed(rank: _Rank) -> bool:
    """Whether a rank that failed has shown its report itself: rank 0 and a crash do so at once, other ranks wait first,
    and may be killed meanwhile."""
    waited = not rank.alive and rank.died_s - rank.beats.ended_s >= heartbeat.LAST_WORD_S
    return rank.beats.rank == 0 or rank.beats.exit_code == CRASHED or waited


def _say(lines: list[str], level: str = "WARNING") -> None:
    """Print lines as one record of the log; its first line has date and level, as those of the ranks."""
    record = "\n".join(lines)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level} {record}", file=sys.stderr, flush=True)


def main() -> None:
    folder, attempt_folder, host, num_ranks = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks; it ends when they do
    removed = remove_leftovers(Path(folder))
    if removed:
        _say([f"watcher on {host}: removed {removed} things that dead processes had left in shared memory"])
    Watcher(Path(folder), Path(attempt_folder), host, int(num_ranks)).run()


if __name__ == "__main__":
    main()
