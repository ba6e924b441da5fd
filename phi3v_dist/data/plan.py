"""Lengths and order → rows → optimizer steps, the same on every rank, whatever the world size.

What comes in: the endless stream of sample ids and how long each sample is. What goes out: `PlannedStep`s of exactly
`rows_per_step` rows. Surprise: nothing here knows how many ranks there are. `assign` deals a planned step out to any
number of them, and short ones get empty rows, so a run may go on at another world size with the same batches.

Packing (packing.py) looks at a window of samples; rows under `FULL_FRAC`, the emptiest first, are taken apart again and
their samples wait for the next window, at most `MAX_CARRIES` times. The state is where the current window began and
which samples waited then, so that a restart plans one window again and reads no data.
"""

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from phi3v_dist.data import packing
from phi3v_dist.errors import DataError

PLAN_FORMAT = 2  # counts changes to the rules below or in packing.py: other rows from the same data

FULL_FRAC = 0.99
MAX_CARRIES = 4
CARRY_FRAC = 0.25  # of a window's samples; to carry all fills rows no better and takes twice the time (12 mixes tried)
CHUNK = 1 << 20  # entries of a column looked at together: columns may be files larger than memory

SampleIds = Callable[[int, int], np.ndarray]  # (begin, end) → ids at these positions of the run
Waiting = np.ndarray  # [samples, 2] position in the run and id, in the order of positions
RowCost = Callable[["PlannedRow"], int]


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
        digest = xxhash.xxh3_64()
        for column in (self.tokens, self.label_tokens, self.crops):
            for begin in range(0, len(column), CHUNK):
                digest.update(np.ascontiguousarray(column[begin : begin + CHUNK], "<i4").data)
        return digest.hexdigest()

    def any_usable(self, limit_tokens: int) -> bool:
        """Whether there is a sample that fits into a row; it looks no further than to the first."""
        chunks = (self.tokens[begin : begin + CHUNK] for begin in range(0, len(self), CHUNK))
        return any(((chunk > 0) & (chunk <= limit_tokens)).any() for chunk in chunks)


