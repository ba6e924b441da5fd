"""Ledger + shards → proof that each sample was trained exactly once per epoch, or the names of those that were not.

What comes in: a run's ledger, and the plan made anew from its shards and settings. What goes out: an `Audit`, with a
line per source. Surprise: three things are compared that need not agree. The ledger's rows are held against the plan's,
one by one; the plan's against the order of the samples, of which it may keep back only what it still carries; and the
order against plain counting, by which every sample of a source is drawn once before any is drawn again.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phi3v_dist.data import identity
from phi3v_dist.data.ledger import Head, LedgerReader, Record, Status
from phi3v_dist.data.plan import Lengths, PlannedRow, PlannedStep, Planner
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import DataError

POSITIONS_AT_A_TIME = 1 << 18
NAMED = 10  # lost or repeated samples named of each kind


class Attempt(NamedTuple):
    """Steps that one start of the run trained, and that survived."""

    number: int
    world_size: int
    first_step: int
    last_step: int


@dataclass(frozen=True)
class SourceAudit:
    """One source, counted over the steps in the ledger.

    samples: usable ones; left_out: unusable or too long for a row, never planned.
    epochs: times that every usable sample was trained; passes: of its stream, so far.
    uses: samples in trained rows, of which `quarantined` and `skipped` were not learned from.
    in_flight: drawn and planned, not yet in a step: the rest of the window, and what is carried to the next.
    lost: drawn, in no row and not in flight. repeated: more often in rows than drawn.
    """

    name: str
    samples: int
    left_out: int
    epochs: int
    passes: float
    uses: int
    quarantined: int
    skipped: int
    in_flight: int
    lost: int
    repeated: int


@dataclass(frozen=True)
class Audit:
    """What a ledger proves. `problems` is empty when every sample was trained as it should be."""

    steps: int
    rows: int
    chain: str
    size_bytes: int
    torn_bytes: int
    attempts: tuple[Attempt, ...]
    sources: tuple[SourceAudit, ...]
    problems: tuple[str, ...]


def audit(
    reader: LedgerReader, table: ShardTable, lengths: Lengths, planner: Planner, checkpoint: Head | None = None,
    listed: Collection[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, num_bytes: None,
) -> Audit:  # fmt: skip
    """Prove a ledger.

    Args:
        planner: the run's plan from its beginning.
        checkpoint: the head that the run's newest checkpoint names; the ledger must reach up to it.
        listed: sample ids in the run's quarantine file; every one quarantined in the ledger must be among them.
        on_progress: told after every record how many bytes of the ledger's file are read.

    Raises:
        DataError: the ledger is damaged or cut short, or is of other shards or settings.
    """
    facts = identity.facts_of(table, lengths, planner)
    if found := identity.differences(reader.facts, facts):
        raise DataError([f"{reader.path} was written with other data than what is found now", *found])
    if checkpoint:
        reader.require(checkpoint)
    plan = _Rows(planner)
    trained = np.zeros(len(table), np.int64)
    not_trained = {status: np.zeros(len(table), np.int64) for status in (Status.QUARANTINED, Status.SKIPPED)}
    attempts: list[Attempt] = []
    problems: list[str] = []
    last, num_rows, chain = reader.start, 0, identity.NO_ROWS_YET
    size_bytes = reader.path.stat().st_size
    for record, head in reader:
        last = head
        on_progress(head.size_bytes, size_bytes)
        num_rows += len(record.rows)
        ids = np.array(record.sample_ids, np.int64)
        if len(ids) and ids.max() >= len(table):
            raise DataError(f"{reader.path}: step {record.step} names sample {ids.max()} of {len(table)}")
        np.add.at(trained, ids, 1)
        for place, status in record.not_trained.items():
            if status != Status.TRAINED:
                not_trained[status][ids[place]] += 1
        _count_attempt(attempts, record)
        chain = identity.chain_rows(chain, record.rows)
        planned = [row.sample_ids for row in plan.take(len(record.rows))]
        if list(record.rows) != planned and not problems:
            row = next(i for i, pair in enumerate(itertools.zip_longest(record.rows, planned)) if pair[0] != pair[1])
            problems.append(f"step {record.step}, row {row + 1} is not what the plan has there, nor need the rest be")
    drawn, in_flight = plan.drawn_and_in_flight(len(table))
    usable = (lengths.tokens > 0) & (lengths.tokens <= planner.row_length_tokens)
    sources, wrong = _by_source(table, usable, trained, not_trained, drawn, in_flight)
    unlisted = np.setdiff1d(np.flatnonzero(not_trained[Status.QUARANTINED]), list(listed or ()))
    if listed is not None and len(unlisted):
        problems.append(f"{len(unlisted)} samples quarantined in the ledger are not listed in the quarantine file")
    return Audit(
        last.step, num_rows, chain, last.size_bytes, reader.torn_bytes, tuple(attempts), sources,
        (*problems, *wrong),
    )  # fmt: skip


def step_of(reader: LedgerReader, step: int) -> Record:
    """The record of one step; everything before it is verified. Raises DataError when there is none."""
    last = 0
    for record, _ in reader:
        last = record.step
        if last == step:
            return record
    raise DataError(f"{reader.path} has no step {step}: it holds steps 1 to {last}")


class _Rows:
    """The plan of a run, row by row as if each were a step: how rows are dealt into steps may change on the way."""

    def __init__(self, planner: Planner):
        self._planner = copy.copy(planner)
        self._planner.rows_per_step = 1
        self._steps: Iterator[PlannedStep] = iter(self._planner)
        self._last: PlannedStep | None = None

    def take(self, count: int) -> list[PlannedRow]:
        """The next rows; fewer at the end of the plan."""
        steps = list(itertools.islice(self._steps, count))
        self._last = steps[-1] if steps else self._last
        return [row for step in steps for row in step.rows]

    def drawn_and_in_flight(self, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Per sample, how often it was drawn up to the end of the window of the last row taken, and how often it is
        planned after that row without having been drawn anew: in the same window's other rows, or carried from it."""
        drawn, in_flight = np.zeros(num_samples, np.int64), np.zeros(num_samples, np.int64)
        if self._last is None:
            return drawn, in_flight
        window, position = self._last.state["window"], self._planner.end
        for step in self._steps:
            if step.state["window"] != window:  # its first row: the state tells what it was carried
                position = step.state["window"] * self._planner.window_samples
                np.add.at(in_flight, self._planner.carried_ids(step.state), 1)
                break
            np.add.at(in_flight, np.array(step.sample_ids, np.int64), 1)
        assert position is not None  # a plan without an end always has another row
        for begin in range(0, position, POSITIONS_AT_A_TIME):
            ids = self._planner.sample_ids(begin, min(begin + POSITIONS_AT_A_TIME, position))
            drawn += np.bincount(ids, minlength=num_samples)
        return drawn, in_flight


