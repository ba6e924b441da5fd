"""Lengths and order → rows → optimizer steps, the same on every rank, whatever the world size.

What comes in: the endless stream of sample ids and how long each sample is. What goes out: `PlannedStep`s of exactly
`rows_per_step` rows. Surprise: nothing here knows how many ranks there are. `assign` deals a planned step out to any
number of them, and short ones get empty rows, so a run may go on at another world size with the same batches.

Packing is best-fit decreasing within a window of samples; rows under `FULL_FRAC`, the emptiest first, are taken apart
again and their samples carried to the next window, at most `MAX_CARRIES` times. The state is where the current window
began and what was carried into it, so that a restart plans one window again and reads no data.
"""

import bisect
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from phi3v_dist.errors import DataError

FULL_FRAC = 0.99
MAX_CARRIES = 4
SIZE_CLASSES = 32
CARRY_FRAC = 0.25  # of a window's samples; to carry all fills rows no better and takes twice the time (12 mixes tried)

SampleIds = Callable[[int, int], np.ndarray]  # (begin, end) → ids at these positions of the run
Carry = list[list[int]]  # sample ids carried once, twice, …


@dataclass(frozen=True)
class Lengths:
    """Per sample id: tokens of the whole example, tokens that are trained, crops through the vision tower.

    full_tokens: `tokens` before `data.fit` cut anything.
    bad: sample id → reason, for samples of length 0 that no row will hold.
    """

    tokens: np.ndarray
    label_tokens: np.ndarray
    crops: np.ndarray
    full_tokens: np.ndarray
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def digest(self) -> str:
        """Of all that planning depends on."""
        columns = (self.tokens, self.label_tokens, self.crops)
        return xxhash.xxh3_64_hexdigest(b"".join(column.astype("<i4").tobytes() for column in columns))


