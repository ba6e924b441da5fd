"""A run between two steps ↔ a folder: save, verify, resume at any world size.

In: an engine and the run's position. Out: `step-00000050/` with one file of tensors per rank and a manifest that was
written last. A folder counts once it has that name, and all its files were read back from the disk before it got it.

Surprise: ranks never decide alone. Which step is saved, whether all shares were written and which checkpoint is resumed
is exchanged first, so that one rank's full disk fails the save on every rank and not the job in a collective.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import Partitions, ReadElements
from phi3v_dist.progress import BYTES, show_progress, summed
from phi3v_dist.survive import random_state, snapshot
from phi3v_dist.survive.agreement import Ranks
from phi3v_dist.survive.best_file import BEST_NAME, best_checkpoint
from phi3v_dist.survive.fence import Fence, FencedError
from phi3v_dist.survive.manifest import DamagedError, damage
from phi3v_dist.survive.rank_files import TensorReader
from phi3v_dist.survive.retention import SET_ASIDE, committed, newest_first, step_of
from phi3v_dist.survive.snapshot import HostMemory, Position
from phi3v_dist.survive.started import Started, read_started, write_started
from phi3v_dist.survive.store import NodeStore, Store
from phi3v_dist.survive.writer import Saved, Writer
from phi3v_dist.watch import heartbeat

__all__ = ["Checkpoints", "Position", "Saved", "committed", "read_tensors"]

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run, in `runs/<name>/checkpoints`. Collective over all ranks, but for `busy` and `poll`.

    A save costs training only the copy made by `begin`:

        checkpoints.prepare(engine)                 # before resume() and the first step
        found = checkpoints.resume(engine)          # once, also when there is nothing to resume from
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
        local: Path | None = None,
        shared_every: int = 1,
    ):
        """
        keep: how many checkpoints remain, the newest; at least 1.
        attempt: number of this start of the run; older attempts can no longer write once `prepare` was called.
        write_mb_per_s: most that one rank writes while nobody waits; None: no limit.
        keep_also: names checkpoints that are never removed.
        local: folder on this node's own disk, for fast copies; of saves, the first and then each `shared_every`-th go
            to `folder`, and the next one after a save that failed.
        """
        assert keep >= 1, keep
        self.folder = folder
        self._ranks = Ranks()
        self._attempt = attempt
        self._shared = Store(Fence(folder, attempt), self._ranks, keep, keep_also)
        self._local = NodeStore(local, attempt, self._ranks) if local else None
        self._shared_every = shared_every
        self._num_local = shared_every - 1  # saves to the nodes since the last one to the run folder
        self.writer = Writer(self._shared, self._ranks, write_mb_per_s)
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
        self._shared.claim()
        if self._local:
            self._claim_local(self._local)
        self._claimed = True

    def _claim_local(self, store: NodeStore) -> None:
        """Copies on the nodes only make saves faster: without them a run goes on."""
        try:
            store.claim()
        except FencedError:
            raise
        except CheckpointError as error:
            self._local = None
            if self._ranks.is_main:
                log.warning("every save goes to %s, since `checkpoint.local` cannot be used: %s", self.folder, error)

    @property
    def busy(self) -> bool:
        """Whether this rank still works on a save; others may be done."""
        return self.writer.busy

    @property
    def failures_in_a_row(self) -> int:
        return self.writer.failures_in_a_row

    def begin(self, engine: Any, position: Position, must_last: bool = False) -> bool:
        """Copy this rank's share right after an optimizer step, and write it while training goes on; says whether to
        the run folder.

        All ranks must have agreed on it, none may be busy, and the outcome of the save before was asked for.
        must_last: into the run folder, whatever place is next.

        Raises:
            CheckpointError: gradients of the next step are already there, or the position is not JSON.
        """
        began = time.perf_counter()
        heartbeat.enter("snapshot", position.step)
        self.prepare(engine)
        assert self._partitions is not None
        self._partitions.require_between_steps()
        share = snapshot.take(self._partitions, position, self._memory, self._ranks.rank, self._ranks.world_size)
        store = self._next_store(must_last)
        self.writer.begin(share, time.perf_counter() - began, store)
        return store.is_shared

    def _next_store(self, must_last: bool) -> Store:
        due = self._num_local + 1 >= self._shared_every
        if self._local is None or must_last or due or self.failures_in_a_row:
            self._num_local = 0
            return self._shared
        self._num_local += 1
        return self._local

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
        """The newest checkpoint whose every byte is as it was written; None if none was ever committed. Others are
        named and passed over. One on the nodes' own disks counts if every rank finds its own file where it runs.
        A save in flight is waited for: two threads must not talk in the group at once.

        Raises:
            CheckpointError: there are some, and none can be used.
        """
        heartbeat.enter("load")
        self.writer.join()
        started = self._started()
        found = [(store, name) for store in self._stores for name in store.found()]
        passed_over = []
        for store, name in sorted(found, key=lambda each: newest_first(each[1])):
            path = store.folder / name
            heartbeat.enter("load", step_of(path), name)
            problems = store.problems(path, started)
            if not problems:
                return path
            passed_over.append(f"{path} {store.unusable}: {'; '.join(problems)}")
            if self._ranks.is_main:
                log.warning("passed over: checkpoint %s", passed_over[-1])
        if passed_over:
            head = (
                f"none of the {len(found)} checkpoints in {self.folder} can be used, and a run that has some does not "
                "begin again by itself. Bring one back, or move the folder away to start at step 0"
            )
            raise CheckpointError([head, *passed_over])
        return None

    def resume(self, engine: Any) -> tuple[Path, Position] | None:
        """Begin an attempt: load `newest`, if there is one, and from here on count no copies on nodes but that one and
        those still to come. Newer ones that were passed over are renamed.

        Raises:
            CheckpointError: as `newest` and `load`.
        """
        self.claim()
        path = self.newest()
        position = self.load(engine, path) if path else None
        self._ranks.agreed(lambda: self._set_aside_before(position.step) if position and self._ranks.is_main else None)
        started = Started(self._attempt, position.step if position else 0, position.attempt if position else 0)
        self._ranks.agreed(lambda: write_started(self._shared.fence, started) if self._ranks.is_main else None)
        if self._local:
            self._local.remove(but=path)
        return (path, position) if path and position else None

    def finish(self) -> None:
        """The run is complete, so its copies on the nodes are not needed any more, nor is a best that was surpassed."""
        if self._claimed:
            self._shared.tidy()
        if self._local and self._claimed:
            self._local.clear()

    def load(self, engine: Any, path: Path) -> Position:
        """Make the engine continue where `path` was saved, at any world size.

        Call it after data loaders and their iterators exist: the last thing it sets are the random generators. Frozen
        weights are not stored; that they are those the checkpoint was made with is verified here.
        """
        assert not self.busy, "the save in flight must end before a checkpoint is loaded"
        heartbeat.enter("load", step_of(path), path.name)
        store = self._local if self._local and path.parent == self._local.folder else self._shared
        problems = [] if store.sound.get(path) else store.problems(path, self._started())
        if problems:
            raise DamagedError([f"cannot load {path}: {problem}" for problem in problems])
        reader = TensorReader(path, store.required())
        partitions = Partitions(engine)
        settings = reader.manifest["engine"]
        differences = partitions.differences(reader.specs, settings)
        if differences:
            head = f"cannot load {path}: it is of another model. Start from its export instead, or restore the settings"
            raise CheckpointError([head, *differences])
        with show_progress(BYTES) as report:
            read = _counted(self._with_buffers(reader), summed(report, f"loading {path.name}", None))
            partitions.restore(reader.specs, settings, read)
        position = Position(**reader.manifest["position"])
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

    @property
    def _stores(self) -> list[Store]:
        return [self._shared, *filter(None, [self._local])]

    def _set_aside_before(self, step: int) -> None:
        """The run's books will be cut to this step: what was passed over must not be found again by a later start,
        even if it can be read then."""
        fence = self._shared.fence
        for newer in committed(self.folder):
            if (step_of(newer) or 0) <= step or self._shared.sound.get(newer, True):
                continue
            target = newer.with_name(f"{SET_ASIDE}{newer.name}")
            fence.remove(target)
            try:
                if best_checkpoint(self.folder) == newer:
                    fence.withdraw(BEST_NAME)
                fence.rename(newer, target)
            except OSError as error:
                fence.require_newest()
                raise CheckpointError(
                    f"{newer} is damaged and newer than step {step}, from which the run goes on, and cannot "
                    f"be renamed: {error}. Take it out of the folder, then start again"
                ) from error
            log.warning("%s is kept as %s, for you to look at; it is not used again", newer, target.name)

    def _started(self) -> Started | None:
        return self._ranks.first(read_started(self.folder) if self._ranks.is_main else None)

    def _with_buffers(self, reader: TensorReader) -> ReadElements:
        """As `reader.read`, but buffers are read by rank 0 for all: only its file has them, and may be elsewhere."""
        names = [name for name, spec in reader.specs.items() if spec.role == "buffer"]
        buffers: dict[str, Tensor] = {}

        def read_buffers() -> None:
            buffers.update({name: reader.stored(name).flatten() for name in names})

        self._ranks.agreed(read_buffers if self._ranks.is_main else lambda: None)
        everyones = self._ranks.first(buffers)
        return lambda name, state, start, length: (
            everyones[name][start : start + length] if name in everyones else reader.read(name, state, start, length)
        )


def _counted(read: ReadElements, add: Callable[[int], None]) -> ReadElements:
    """`read`, which also tells `add` how many bytes it gave."""

    def counted(name: str, state: str, start: int, length: int) -> Tensor:
        elements = read(name, state, start, length)
        add(elements.nbytes)
        return elements

    return counted


def read_tensors(path: Path) -> TensorReader:
    """Open a checkpoint for export or evaluation: one process, no engine. Every byte is checked first."""
    problems = damage(path)
    if problems:
        raise DamagedError([f"cannot read {path}: {problem}" for problem in problems])
    return TensorReader(path)
