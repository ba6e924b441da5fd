"""A snapshot of every rank → a committed checkpoint, while training goes on.

In: this rank's `Snapshot`, at a step that all ranks agreed on. Out: `Saved`, or the CheckpointError that every rank
gets alike. A save has four phases, and all ranks learn how each of the first three went before the next begins: room
(is there space?), write (all files, flushed and read back), commit (manifest and name), prune. The last two are done by
rank 0, or, on the nodes' own disks, by the first rank of each node.

Surprise: a failed save does not stop the run, since the one before it is still good; the third in a row does.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from phi3v_dist.errors import CheckpointError
from phi3v_dist.progress import BYTES, show_progress
from phi3v_dist.survive import retention, space
from phi3v_dist.survive.agreement import Ranks
from phi3v_dist.survive.fence import FencedError
from phi3v_dist.survive.manifest import commit, rank_file_name
from phi3v_dist.survive.pace import Pace
from phi3v_dist.survive.rank_files import rank_file_bytes, require_finite, write_rank_file
from phi3v_dist.survive.snapshot import Snapshot
from phi3v_dist.survive.store import Store
from phi3v_dist.watch import heartbeat

log = logging.getLogger(__name__)

BEHIND_TRAINING = 10  # niceness: where cores are few, the steps go first; where training waits, nothing is lost by it
MOST_FAILURES = 3  # in a row; then something is wrong that does not go away
REPORT_S = 1.0  # between looks at how far a save is that somebody waits for
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed.

    blocked_s: what training waited for it. write_s: from then to the commit. size_bytes: the files of all ranks.
    is_shared: whether it is in the run folder, not on the nodes' own disks; there, `path` is this rank's.
    """

    path: Path
    step: int
    blocked_s: float
    write_s: float
    size_bytes: int
    is_shared: bool


@dataclass(frozen=True)
class Report(Generic[T]):
    """How one phase of a save went on one rank. newer: the attempt that has replaced this one, if one has."""

    step: int
    value: T | None = None
    problem: str | None = None
    newer: int | None = None


