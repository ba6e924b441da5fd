"""The steps of one window → numbers that are one by nature: work and MFU, lengths, mix, clipping.

What comes in: plans and results, which are the same on every rank, so that rank 0 alone looks at them. What goes out:
registered numbers. Surprise: MFU here is of wall time from a step's end to the next one's, logging and checkpoints
included, and only evaluations left out; a figure of forward and backward passes alone would be higher.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from phi3v_dist.data.plan import Lengths, PlannedStep
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model.flops import Flops
from phi3v_dist.observe.metrics import Number
from phi3v_dist.train.laps import Lapped
from phi3v_dist.train.step import StepResult


@dataclass(frozen=True)
class Step:
    """What is kept of a step until its window ends. queue_depth: rows that were decoded and not yet asked for."""

    plan: PlannedStep
    result: StepResult
    laps: Lapped
    queue_depth: int = 0


def label(name: str) -> str:
    """A name of people's, such as a host's, as a part of a metric's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unnamed"


@dataclass
class Whole:
    """What there is to know of windows beside the ranks' own measurements.

    work: of forward and backward passes, without what is recomputed. peak_flops: of one process's device; None: not
        known, and no MFU is logged. shares: of the sources, as asked for. grad_clip: 0: nothing is clipped.
    """

    work: Flops
    world_size: int
    peak_flops: float | None
    lengths: Lengths
    table: ShardTable
    shares: Sequence[int]
    grad_clip: float
    _seen: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._seen = np.zeros(len(self.shares))  # samples of each source in this attempt

    def row(self, steps: Sequence[Step], step_s: float) -> dict[str, Number]:
        """step_s: mean wall time of the window's steps."""
        sample_ids = np.array([i for step in steps for i in step.plan.sample_ids], np.int64)
        lengths = self.lengths.tokens[sample_ids]
        results = [step.result for step in steps]
        clipped = [self.grad_clip > 0 and r.skipped is None and r.grad_norm > self.grad_clip for r in results]
        return (
            {
                "train/clip_frac": sum(clipped) / len(steps),
                "data/images_per_sample": sum(r.images for r in results) / max(1, sum(r.samples for r in results)),
                "data/image_tokens_frac": sum(r.image_tokens for r in results) / max(1, sum(r.tokens for r in results)),
                "seq/len_p50": float(np.percentile(lengths, 50)),
                "seq/len_p99": float(np.percentile(lengths, 99)),
                "seq/len_max": float(lengths.max()),
            }
            | self._speed(steps, step_s)
            | self._mix(sample_ids)
        )

    def _speed(self, steps: Sequence[Step], step_s: float) -> dict[str, Number]:
        work = self.work.useful(row for step in steps for row in step.plan.rows)
        process_s = max(step_s, 1e-9) * len(steps) * self.world_size
        found = {
            "perf/tflops_text": work.text / process_s / 1e12,
            "perf/tflops_attn": work.attention / process_s / 1e12,
            "perf/tflops_vision": work.vision / process_s / 1e12,
            "perf/attn_flops_frac": work.attention / max(1, work.causal),
        }
        if self.peak_flops:
            found["perf/mfu"] = work.full / process_s / self.peak_flops
            found["perf/mfu_causal"] = work.causal / process_s / self.peak_flops
        return found

    def _mix(self, sample_ids: np.ndarray) -> dict[str, Number]:
        """Shares of samples by source; nothing when there is one."""
        if len(self.shares) == 1:
            return {}
        shards = np.searchsorted(self.table.start, sample_ids, side="right") - 1
        here = np.bincount(self.table.source_of_shard[shards], minlength=len(self.shares))
        self._seen += here
        drift = self._seen / self._seen.sum() - np.array(self.shares) / sum(self.shares)
        return {
            f"data/{what}/{name}": float(value)
            for what, values in (("mix", here / here.sum()), ("mix_drift", drift))
            for name, value in zip(self._labels(), values, strict=True)
        }

    def _labels(self) -> list[str]:
        """One for each source, all different."""
        first_shards = [int(np.argmax(self.table.source_of_shard == n)) for n in range(len(self.shares))]
        labels = [label(self.table.source_name(shard)) for shard in first_shards]
        return [one if labels.count(one) == 1 else f"{one}_{n}" for n, one in enumerate(labels, start=1)]
