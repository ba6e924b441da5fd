"""Sources → a table of shards, in which a sample is one number.

What comes in: the `data.train` or `data.validation` sources. What goes out: a `ShardTable`; `sample_id` is a sample's
place in the list of all shards, and its members are byte ranges of a tar. Surprise: tar stays the only data format.
Indexes (index.py) and the manifest (manifest.py) are made when they are missing and can be deleted at any time.
"""

import bisect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context

import numpy as np
import xxhash

from phi3v_dist.config import SourceSettings
from phi3v_dist.data import manifest, patterns, store
from phi3v_dist.data.index import ShardIndex, build_index, load_index
from phi3v_dist.data.manifest import Rows
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable
from phi3v_dist.progress import show_progress

INDEXES_IN_MEMORY = 256
PROCESSES_FROM_BYTES = 16 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadCounts:
    """Over all shards. samples: in all; bad: of these, unusable by the index alone; notes: odd, but used.

    damaged_places: ranges of bytes that could not be read; empty_shards: shards without a single sample.
    """

    samples: int
    bad: int
    notes: int
    damaged_places: int
    empty_shards: int


@dataclass(frozen=True)
class ShardTable:
    """All shards of a list of sources, in order; sample ids count through them.

    shards: addresses; `store.shown` makes one fit for logs.
    start: [shards + 1] first sample id of each shard, and the end.
    source_of_shard: [shards] number of the source each shard belongs to.
    rows: what else is known of each shard without opening its index.
    """

    sources: tuple[SourceSettings, ...]
    shards: tuple[str, ...]
    start: np.ndarray
    source_of_shard: np.ndarray
    rows: Rows = field(default_factory=lambda: Rows.empty(0), repr=False, compare=False)

    @classmethod
    def open(
        cls,
        sources: Sequence[SourceSettings],
        known_digest: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "ShardTable":
        """Find the shards and their indexes, making those that are missing.

        Args:
            known_digest: of a table that another rank has opened just now: if the manifest is that table's, no shard
                is looked at.
            on_progress: told (done, number of shards to index); default: progress.py shows it.

        Raises:
            DataError: one message for each shard that is missing or cannot be read.
        """
        known = manifest.load_rows(sources, known_digest) if known_digest else None
        if known is not None:
            return cls._of(sources, *known)
        listings = patterns.Listings()
        shards, source_of_shard = _find(sources, listings)
        rows, changed = _rows(sources, shards, listings)
        _index(shards, rows, changed, on_progress)
        table = cls._of(sources, shards, source_of_shard, rows)
        empty = [number for number, _ in enumerate(sources) if not table._num_samples(number)]
        if empty:
            raise DataError([table._why_empty(number) for number in empty])
        if changed:
            manifest.save_rows(sources, shards, source_of_shard, rows, table.digest)
        return table

    @classmethod
    def _of(
        cls, sources: Sequence[SourceSettings], shards: Sequence[str], source_of_shard: np.ndarray, rows: Rows
    ) -> "ShardTable":
        start = np.concatenate([[0], np.cumsum(rows.num_samples, dtype=np.int64)])
        return cls(tuple(sources), tuple(shards), start, source_of_shard, rows)

    def __len__(self) -> int:
        return int(self.start[-1])

    @cached_property
    def digest(self) -> str:
        """Of what the sample ids stand for: contents and order of the shards, whatever folder they lie in."""
        columns = self.source_of_shard.astype("<i8").tobytes(), self.rows.digest.astype("<u8").tobytes()
        return xxhash.xxh3_64_hexdigest(b"".join(columns))

    @property
    def bad_counts(self) -> BadCounts:
        """How much of the table is unusable, as far as the indexes know."""
        rows = self.rows
        bad, notes, damaged = (int(c.sum()) for c in (rows.num_bad, rows.num_notes, rows.num_damaged))
        return BadCounts(len(self), bad, notes, damaged, int((rows.num_samples == 0).sum()))

    def faults(self) -> Iterator[tuple[str, str, str]]:
        """(shard, key, what is wrong) of everything the indexes found; the key is "" for damage of the tar itself."""
        rows = self.rows
        for shard in np.flatnonzero(rows.num_bad + rows.num_notes + rows.num_damaged).tolist():
            index, name = self.index(shard), self.shard_name(shard)
            for damage in index.damage:
                yield name, "", f"bytes {damage.begin:,} to {damage.end:,}: {damage.reason}"
            for number, reason in sorted((index.bad | index.notes).items()):
                yield name, index.key(number), reason

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Sample id → (shard number, sample number in it)."""
        shard = bisect.bisect_right(self.start, sample_id) - 1
        return shard, sample_id - int(self.start[shard])

    def shard_name(self, shard: int) -> str:
        """The shard's address, fit for logs."""
        return printable(store.shown(self.shards[shard]))

    def sample_name(self, sample_id: int) -> str:
        """`shard:key`, by which a person finds the sample."""
        shard, number = self.locate(sample_id)
        return f"{self.shard_name(shard)}:{self.index(shard).key(number)}"

    def source_name(self, shard: int) -> str:
        """The source's name, or the stem of its first shard without the trailing number."""
        return self._source_names[int(self.source_of_shard[shard])]

    @cached_property
    def _source_names(self) -> list[str]:
        names = []
        for number, source in enumerate(self.sources):
            first = self.shards[int(np.argmax(self.source_of_shard == number))]
            stem = store.name_of(first).removesuffix(".tar")
            names.append(source.name or re.sub(r"[-_.]?\d*$", "", stem) or stem)
        return names

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard`.

        Raises:
            DataError: the shard is not the one that was there when the table was opened.
        """
        return self._cached_index(shard)

    @cached_property
    def _cached_index(self) -> Callable[[int], ShardIndex]:
        return lru_cache(maxsize=INDEXES_IN_MEMORY)(self._load_index)

    def _load_index(self, shard: int) -> ShardIndex:
        address, size_bytes = self.shards[shard], int(self.rows.tar_size_bytes[shard])
        try:
            index = load_index(address, size_bytes) or build_index(address, size_bytes)
        except OSError as error:
            name = self.shard_name(shard)
            raise DataError(f"{name}: was there when the run began, and is not now ({error})") from error
        if int(index.digest, 16) != int(self.rows.digest[shard]):
            name = self.shard_name(shard)
            raise DataError(f"{name}: the shard changed since the run began; start the run again")
        return index

    def _num_samples(self, source: int) -> int:
        return int(self.rows.num_samples[self.source_of_shard == source].sum())

    def _why_empty(self, source: int) -> str:
        shard = int(np.argmax(self.source_of_shard == source))
        why = [damage.reason for damage in self.index(shard).damage]
        first = f"{self.shard_name(shard)}: {why[0] if why else 'no samples'}"
        return f"data: {', '.join(map(store.shown, self.sources[source].shards))}: no shard holds a sample ({first})"


def find(sources: Sequence[SourceSettings]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(address, bytes, time of change in ns) of every shard; none is opened or indexed. The time of a remote one is 0.

    Raises:
        DataError: one message for each that is missing.
    """
    shards, _ = _find(sources, patterns.Listings())
    return shards, *_look(shards)


def _find(sources: Sequence[SourceSettings], listings: patterns.Listings) -> tuple[list[str], np.ndarray]:
    """All shards in order, and the source of each. Raises DataError."""
    found = [patterns.expand(source.shards, listings) for source in sources]
    if problems := [problem for _, problems in found for problem in problems]:
        raise DataError(problems)
    counts = [len(shards) for shards, _ in found]
    return [shard for shards, _ in found for shard in shards], np.repeat(np.arange(len(sources)), counts)


def _rows(sources: Sequence[SourceSettings], shards: list[str], listings: patterns.Listings) -> tuple[Rows, list[int]]:
    """What the manifest knows of these shards, and the numbers of those whose indexes must be looked at."""
    rows = Rows.empty(len(shards))
    known = manifest.load_rows(sources)
    if known is not None:
        if known[0] == shards:
            here = there = np.arange(len(shards))
        else:
            row_of = {name: row for row, name in enumerate(known[0])}
            there = np.array([row_of.get(name, -1) for name in shards])
            here = np.flatnonzero(there >= 0)
            there = there[here]
        rows.copy_from(known[2], here, there)
    sizes, modified_ns = _look(shards)
    changed = (rows.tar_size_bytes != sizes) | (rows.modified_ns != modified_ns) | (rows.digest == 0)
    rows.tar_size_bytes[:], rows.modified_ns[:] = sizes, modified_ns
    if known is not None:
        changed |= ~_indexed(shards, listings)
    return rows, np.flatnonzero(changed).tolist()


def _look(shards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Size and time of every shard. Raises DataError naming all that are not there."""
    sizes: list[int] = []
    modified_ns: list[int] = []
    remote: list[int] = []
    problems: list[str] = []
    missing: list[str] = []
    for number, shard in enumerate(shards):
        size_bytes = time_ns = 0
        if store.is_remote(shard):
            remote.append(number)
        else:
            try:
                status = os.stat(shard)
                size_bytes, time_ns = status.st_size, status.st_mtime_ns
            except OSError as error:
                problems.append(f"{shard}: cannot be read: {error}")
        sizes.append(size_bytes)
        modified_ns.append(time_ns)
    for number, size in zip(remote, store.sizes([shards[number] for number in remote]), strict=True):
        if size is None:
            missing.append(shards[number])
        else:
            sizes[number] = size
    if missing:
        of = missing[0] if len(missing) == 1 else "remote shards"
        problems.append(patterns.missing_message(of, missing, len(missing) if len(missing) == 1 else len(remote)))
    if problems:
        raise DataError(problems)
    return np.array(sizes, np.int64), np.array(modified_ns, np.int64)


def _indexed(shards: list[str], listings: patterns.Listings) -> np.ndarray:
    """Whether each shard has an index file."""
    if not any(map(store.is_remote, shards)) and listings.all_indexed():
        return np.ones(len(shards), bool)
    indexed: dict[str, set[str]] = {}
    found: list[bool] = []
    for shard in shards:
        folder, _, name = shard.partition("?")[0].rpartition("/") if store.is_remote(shard) else shard.rpartition("/")
        if folder not in indexed:
            indexed[folder] = listings.indexed(folder)
        found.append(name in indexed[folder])
    return np.array(found, bool)


def _index(shards: list[str], rows: Rows, changed: list[int], on_progress: Callable[[int, int], None] | None) -> None:
    """Fill the rows of changed shards from their indexes; those that are missing are made. Raises DataError."""
    to_make = []
    for shard in changed:
        index = load_index(shards[shard], int(rows.tar_size_bytes[shard]))
        if index is None:
            to_make.append(shard)
        else:
            rows.fill(shard, index)
    problems: list[str] = []
    size_bytes = sum(int(rows.tar_size_bytes[shard]) for shard in to_make)
    with show_progress("shards") as report, _pool(size_bytes) as pool:
        tell = on_progress or partial(report, "indexing")
        futures = [pool.submit(build_index, shards[shard], int(rows.tar_size_bytes[shard])) for shard in to_make]
        for done, (shard, future) in enumerate(zip(to_make, futures, strict=True), 1):
            name = store.shown(shards[shard])
            log.debug("indexing %s", name)
            try:
                index = future.result()
                rows.fill(shard, index)
                if index.damage:
                    log.warning("%s: %s", name, _summary(index))
            except DataError as error:
                problems += error.problems
            except (OSError, BrokenExecutor) as error:
                problems.append(f"{name}: cannot be read: {error}")
            tell(done, len(to_make))
    if problems:
        raise DataError(problems)


def _pool(size_bytes: int) -> Executor:
    """Threads wait well but parse headers one at a time, at about a gigabyte a second; processes take time to start."""
    num_cores = len(os.sched_getaffinity(0))
    if size_bytes < PROCESSES_FROM_BYTES or num_cores == 1:
        return ThreadPoolExecutor(num_cores, "index")
    return ProcessPoolExecutor(num_cores, get_context("spawn"))


def _summary(index: ShardIndex) -> str:
    begin, end, reason = index.damage[0][:3]
    places = f"damaged in {len(index.damage)} places" if len(index.damage) > 1 else "damaged"
    used = f"{len(index) - len(index.bad):,} of its {len(index):,} samples are used" if len(index) else "not used"
    return f"{places}, bytes {begin:,} to {end:,}: {reason}; {used}"