class Writer:
    """Writes one snapshot at a time in a thread of its own. Ranks must begin the same saves in the same order.

    store: where a save goes that names no other one.
    """

    def __init__(self, store: Store, ranks: Ranks, write_mb_per_s: float | None):
        self.failures_in_a_row = 0
        self._usual = store
        self._store = store  # of the save in hand
        self._ranks = ranks
        self._pace = Pace(write_mb_per_s and write_mb_per_s * 1e6)
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None
        self._done_bytes = 0  # of this rank's file, written and then read back
        self._all_bytes: int | None = None  # not known yet

    @property
    def busy(self) -> bool:
        """Whether this rank still works on a save."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, snapshot: Snapshot, blocked_s: float, store: Store | None = None) -> None:
        """Start writing. The outcome of the save before must have been asked for."""
        assert not self.busy and self._outcome is None, "one save at a time, and each must be polled"
        self._store = store or self._usual
        self._pace.hurry(False)
        self._done_bytes, self._all_bytes = 0, None
        self._thread = threading.Thread(target=self._run, args=(snapshot, blocked_s), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Saved | CheckpointError | None:
        """What became of the last save, once; None while it is written, or when nothing is new.

        Raises:
            FencedError: a newer attempt has started.
            LostRankError: another rank is gone.
            CheckpointError: the third failure in a row.
        """
        if self.busy or self._outcome is None:
            return None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Saved):
            self.failures_in_a_row = 0
            return outcome
        if not isinstance(outcome, CheckpointError):
            raise outcome  # a lost rank, a mistake in the program, or an injected fault
        self.failures_in_a_row += 1
        if isinstance(outcome, FencedError):
            raise outcome
        if self.failures_in_a_row >= MOST_FAILURES:
            raise CheckpointError([f"{self.failures_in_a_row} saves in a row failed, the last one:", *outcome.problems])
        return outcome

    def wait(self, timeout_s: float | None = None) -> Saved | CheckpointError | None:
        """As `poll`, when the save is done or the time is over; until then it is written as fast as the disk allows."""
        self.join(timeout_s)
        return self.poll()

    def join(self, timeout_s: float | None = None) -> None:
        """As `wait`, but the outcome is still to be asked for."""
        if self._thread is None:
            return
        self._pace.hurry()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with show_progress(BYTES) as report:
            while self._thread.is_alive():
                left_s = REPORT_S if deadline_s is None else min(REPORT_S, deadline_s - time.monotonic())
                if left_s <= 0:
                    return
                self._thread.join(left_s)
                report("writing the checkpoint", self._done_bytes, self._all_bytes)

    def _run(self, snapshot: Snapshot, blocked_s: float) -> None:
        began = time.monotonic()
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND_TRAINING)  # of this thread alone, on Linux
        try:
            path, size_bytes = self._save(snapshot)
            write_s = time.monotonic() - began
            self._outcome = Saved(path, snapshot.step, blocked_s, write_s, size_bytes, self._store.is_shared)
            if self._store.is_main:
                self._prune(path, snapshot.step)
        except Exception as error:  # whatever it is belongs to the thread that asked for the save
            self._outcome = error
        finally:
            heartbeat.enter("idle", snapshot.step, lane=heartbeat.SAVE)

    def _save(self, snapshot: Snapshot) -> tuple[Path, int]:
        final = self._store.folder / f"step-{snapshot.step:08d}"
        temporary = self._store.fence.folder / final.name
        manifests = self._together(snapshot, temporary, lambda: snapshot.manifest() if self._ranks.is_main else {})
        rooms = self._together(snapshot, temporary, lambda: self._room(snapshot, temporary))
        self._require_room(rooms, final, temporary)
        self._together(snapshot, temporary, lambda: self._warn_of_little_room(rooms, final))
        entries = self._together(snapshot, temporary, lambda: self._write(snapshot, temporary))
        manifest = manifests[0] | {"files": {rank_file_name(rank): entry for rank, entry in enumerate(entries)}}
        self._together(snapshot, temporary, lambda: self._commit(snapshot, temporary, final, manifest))
        self._store.sound[final] = True
        return final, sum(entry["size_bytes"] for entry in entries)

    def _room(self, snapshot: Snapshot, temporary: Path) -> space.Room:
        """The first rank of each folder makes ours, and no parents: without ours we are fenced."""
        if self._store.is_main:
            self._store.fence.remove(temporary)
            temporary.mkdir()
        needed = rank_file_bytes(snapshot.tensors, snapshot.metadata)
        self._all_bytes = 2 * needed
        free = space.free_bytes(self._store.fence.folder)
        return space.Room(self._ranks.name, self._store.folder, needed, free)

    def _require_room(self, rooms: list[space.Room], final: Path, temporary: Path) -> None:
        shortages = (space.shortage([rooms[rank] for rank in group]) for group in self._store.groups)
        shortage = next(filter(None, shortages), None)
        if shortage:
            self._discard(temporary)
            step = final.name.removeprefix("step-")
            raise CheckpointError(f"step {step} is not saved: {shortage}. {self._store.advice}")

    def _warn_of_little_room(self, rooms: list[space.Room], final: Path) -> None:
        if not (self._ranks.is_main and self._store.is_shared):
            return
        try:
            freed = sum(map(retention.size_bytes, self._store.superfluous(final)))
        except OSError as error:  # somebody removes one meanwhile, or has put something else there
            log.warning("older checkpoints than %s cannot be listed: %s", final, error)
            return
        further = space.num_further(rooms, freed)
        if further < space.FEW:
            log.warning(
                "%s has room for %d more checkpoint%s of %s after this one",
                self._store.folder, further, "" if further == 1 else "s",
                space.size(sum(room.needed_bytes for room in rooms)),
            )  # fmt: skip

    def _write(self, snapshot: Snapshot, temporary: Path) -> dict[str, Any]:
        path = temporary / rank_file_name(self._ranks.rank)

        def on_block(num_bytes: int) -> None:
            heartbeat.beat(path.name, heartbeat.SAVE)
            self._done_bytes += num_bytes
            self._pace.spend(num_bytes)

        def on_flush() -> None:  # the file is read back in this phase, too
            heartbeat.enter("flush", snapshot.step, path.name, heartbeat.SAVE)

        try:
            heartbeat.enter("write", snapshot.step, path.name, heartbeat.SAVE)
            return write_rank_file(path, snapshot.tensors, snapshot.metadata, require_finite, on_block, on_flush)
        except OSError as error:
            what = f"writing {path}: {error.strerror}"
            if error.errno in space.FULL:
                needed = rank_file_bytes(snapshot.tensors, snapshot.metadata)
                what += f"; {space.no_space(temporary, needed, space.free_bytes(self._store.fence.folder))}"
            raise OSError(error.errno, what) from error

    def _commit(self, snapshot: Snapshot, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        heartbeat.enter("commit", snapshot.step, final.name, heartbeat.SAVE)
        if self._store.is_main:
            commit(self._store.fence, temporary, final, manifest)

    def _prune(self, saved: Path, step: int) -> None:
        """What cannot be removed costs only space."""
        try:
            heartbeat.enter("prune", step, saved.name, heartbeat.SAVE)
            for path in self._store.superfluous(saved):
                heartbeat.beat(path.name, heartbeat.SAVE, kind="remove")
                self._store.fence.remove(path)
        except OSError as error:
            log.warning("older checkpoints than %s are not removed: %s", saved, error)

    def _together(self, snapshot: Snapshot, temporary: Path, task: Callable[[], T]) -> list[T]:
        """Do a phase's task, hear how it went elsewhere; all get all results, or raise the same error.

        An exception that is no failed save (a mistake in the program) is raised as it is, once the others know of it.
        """
        report: Report[T] = Report(snapshot.step)
        mistake = None
        try:
            report = Report(snapshot.step, task())
        except (OSError, CheckpointError) as error:
            report = Report(snapshot.step, None, f"{self._ranks.name}: {error}", self._store.fence.newer())
        except Exception as error:
            mistake = error
            report = Report(snapshot.step, None, f"{self._ranks.name}: {type(error).__name__}: {error}")
        reports = self._ranks.everyone(report)
        if mistake:
            raise mistake
        steps = {found.step for found in reports}
        assert len(steps) == 1, f"ranks save different steps: {steps}"
        newer = max(found.newer or 0 for found in reports)
        if newer:
            raise FencedError(f"step {snapshot.step} is not saved: {self._store.fence.stopped_by(newer)}")
        problems = [found.problem for found in reports if found.problem]
        if problems:
            self._discard(temporary)
            head = f"cannot save step {snapshot.step} to {self._store.folder}; older checkpoints are untouched"
            raise CheckpointError([head, *problems])
        return [found.value for found in reports]  # type: ignore[misc]

    def _discard(self, temporary: Path) -> None:
        if self._store.is_main:
            self._store.fence.remove(temporary)
