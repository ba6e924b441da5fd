"""`Lengths` → which samples were cut to fit into a row, and which are left out; counted and named.

What comes in: the lengths of one side of the data and the fit policy. What goes out: `Outcome`s, and text about them.
Surprise: nothing is decided here. The policy was applied when the lengths were measured, and the planner leaves out by
the same two rules: length 0, or longer than a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from phi3v_dist.data.fit import FitPolicy
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.printable import printable

CUT = {"drop": "cut", "fewer_crops": "cut into fewer crops", "truncate_text": "with text cut"}
NAMES_SHOWN = 5
STILL = {"drop": "", "fewer_crops": " with any number of crops", "truncate_text": ", texts cut or not"}


@dataclass(frozen=True)
class Outcome:
    """Samples that are not used as they are stored. sample_ids: ascending."""

    what: str
    sample_ids: np.ndarray

    def __str__(self) -> str:
        return f"{len(self.sample_ids):,} {self.what}"


def cut(lengths: Lengths, policy: FitPolicy) -> list[Outcome]:
    """The samples of which the policy cut something, so that they fit; empty when there are none."""
    return _some(Outcome(CUT[policy.name], np.flatnonzero(lengths.tokens < lengths.full_tokens)))


def left_out(lengths: Lengths, policy: FitPolicy) -> list[Outcome]:
    """The samples that are not used, by reason; empty when all are."""
    limit = policy.limit_tokens
    why = f"longer than `data.row_length_tokens` {limit}{STILL[policy.name]}"
    too_long = lengths.tokens > (np.inf if limit is None else limit)
    return _some(Outcome(why, np.flatnonzero(too_long)), Outcome("unusable", np.flatnonzero(lengths.tokens == 0)))


def names(outcome: Outcome, table: ShardTable, lengths: Lengths, num_samples: int) -> list[str]:
    """The first of its samples: shard and key, and what there is to say about each."""
    lines = []
    for sample_id in outcome.sample_ids[:num_samples].tolist():
        tokens, full_tokens = int(lengths.tokens[sample_id]), int(lengths.full_tokens[sample_id])
        after = f", {tokens:,} after the cut" if tokens < full_tokens else ""
        about = printable(lengths.bad.get(sample_id, "")) or f"{full_tokens:,} tokens{after}"
        lines.append(f"{table.sample_name(sample_id)}: {about}")
    return lines


def listed(sample_ids: Sequence[int], sample_name: Callable[[int], str]) -> str:
    """The first of some samples by `shard:key`, and how many more there are."""
    shown = ", ".join(printable(sample_name(sample_id)) for sample_id in sample_ids[:NAMES_SHOWN])
    rest = len(sample_ids) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _some(*outcomes: Outcome) -> list[Outcome]:
    return [outcome for outcome in outcomes if len(outcome.sample_ids)]