@dataclass(frozen=True)
class PlannedRow:
    """Samples that will share a row, and its size.

    squared_tokens: sum of the samples' squared lengths, which attention's work follows.
    """

    sample_ids: tuple[int, ...]
    tokens: int
    squared_tokens: int
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
        order_digest: of what decides that stream (`Order.digest`); only for `digest`.
        end: position at which the stream ends; None: never.
    """

    def __init__(
        self, sample_ids: SampleIds, lengths: Lengths, *, rows_per_step: int, row_length_tokens: int,
        window_samples: int, packing: bool, seed: int, end: int | None = None, state: dict[str, Any] | None = None,
        order_digest: str = "",
    ):  # fmt: skip
        self.sample_ids, self.lengths, self.order_digest = sample_ids, lengths, order_digest
        self.rows_per_step, self.row_length_tokens = rows_per_step, row_length_tokens
        self.window_samples, self.packing, self.seed, self.end = window_samples, packing, seed, end
        self.state = state or {"step": 0, "window": 0, "rows_used": 0, "carry": ""}  # JSON

    @cached_property
    def digest(self) -> str:
        """Of all that decides the rows. `rows_per_step` is not in it: it cuts the same rows into other steps."""
        rules = [PLAN_FORMAT, FULL_FRAC, MAX_CARRIES, CARRY_FRAC, *packing.RULES]
        chosen = [self.row_length_tokens, self.window_samples, self.packing, self.seed, self.end]
        parts = [rules, chosen, self.order_digest, self.lengths.digest]
        return xxhash.xxh3_64_hexdigest(json.dumps(parts).encode())

    def resume(self, state: dict[str, Any]) -> "Planner":
        """The same plan from the step after the one that left this state."""
        other = copy.copy(self)
        other.state = state
        return other

    def carried_ids(self, state: dict[str, Any]) -> np.ndarray:
        """Ids of the samples that were carried into the window in which a state stands."""
        return self._read_carry(state["carry"], state["window"])[:, 1]

    def __iter__(self) -> Iterator[PlannedStep]:
        number, window, rows_used = (self.state[key] for key in ("step", "window", "rows_used"))
        if not self.lengths.any_usable(self.row_length_tokens):
            raise DataError(  # an endless stream would be searched for ever
                f"none of {len(self.lengths)} samples can be used in rows of {self.row_length_tokens} tokens; "
                "raise `data.row_length_tokens`, or mend the samples"
            )
        carried = self._read_carry(self.state["carry"], window)
        waiting: list[PlannedRow] = []
        while self.end is None or window * self.window_samples < self.end:
            rows, next_carried = self._plan_window(window, carried)
            carry = self._write_carry(carried, window)
            while len(waiting) + len(rows) - rows_used >= self.rows_per_step:
                take = self.rows_per_step - len(waiting)
                waiting += rows[rows_used : rows_used + take]
                rows_used += take
                number += 1
                state = {"step": number, "window": window, "rows_used": rows_used, "carry": carry}
                yield self._step(number, waiting, state)
                waiting = []
            waiting += rows[rows_used:]
            window, rows_used, carried = window + 1, 0, next_carried
        if waiting:
            number += 1
            yield self._step(number, waiting, {"step": number, "window": window, "rows_used": 0, "carry": ""})

    def _step(self, number: int, rows: list[PlannedRow], state: dict[str, Any]) -> PlannedStep:
        labels, tokens = sum(row.label_tokens for row in rows), sum(row.tokens for row in rows)
        return PlannedStep(number, tuple(rows), labels, tokens, state)

    def _plan_window(self, window: int, carried: Waiting) -> tuple[list[PlannedRow], Waiting]:
        """Rows of a window, in training order, and what is carried to the next."""
        begin = window * self.window_samples
        stop = begin + self.window_samples if self.end is None else min(begin + self.window_samples, self.end)
        ids = self.sample_ids(begin, stop)
        tokens = self.lengths.tokens[ids]
        fresh = np.stack([np.arange(begin, stop), ids], axis=1)[(tokens > 0) & (tokens <= self.row_length_tokens)]
        samples = np.concatenate([carried, fresh])
        if self.packing:
            sizes = self.lengths.tokens[samples[:, 1]].tolist()
            together = packing.pack(sizes, self.row_length_tokens)
        else:
            together = [[place] for place in range(len(samples))]
        rows = self._rows(samples[:, 1], together)
        is_last = self.end is not None and stop >= self.end
        again = self._taken_apart(rows, together, samples[:, 0], window) if self.packing and not is_last else set()
        kept = [row for number, row in enumerate(rows) if number not in again]
        carried = samples[sorted(place for number in again for place in together[number])]
        shuffle = np.random.default_rng([self.seed, window]).permutation(len(kept))
        return [kept[i] for i in shuffle], carried

    def _rows(self, sample_ids: np.ndarray, together: list[list[int]]) -> list[PlannedRow]:
        """The rows of a whole window at once; numpy's cost is by the call."""
        if not together:
            return []
        borders = np.cumsum([0, *map(len, together)])
        ids = sample_ids[np.concatenate(together)]
        columns = (self.lengths.tokens, self.lengths.label_tokens, self.lengths.crops)
        tokens, labels, crops = (column[ids].astype(np.int64) for column in columns)
        sums = [np.add.reduceat(column, borders[:-1]).tolist() for column in (tokens, tokens**2, labels, crops)]
        listed, places = ids.tolist(), borders.tolist()
        held = (tuple(listed[begin:stop]) for begin, stop in itertools.pairwise(places))
        return [PlannedRow(*row) for row in zip(held, *sums, strict=True)]

    def _taken_apart(
        self, rows: list[PlannedRow], together: list[list[int]], positions: np.ndarray, window: int
    ) -> set[int]:
        """Numbers of the rows that are not full, the emptiest first, until enough samples are carried."""
        too_old = (positions < (window - MAX_CARRIES + 1) * self.window_samples).tolist()
        chosen: set[int] = set()
        num_carried = 0
        for number in sorted(range(len(rows)), key=lambda number: rows[number].tokens):
            is_full = rows[number].tokens >= FULL_FRAC * self.row_length_tokens
            if is_full or num_carried >= CARRY_FRAC * self.window_samples:
                break
            if not any(too_old[place] for place in together[number]):
                chosen.add(number)
                num_carried += len(together[number])
        return chosen

    def _write_carry(self, carried: Waiting, window: int) -> str:
        """What was carried into a window, one bit for each position of the `MAX_CARRIES` windows before it, as hex.

        Unlike a list of ids it cannot grow: 4 KB for windows of 4,096 samples.
        """
        is_carried = np.zeros(MAX_CARRIES * self.window_samples, bool)
        is_carried[carried[:, 0] - (window - MAX_CARRIES) * self.window_samples] = True
        return np.packbits(is_carried).tobytes().hex() if len(carried) else ""

    def _read_carry(self, carry: str, window: int) -> Waiting:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(carry), np.uint8))
        positions = np.flatnonzero(bits) + (window - MAX_CARRIES) * self.window_samples
        if not len(positions):
            return np.empty((0, 2), np.int64)
        first = int(positions[0])
        ids = self.sample_ids(first, int(positions[-1]) + 1)[positions - first]
        return np.stack([positions, ids], axis=1)


