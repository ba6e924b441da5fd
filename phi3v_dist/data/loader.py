"""Planned steps → this rank's Batches, decoded ahead by threads.

What comes in: a planner, a decoder, and which consumer this rank is. What goes out: for each optimizer step its plan
and one Batch per micro-step, as many on every rank. Surprise: the threads hold no state and draw no random number;
results are placed by the plan, crops straight into the memory of their Batch. So the state of the whole loader is the
plan's own state after the last finished step, and work in flight is simply thrown away.

A sample that cannot be decoded is replaced by filling of the same length: the plan does not move, the sample is named
in the log, and the run stops when more than `max_bad_frac` of all samples seen were bad (the loop counts, over all
ranks).
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from phi3v_dist.data.batch import Batch, Crops, Example, Filling, Row, collate
from phi3v_dist.data.crops import CropMode
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.plan import Lengths, PlannedRow, PlannedStep, RowCost, assign, by_tokens, num_vision_chunks
from phi3v_dist.data.pool import DecodePool, Meter
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample, Sample, decode_sample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.slots import Slot, Slots
from phi3v_dist.model.vision import Normalization
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup

EMPTY_ROW_TOKENS = 8  # as short as is comfortable; its only purpose is to take part in collectives
NO_ROW = PlannedRow((), tokens=EMPTY_ROW_TOKENS, squared_tokens=EMPTY_ROW_TOKENS**2, label_tokens=0, crops=0)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Sample id → Sample → Example.

    crops: how examples' crops are written (crops.py).
    """

    table: ShardTable
    fetcher: Fetcher
    processor: Phi3VProcessor
    crops: CropMode = "exact"

    @property
    def normalization(self) -> Normalization | None:
        """What examples' crops still need; None when they are exact."""
        return self.processor.normalization if self.crops == "fast" else None

    def sample(self, sample_id: int) -> Sample:
        """The typed sample. Raises BadSample."""
        parts = self.fetcher.fetch(sample_id)
        shard, number = self.table.locate(sample_id)
        index = self.table.index(shard)
        source = self.table.sources[int(self.table.source_of_shard[shard])]
        names = list(index.image_sizes(number))
        path, source_name = self.table.shard_name(shard), self.table.source_name(shard)
        return decode_sample(sample_id, path, index.key(number), source_name, source, parts, names)

    def example(self, sample_id: int, planned_tokens: int, out: Crops | None = None) -> Example:
        """The encoded sample, its crops written to `out` where that is given (`Phi3VProcessor.encode`).

        Raises BadSample, also when its length is not what was planned.
        """
        sample = self.sample(sample_id)
        example = self.processor.encode(sample, self.crops, out)
        if len(example.input_ids) != planned_tokens:
            reason = f"it has {len(example.input_ids)} tokens, the plan says {planned_tokens}; delete its lengths file"
            raise BadSample(sample.shard, sample.key, reason)
        return example


@dataclass(frozen=True)
class Loader:
    """Iterates over optimizer steps: each is its plan, and this rank's Batches as they are asked for.

    A Batch's crops hold until the next one is asked for (`Batch`). Batches of a step that nobody asked for are passed
    over when the next step is.

    steps: the plan, from where the run goes on.
    consumer, num_consumers: which of the equal takers of rows this rank is.
    micro_steps: Batches in a step.
    prefetch_rows: decoded ahead of the one in use, in this step and the next ones; memory is bounded by them.
    vision_chunk_crops: most crops the vision tower takes in one call when it checkpoints; None: no limit.
    cost: what a row costs, by which ranks are balanced; the same on all of them.
    sequence: the ranks that share each row; together they are one consumer.
    meter: told how the decoding goes.
    """

    steps: Iterable[PlannedStep]
    decoder: Decoder
    lengths: Lengths
    consumer: int
    num_consumers: int
    micro_steps: int
    num_workers: int
    prefetch_rows: int
    vision_chunk_crops: int | None = None
    cost: RowCost = by_tokens
    sequence: SequenceGroup = ALONE
    meter: Meter = field(default_factory=Meter)

    def __iter__(self) -> Iterator[tuple[PlannedStep, Iterator[Batch]]]:
        steps, steps_ahead = itertools.tee(self.steps)
        with DecodePool(self.num_workers, lambda id_: self.decoder.table.sample_name(id_), self.meter) as pool:
            batches = self._batches(steps_ahead, pool)
            for step in steps:
                of_step = itertools.islice(batches, self.micro_steps)
                yield step, of_step
                deque(of_step, maxlen=0)

    def _batches(self, steps: Iterable[PlannedStep], pool: DecodePool) -> Iterator[Batch]:
        """One for each micro-step; while one is in use, `prefetch_rows` are being decoded."""
        slots = Slots(torch.uint8 if self.decoder.normalization else torch.float32)
        rows = (
            self._start(step, micro_step, pool, slots)
            for step in steps
            for micro_step in assign(step, self.num_consumers, self.micro_steps, self.cost)
        )
        ahead = deque(itertools.islice(rows, self.prefetch_rows))
        self.meter.ahead.extend(row for _, row, _ in ahead)
        while ahead:
            for started in itertools.islice(rows, 1):
                ahead.append(started)
                self.meter.ahead.append(started[1])
            slot, row, lay_out = ahead.popleft()
            self.meter.ahead.popleft()
            yield self._agreed(pool.result(row), lay_out)
            slots.give_back(slot)

    def _agreed(self, batch: Batch, lay_out: Callable[[Row], Batch]) -> Batch:
        """The Batch without samples that another rank of the row could not use: slices must be of one row."""
        own = {filling.sample_id for filling in batch.quarantined}
        everyone = itertools.chain(*self.sequence.everyone(batch.quarantined))
        missing = [filling for filling in everyone if filling.sample_id not in own]
        return lay_out(batch.row.without(missing)) if missing else batch

    def _start(
        self, step: PlannedStep, micro_step: list[PlannedRow | None], pool: DecodePool, slots: Slots
    ) -> tuple[Slot, Future[Batch], Callable[[Row], Batch]]:
        """Have this rank's row of a micro-step decoded; also what lays out such a row in fresh memory."""
        row = micro_step[self.consumer] or NO_ROW
        slot = slots.take(row.crops)
        borders = itertools.accumulate((int(self.lengths.crops[i]) for i in row.sample_ids), initial=0)
        works = [
            (sample_id, partial(self._part, sample_id, slot, begin, end))
            for sample_id, (begin, end) in zip(row.sample_ids, itertools.pairwise(borders), strict=True)
        ]
        lay_out = partial(
            collate, pad_id=self.decoder.processor.tokenizer.pad_token_id, plan=step,
            normalization=self.decoder.normalization, sequence=self.sequence,
            num_vision_chunks=num_vision_chunks(micro_step, self.vision_chunk_crops, self.sequence.size),
        )  # fmt: skip

        def join(parts: tuple[Example | Filling, ...]) -> Batch:
            return lay_out(Row(parts or (Filling(EMPTY_ROW_TOKENS),)), slot=slot.crops)

        return slot, pool.submit(works, join), lay_out

    def _part(self, sample_id: int, slot: Slot, begin: int, end: int) -> Example | Filling:
        planned_tokens = int(self.lengths.tokens[sample_id])
        try:
            slot.wait()
            return self.decoder.example(sample_id, planned_tokens, slot.crops[begin:end])
        except BadSample as error:
            log.warning("quarantined: %s", error)
            return Filling(planned_tokens, sample_id, f"{error.shard}:{error.key}", error.reason)
