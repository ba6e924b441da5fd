"""Samples that could not be used → `quarantine.jsonl`, each once, and the rule that stops a run with too many.

What comes in: what the index, the lengths and the decoders found. What goes out: one JSON line per bad sample, and an
error when a share of them is damage and no longer bad luck. Surprise: the file follows the checkpoints as the ledger
does. A line written after the newest one is cut off at a resume; if its sample is still bad, it is soon listed again.

Format version 1, in docs/data-formats.md. Words of the data are escaped, so that none can pass for a line or a colour.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable

QUARANTINE_NAME = "quarantine.jsonl"
SHOWN = 5  # reasons, shards and names in a summary
REASON_CHARS = 100  # of a reason in a summary; longer ones differ only in details

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One bad sample: a line of the file.

    stage: where it was found: in the shard's index, when lengths were measured, or when it was to be trained.
    first_step: the first step it was missing from; None when it was never planned.
    """

    sample_id: int
    shard: str
    key: str
    reason: str
    stage: Literal["index", "length", "decode"]
    first_step: int | None = None


class Head(NamedTuple):
    """How much of the file a checkpoint stands for."""

    num_listed: int
    size_bytes: int
    digest: str


class Quarantine:
    """The file while a run writes it. Rank 0 alone has one."""

    def __init__(self, path: Path, head: Head | None):
        """Begin a new file, or go on from a checkpoint's head.

        Raises:
            DataError: the file cannot be written.
        """
        self.path = path
        self._listed: set[int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._keep(head)
            self._file = path.open("ab")
            self._file.truncate(len(kept))
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error
        self._digest = xxhash.xxh3_64(kept)
        self._size_bytes = len(kept)

    def _keep(self, head: Head | None) -> bytes:
        """The beginning of the file that a resume goes on from."""
        content = self.path.read_bytes() if head and self.path.exists() else b""
        if head is None:
            return b""
        kept = content[: head.size_bytes]
        if (len(kept), xxhash.xxh3_64_hexdigest(kept)) != (head.size_bytes, head.digest):
            kept = content[: content.rfind(b"\n") + 1]
            log.warning(
                "%s is not as the checkpoint left it (%d samples were listed): it is kept as it is, and those that are "
                "missing are listed again when they are met again",
                *(self.path, head.num_listed),
            )
        self._listed = {entry["sample_id"] for entry in entries(kept)}
        return kept

    def add(self, found: Iterable[Entry]) -> None:
        """List those that are not listed yet, each as it comes: there may be millions."""
        try:
            for entry in found:
                if entry.sample_id not in self._listed:
                    self._listed.add(entry.sample_id)
                    line = (json.dumps(asdict(entry)) + "\n").encode()  # ASCII: control characters, surrogates escaped
                    self._file.write(line)
                    self._digest.update(line)
                    self._size_bytes += len(line)
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self.path}: bad samples cannot be listed: {error}") from error

    def add_unusable(self, table: ShardTable, lengths: Lengths) -> None:
        """List the samples that no plan holds and that are not listed yet; only of these the indexes are opened."""
        self.add(unusable(table, lengths, self._listed))

    def sync(self) -> Head:
        """When this returns all lines are on the disk, and a checkpoint may name the head."""
        os.fsync(self._file.fileno())
        return Head(len(self._listed), self._size_bytes, self._digest.hexdigest())

    def summary(self, stages: tuple[str, ...] = ("decode",)) -> str:
        """What is listed, in words: by reason, by shard, and the first names."""
        listed = [Entry(**entry) for entry in entries(self.path.read_bytes())]
        return summarize([entry for entry in listed if entry.stage in stages]) + f"; all are in {self.path}"

    def close(self) -> None:
        self._file.close()


def entries(content: bytes) -> Iterator[dict[str, Any]]:
    """Every whole line of a file's content that can be read."""
    for line in content.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
            Entry(**entry)
        except (ValueError, TypeError, RecursionError):
            log.warning("a line of the quarantine cannot be read and is left out: %r", line[:80])
            continue
        yield entry


def unusable(table: ShardTable, lengths: Lengths, known: Container[int] = ()) -> Iterator[Entry]:
    """The samples that no plan holds, by id, but for those that are known.

    What `data.fit` leaves out is policy and not among them. A shard's index is opened when its first sample is asked
    for, and once: ids count through one shard after another.
    """
    for sample_id in sorted(lengths.bad):
        if sample_id not in known:
            yield entry_of(table, sample_id, lengths.bad[sample_id])


def entry_of(table: ShardTable, sample_id: int, reason: str, first_step: int | None = None) -> Entry:
    """A bad sample's line; with a step it was found when it was to be trained."""
    shard, number = table.locate(sample_id)
    index = table.index(shard)
    early: Literal["index", "length"] = "index" if number in index.bad else "length"
    stage = early if first_step is None else "decode"
    return Entry(sample_id, table.shard_name(shard), index.key(number), reason, stage, first_step)


def summarize(bad: Iterable[Entry]) -> str:
    """Counts by reason and by shard, and the first names; words of the data escaped."""
    bad = list(bad)
    return _in_words(Counter(entry.reason for entry in bad), Counter(entry.shard for entry in bad), bad[:SHOWN])


def summarize_unusable(table: ShardTable, lengths: Lengths) -> str:
    """As `summarize` of all `unusable`, but however many there are, only the first ones' indexes are opened."""
    shard_of = np.searchsorted(table.start, np.fromiter(lengths.bad, np.int64), side="right") - 1
    numbers, counts = np.unique(shard_of, return_counts=True)
    shards = Counter({table.shard_name(shard): n for shard, n in zip(numbers.tolist(), counts.tolist(), strict=True)})
    return _in_words(Counter(lengths.bad.values()), shards, list(islice(unusable(table, lengths), SHOWN)))


def _in_words(reasons: Counter[str], shards: Counter[str], first: list[Entry]) -> str:
    alike: Counter[str] = Counter()
    for reason, count in reasons.items():
        alike[printable(reason)[:REASON_CHARS]] += count
    names = ", ".join(printable(f"{entry.shard}:{entry.key}") for entry in first)
    return f"by reason: {_most(alike)}; by shard: {_most(shards)}; the first: {names}"


def _most(counts: Counter[str]) -> str:
    shown = ", ".join(f"{count} x {printable(what)}" for what, count in counts.most_common(SHOWN))
    return shown + (f", and {len(counts) - SHOWN} others" if len(counts) > SHOWN else "")


def too_many(num_bad: int, num_seen: int, limit_frac: float, at_end: bool = False) -> bool:
    """Whether so many bad samples are more than the limit allows.

    While a run goes on, five standard deviations and two samples are left to chance: a set with just the limit must be
    able to end, and it is looked at after every step (with three and one, 25 of 1,000 orders of 10,000 samples were
    stopped for nothing; with these none, and 5 % are found after 240 samples on average). At the end counts are
    compared as they are; one sample is never too many, unless the limit is 0.
    """
    expected = limit_frac * num_seen
    if limit_frac == 0:
        return num_bad > 0
    return num_bad > (max(1.0, expected) if at_end else expected + 5 * math.sqrt(expected) + 2)