def _count_attempt(attempts: list[Attempt], record: Record) -> None:
    if attempts and (attempts[-1].number, attempts[-1].world_size) == (record.attempt, record.world_size):
        attempts[-1] = attempts[-1]._replace(last_step=record.step)
    else:
        attempts.append(Attempt(record.attempt, record.world_size, record.step, record.step))


def _by_source(
    table: ShardTable, usable: np.ndarray, trained: np.ndarray, not_trained: dict[Status, np.ndarray],
    drawn: np.ndarray, in_flight: np.ndarray,
) -> tuple[tuple[SourceAudit, ...], list[str]]:  # fmt: skip
    """The table's lines, and a problem for each sample lost or repeated."""
    source_of_sample = np.repeat(table.source_of_shard, np.diff(table.start))
    lost, repeated = np.zeros_like(trained), np.zeros_like(trained)
    sources = []
    for number in range(len(table.sources)):
        mine = np.flatnonzero(source_of_sample == number)
        used = mine[usable[mine]]
        passes = drawn[mine].sum() / len(mine)
        expected = np.clip(drawn[used], np.floor(passes), np.ceil(passes)).astype(np.int64) - in_flight[used]
        lost[used], repeated[used] = np.maximum(0, expected - trained[used]), np.maximum(0, trained[used] - expected)
        unplanned = mine[~usable[mine]]
        repeated[unplanned] = trained[unplanned]
        shard = int(np.argmax(table.source_of_shard == number))
        sources.append(
            SourceAudit(
                name=table.source_name(shard), samples=len(used), left_out=len(unplanned),
                epochs=int(trained[used].min()) if len(used) else 0, passes=float(passes),
                uses=int(trained[mine].sum()), quarantined=int(not_trained[Status.QUARANTINED][mine].sum()),
                skipped=int(not_trained[Status.SKIPPED][mine].sum()), in_flight=int(in_flight[mine].sum()),
                lost=int(lost[mine].sum()), repeated=int(repeated[mine].sum()),
            )
        )  # fmt: skip
    return tuple(sources), [*_named("lost", lost, table), *_named("repeated", repeated, table)]


def _named(what: str, counts: np.ndarray, table: ShardTable) -> list[str]:
    wrong = np.flatnonzero(counts)
    if not len(wrong):
        return []
    names = ", ".join(table.sample_name(int(i)) for i in wrong[:NAMED])
    more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return [f"{what}: {int(counts.sum())} uses of {len(wrong)} samples ({names}{more})"]
