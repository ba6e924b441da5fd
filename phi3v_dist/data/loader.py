"""Planned steps → this rank's Batches, decoded ahead by threads.

What comes in: a planner, a decoder, and which consumer this rank is. What goes out: one list of Batches per optimizer
step, one Batch per micro-step, as many on every rank. Surprise: the threads hold no state and draw no random number;
results are placed by the plan. So the state of the whole loader is the plan's own state after the last finished step,
and work in flight is simply thrown away.

A sample that cannot be decoded is replaced by filling of the same length: the plan does not move, the sample is named
in the log, and the run stops when more than `max_bad_frac` of all samples seen were bad (the loop counts, over all
ranks).
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2

from phi3v_dist.data.batch import Batch, Example, Filling, Row, collate
from phi3v_dist.data.crops import CropMode
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.plan import Lengths, PlannedRow, PlannedStep, assign, num_vision_chunks
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import BadSample, Sample, decode_sample
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model.vision import Normalization

EMPTY_ROW_TOKENS = 8  # as short as is comfortable; its only purpose is to take part in collectives

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

    def example(self, sample_id: int, planned_tokens: int) -> Example:
        """The encoded sample. Raises BadSample, also when its length is not what was planned."""
        sample = self.sample(sample_id)
        example = self.processor.encode(sample, self.crops)
        if len(example.input_ids) != planned_tokens:
            reason = f"it has {len(example.input_ids)} tokens, the plan says {planned_tokens}; delete its lengths file"
            raise BadSample(sample.shard, sample.key, reason)
        return example


@dataclass(frozen=True)
class Loader:
    """Iterates over optimizer steps.

    steps: the plan, from where the run goes on.
    consumer, num_consumers: which of the equal takers of rows this rank is.
    vision_chunk_crops: most crops the vision tower takes in one call when it checkpoints; None: no limit.
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

    def __iter__(self) -> Iterator[list[Batch]]:
        steps_ahead = max(1, self.prefetch_rows // self.micro_steps)
        pending: deque[list[Future[Batch]]] = deque()
        # OpenCV would start threads of its own for each picture; these are enough.
        pool = ThreadPoolExecutor(self.num_workers, "decode", initializer=cv2.setNumThreads, initargs=(1,))
        try:
            for step in self.steps:
                table = assign(step, self.num_consumers, self.micro_steps)
                pending.append([pool.submit(self._batch, micro_step, step) for micro_step in table])
                if len(pending) > steps_ahead:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, micro_step: list[PlannedRow | None], step: PlannedStep) -> Batch:
        planned = micro_step[self.consumer]
        parts: tuple[Example | Filling, ...] = (Filling(EMPTY_ROW_TOKENS),)
        if planned is not None:
            parts = tuple(self._part(sample_id) for sample_id in planned.sample_ids)
        num_chunks = num_vision_chunks(micro_step, self.vision_chunk_crops)
        pad_id = self.decoder.processor.tokenizer.pad_token_id
        return collate(Row(parts), pad_id, step, self.decoder.normalization, num_chunks)

    def _part(self, sample_id: int) -> Example | Filling:
        planned_tokens = int(self.lengths.tokens[sample_id])
        try:
            return self.decoder.example(sample_id, planned_tokens)
        except BadSample as error:
            log.warning("quarantined: %s", error)
            return Filling(planned_tokens, sample_id, f"{error.shard}:{error.key}", error.reason)
