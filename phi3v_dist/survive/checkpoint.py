"""A run between two steps ↔ a folder: save, verify, resume at any world size.

In: an engine and the run's position. Out: `step-00000050/` with one file of tensors per rank and a manifest that was
written last. A folder counts once it has that name, and all its files were read back from the disk before it got it.

Surprise: ranks never decide alone. Which step is saved, whether all shares were written and which checkpoint is resumed
is exchanged first, so that one rank's full disk fails the save on every rank and not the job in a collective.
"""

import itertools
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.survive import random_state, snapshot
from phi3v_dist.survive.agreement import Ranks
from phi3v_dist.survive.fence import Fence
from phi3v_dist.survive.manifest import DamagedError, damage
from phi3v_dist.survive.rank_files import TensorReader
from phi3v_dist.survive.retention import SET_ASIDE, committed, step_of
from phi3v_dist.survive.snapshot import HostMemory, Position
from phi3v_dist.survive.writer import Saved, Writer
from phi3v_dist.watch import heartbeat

__all__ = ["Checkpoints", "Position", "Saved", "committed", "read_tensors"]

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in `runs/<name>/checkpoints`. Collective over all ranks, but for `busy` and `poll`.

    A save costs training only the copy made by `begin`:

        checkpoints.prepare(engine)                 # before newest() and the first step
        if due and agreed that no rank is busy:
            checkpoints.begin(engine, position)
        outcome = checkpoints.poll()                # Saved, the CheckpointError of a save that failed, or None
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        attempt: int = 1,
        write_mb_per_s: float | None = None,
        keep_also: Callable[[], Collection[Path]] = tuple,
    ):
        """
        keep: how many checkpoints remain, the newest; at least 1.
        attempt: number of this start of the run; older attempts can no longer write once `prepare` was called.
        write_mb_per_s: most that one rank writes while nobody waits; None: no limit.
        keep_also: names checkpoints that are never removed.
        """
        assert keep >= 1, keep
        self.folder = folder
        self._ranks = Ranks()
        self._fence = Fence(folder, attempt)
        self.writer = Writer(self._fence, self._ranks, keep, write_mb_per_s, keep_also)
        self._memory = HostMemory()
        self._partitions: Partitions | None = None
        self._claimed = False

    def prepare(self, engine: Any) -> None:
        """Shut older attempts out, see that every rank can write, take the memory for copies.

        Raises:
            FencedError: a newer attempt than this one has started.
            CheckpointError: the folder cannot be written to.
        """
        self.claim()
        if self._partitions is None or self._partitions.engine is not engine:
            self._partitions = Partitions(engine)
            snapshot.prepare(self._partitions, self._memory)

    def claim(self) -> None:
        """The first part of `prepare`, which needs no engine."""
        if self._claimed:
            return
        self._ranks.meet()
        self._agreed(self._fence.claim if self._ranks.is_main else lambda: None)
        self._agreed(lambda: self._fence.try_writing(self._ranks.rank))
        self._claimed = True

    @property
    def busy(self) -> bool:
        """Whether this rank still works on a save; others may be done."""
        return self.writer.busy

    @property
    def failures_in_a_row(self) -> int:
        return self.writer.failures_in_a_row

    def begin(self, engine: Any, position: Position) -> None:
        """Copy this rank's share right after an optimizer step, and write it while training goes on.

        All ranks must have agreed on it, none may be busy, and the outcome of the save before was asked for.

        Raises:
            CheckpointError: gradients of the next step are already there, or the position is not JSON.
        """
        began = time.perf_counter()
        heartbeat.enter("snapshot", position.step)
        self.prepare(engine)
        assert self._partitions is not None
        self._partitions.require_between_steps()
        share = snapshot.take(self._partitions, position, self._memory, self._ranks.rank, self._ranks.world_size)
        self.writer.begin(share, blocked_s=time.perf_counter() - began)

    def poll(self) -> Saved | CheckpointError | None:
        """What became of the last save, told once; None while it goes on, or when nothing is new.

        Raises:
            FencedError: a newer attempt has started, so this job must end.
            LostRankError: another rank is gone.
            CheckpointError: the third failure in a row.
        """
        return self.writer.poll()

    def wait(self, timeout_s: float | None = None) -> Saved | CheckpointError | None:
        """As `poll`, once the save is done or the time is over; meanwhile it is written without a limit of rate."""
        return self.writer.wait(timeout_s)

    def save(self, engine: Any, position: Position) -> Path:
        """Write a checkpoint and wait for it. A CheckpointError leaves the older ones untouched."""
        self.begin(engine, position)
        outcome = self.wait()
        if isinstance(outcome, CheckpointError):
            raise outcome
        assert outcome is not None
        return outcome.path

    def newest(self) -> Path | None:
        """The newest checkpoint whose every byte is as it was written; None if none was ever committed. Damaged ones
        are named and passed over. A save in flight is waited for: two threads must not talk in the group at once.

        Raises:
            CheckpointError: there are some, and all are damaged.
        """
        heartbeat.enter("load")
        self.writer.join()
        found = self._ranks.everyone(committed(self.folder) if self._ranks.is_main else [])[0]
        damaged = []
        for path in found:
            heartbeat.enter("load", step_of(path), path.name)
            problems = self._damage(path)
            if not problems:
                return path
            damaged.append(f"{path} is damaged: {'; '.join(problems)}")
            if self._ranks.is_main:
                log.warning("passed over: checkpoint %s", damaged[-1])
        if damaged:
            head = (
                f"none of the {len(found)} checkpoints in {self.folder} can be used, and a run that has some does not "
                "begin again by itself. Bring one back, or move the folder away to start at step 0"
            )
            raise CheckpointError([head, *damaged])
        return None

    def load(self, engine: Any, path: Path) -> Position:
        """Make the engine continue where `path` was saved, at any world size.

        Call it after data loaders and their iterators exist: the last thing it sets are the random generators. Frozen
        weights are not stored; that they are those the checkpoint was made with is verified here. Newer checkpoints that
        `newest` passed over are renamed, once this attempt may write.
        """
        assert not self.busy, "the save in flight must end before a checkpoint is loaded"
        heartbeat.enter("load", step_of(path), path.name)
        problems = [] if self.writer.sound.get(path) else self._damage(path)
        if problems:
            raise DamagedError([f"cannot load {path}: {problem}" for problem in problems])
        reader = TensorReader(path)
        partitions = Partitions(engine)
        settings = reader.manifest["engine"]
        differences = partitions.differences(reader.specs, settings)
        if differences:
            head = f"cannot load {path}: it is of another model. Start from its export instead, or restore the settings"
            raise CheckpointError([head, *differences])
        partitions.restore(reader.specs, settings, reader.read)
        position = Position(**reader.manifest["position"])
        if self._claimed and path.parent == self.folder:
            self._agreed(lambda: self._set_aside_before(path) if self._ranks.is_main else None)
        saved_world_size = reader.manifest["world_size"]
        if saved_world_size == self._ranks.world_size:
            random_state.restore(*reader.random_state(self._ranks.rank))
        else:
            random_state.reseed(position.seed, position.step, self._ranks.rank)
            if self._ranks.is_main:
                log.info(
                    "%s was saved by %d ranks and continues on %d: random generators reseeded from seed %d and step %d",
                    path, saved_world_size, self._ranks.world_size, position.seed, position.step,
                )  # fmt: skip
        return position

    def _set_aside_before(self, path: Path) -> None:
        """The run's books will be cut to `path`: what was passed over must not be found again by a later start, even if
        it can be read then."""
        for newer in itertools.takewhile(lambda found: found != path, committed(self.folder)):
            if self.writer.sound.get(newer, True):
                continue
            target = newer.with_name(f"{SET_ASIDE}{newer.name}")
            self._fence.remove(target)
            try:
                self._fence.rename(newer, target)
            except OSError as error:
                self._fence.require_newest()
                raise CheckpointError(
                    f"{newer} is damaged and newer than {path}, from which the run goes on, and cannot be renamed: "
                    f"{error}. Take it out of the folder, then start again"
                ) from error
            log.warning("%s is kept as %s, for you to look at; it is not used again", newer, target.name)

    def _damage(self, path: Path) -> list[str]:
        """Every rank hashes its share of the files; all get the same answer."""
        shares = self._ranks.everyone(damage(path, self._ranks.rank, self._ranks.world_size))
        problems = list(dict.fromkeys(problem for share in shares for problem in share))
        self.writer.sound[path] = not problems
        return problems

    def _agreed(self, task: Callable[[], None]) -> None:
        """Do it on every rank; if one cannot, all raise what it says."""
        error = None
        try:
            task()
        except CheckpointError as found:
            error = found
        errors = [found for found in self._ranks.everyone(error) if found is not None]
        if errors:
            raise errors[0]


def read_tensors(path: Path) -> TensorReader:
    """Open a checkpoint for export or evaluation: one process, no engine. Every byte is checked first."""
    problems = damage(path)
    if problems:
        raise DamagedError([f"cannot read {path}: {problem}" for problem in problems])
    return TensorReader(path)