@dataclass(frozen=True)
class PlannedRow:
    """Samples that will share a row, and its size."""

    sample_ids: tuple[int, ...]
    tokens: int
    label_tokens: int
    crops: int


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step of the whole job.

    label_tokens: what the loss is divided by.
    state: hand it to `Planner` to go on with the step after this one.
    """

    number: int
    rows: tuple[PlannedRow, ...]
    label_tokens: int
    tokens: int
    state: dict[str, Any]

    @property
    def sample_ids(self) -> tuple[int, ...]:
        return tuple(i for row in self.rows for i in row.sample_ids)


class Planner:
    """Iterates over the planned steps, from a state on.

    Args:
        sample_ids: the run's stream (`Order.sample_ids`).
        end: position at which the stream ends; None: never.
    """

    def __init__(
        self, sample_ids: SampleIds, lengths: Lengths, *, rows_per_step: int, row_length_tokens: int,
        window_samples: int, packing: bool, seed: int, end: int | None = None, state: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.sample_ids, self.lengths = sample_ids, lengths
        self.rows_per_step, self.row_length_tokens = rows_per_step, row_length_tokens
        self.window_samples, self.packing, self.seed, self.end = window_samples, packing, seed, end
        self.state = state or {"step": 0, "window": 0, "rows_used": 0, "carry": []}  # JSON

    def resume(self, state: dict[str, Any]) -> "Planner":
        """The same plan from the step after the one that left this state."""
        other = copy.copy(self)
        other.state = state
        return other

    def __iter__(self) -> Iterator[PlannedStep]:
        number, window, rows_used, carry = (self.state[k] for k in ("step", "window", "rows_used", "carry"))
        waiting: list[PlannedRow] = []
        if not ((self.lengths.tokens > 0) & (self.lengths.tokens <= self.row_length_tokens)).any():
            raise DataError(  # an endless stream would be searched for ever
                f"none of {len(self.lengths)} samples can be used in rows of {self.row_length_tokens} tokens; "
                "raise `data.row_length_tokens`, or mend the samples"
            )
        while self.end is None or window * self.window_samples < self.end:
            rows, next_carry = self._plan_window(window, carry)
            while len(waiting) + len(rows) - rows_used >= self.rows_per_step:
                take = self.rows_per_step - len(waiting)
                waiting += rows[rows_used : rows_used + take]
                rows_used += take
                number += 1
                state = {"step": number, "window": window, "rows_used": rows_used, "carry": carry}
                yield self._step(number, waiting, state)
                waiting = []
            waiting += rows[rows_used:]
            window, rows_used, carry = window + 1, 0, next_carry
        if waiting:
            number += 1
            yield self._step(number, waiting, {"step": number, "window": window, "rows_used": 0, "carry": []})

    def _step(self, number: int, rows: list[PlannedRow], state: dict[str, Any]) -> PlannedStep:
        labels, tokens = sum(row.label_tokens for row in rows), sum(row.tokens for row in rows)
        return PlannedStep(number, tuple(rows), labels, tokens, state)

    def _plan_window(self, window: int, carry: Carry) -> tuple[list[PlannedRow], Carry]:
        """Rows of a window, in training order, and what is carried to the next."""
        begin = window * self.window_samples
        stop = begin + self.window_samples if self.end is None else min(begin + self.window_samples, self.end)
        ids = self.sample_ids(begin, stop)
        tokens = self.lengths.tokens[ids]
        fresh = ids[(tokens > 0) & (tokens <= self.row_length_tokens)].tolist()
        if not self.packing:
            return [self._row([sample_id]) for sample_id in fresh], []
        last = self.end is not None and stop >= self.end
        rows: list[PlannedRow] = []
        next_carry: Carry = [[] for _ in range(MAX_CARRIES)]
        entries = [(sample_id, times) for times, ids in enumerate([fresh, *carry]) for sample_id in ids]
        bins = pack(self.lengths.tokens[[sample_id for sample_id, _ in entries]].tolist(), self.row_length_tokens)
        made = [([entries[place] for place in bin_], self._row([entries[place][0] for place in bin_])) for bin_ in bins]
        for together, row in sorted(made, key=lambda pair: pair[1].tokens):
            full = last or row.tokens >= FULL_FRAC * self.row_length_tokens
            enough = sum(map(len, next_carry)) >= CARRY_FRAC * self.window_samples
            if full or enough or max(times for _, times in together) == MAX_CARRIES:
                rows.append(row)
            else:
                for sample_id, times in together:
                    next_carry[times].append(sample_id)
        shuffle = np.random.default_rng([self.seed, window]).permutation(len(rows))
        return [rows[i] for i in shuffle], next_carry

    def _row(self, sample_ids: list[int]) -> PlannedRow:
        lengths = self.lengths
        tokens, labels, crops = (
            int(c[sample_ids].sum()) for c in (lengths.tokens, lengths.label_tokens, lengths.crops)
        )
        return PlannedRow(tuple(sample_ids), tokens, labels, crops)


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each size, greatest first, into the fullest bin that still has room.

    Sizes within 1 / `SIZE_CLASSES` of the capacity count as equal and keep the input's order, which is shuffled. Sorted
    to the token, rows would fill up with samples of one length, and so often of one kind: on the sample catalogue the
    loss then jumped from 0.5 to 1.3 whenever the lengths moved on. It costs at most 0.6 points of fill.

    The same input gives the same bins, lists of places in `sizes`.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (capacity left, bin), sorted
    for place in sorted(range(len(sizes)), key=lambda i: -(sizes[i] * SIZE_CLASSES // capacity)):
        tightest = bisect.bisect_left(room, (sizes[place], -1))
        if tightest < len(room):
            left, chosen = room.pop(tightest)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(place)
        bisect.insort(room, (left - sizes[place], chosen))
    return bins


def accumulation(rows_per_step: int, num_consumers: int) -> int:
    """Micro-steps in a step: every consumer takes one row in each."""
    return -(-rows_per_step // num_consumers)


def overfit(planner: Planner) -> Iterator[PlannedStep]:
    """The first step again and again, under new numbers; its state leads back to it."""
    for first in itertools.islice(planner, 1):
        for number in itertools.count(first.number):
            yield replace(first, number=number, state=planner.state | {"step": number})


def num_vision_chunks(micro_step: Sequence[PlannedRow | None], chunk_crops: int | None) -> int:
    """Calls of the vision tower that every consumer makes in this micro-step: enough for the row with most crops.

    It follows from the plan, which all ranks have: nobody has to ask, and a quarantined picture changes nothing.
    chunk_crops: most crops in a call; None: no limit.
    """
    most = max((row.crops for row in micro_step if row), default=0)
    return max(1, -(-most // chunk_crops)) if chunk_crops else 1


def assign(step: PlannedStep, num_consumers: int, micro_steps: int) -> list[list[PlannedRow | None]]:
    """Deal the rows of a step to consumers: [micro-step][consumer], None where a consumer gets an empty row.

    ZeRO-3 keeps ranks together in every micro-step, so rows of like size share one: sorted, then cut in slices, with
    the place in the slice rotating so that no rank is always handed the largest.
    """
    assert len(step.rows) <= num_consumers * micro_steps  # `accumulation` sees to it
    rows = sorted(step.rows, key=lambda row: (-row.tokens, -row.crops, row.sample_ids))
    table: list[list[PlannedRow | None]] = []
    for begin in range(0, micro_steps * num_consumers, num_consumers):
        slice_: list[PlannedRow | None] = list(rows[begin : begin + num_consumers])
        slice_ += [None] * (num_consumers - len(slice_))
        turn = (step.number + len(table)) % num_consumers
        table.append(slice_[turn:] + slice_[:turn])
    return table