def accumulation(rows_per_step: int, num_consumers: int) -> int:
    """Micro-steps in a step: every consumer takes one row in each."""
    return -(-rows_per_step // num_consumers)


def overfit(planner: Planner) -> Iterator[PlannedStep]:
    """The first step again and again, under new numbers; its state leads back to it."""
    for first in itertools.islice(planner, 1):
        for number in itertools.count(first.number):
            yield replace(first, number=number, state=planner.state | {"step": number})


def num_vision_chunks(micro_step: Sequence[PlannedRow | None], chunk_crops: int | None, sharing: int = 1) -> int:
    """Calls of the vision tower that every rank makes in this micro-step: enough for the row with most crops.

    It follows from the plan, which all ranks have: nobody has to ask, and a quarantined picture changes nothing.
    chunk_crops: most crops in a call; None: no limit. sharing: ranks among which a row's crops are divided.
    """
    most = max((-(-row.crops // sharing) for row in micro_step if row), default=0)
    return max(1, -(-most // chunk_crops)) if chunk_crops else 1


def by_tokens(row: PlannedRow) -> int:
    """The cost of a row where nothing is known of the model."""
    return row.tokens


def assign(
    step: PlannedStep, num_consumers: int, micro_steps: int, cost: RowCost = by_tokens
) -> list[list[PlannedRow | None]]:
    """Deal the rows of a step to consumers: [micro-step][consumer], None where a consumer gets an empty row.

    ZeRO-3 keeps ranks together in every micro-step, so rows of like cost share one: sorted, then cut in slices, with
    the place in the slice rotating so that no rank is always handed the dearest. Full rows have equal tokens, and one
    long document costs several times what many short ones do (`model/flops.py`).
    """
    assert len(step.rows) <= num_consumers * micro_steps  # `accumulation` sees to it
    rows = sorted(step.rows, key=lambda row: (-cost(row), row.sample_ids))
    table: list[list[PlannedRow | None]] = []
    for begin in range(0, micro_steps * num_consumers, num_consumers):
        slice_: list[PlannedRow | None] = list(rows[begin : begin + num_consumers])
        slice_ += [None] * (num_consumers - len(slice_))
        turn = (step.number + len(table)) % num_consumers
        table.append(slice_[turn:] + slice_[:turn])
    return table
