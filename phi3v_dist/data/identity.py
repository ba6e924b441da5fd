"""What decides the rows of a run → named facts, which a resume and all ranks must agree on.

What comes in: shards, lengths and a planner. What goes out: a few digests and numbers, and words for each that differs.
Surprise: the world size and the rows of a step are not among them. They decide which rows make a step and who takes
them, never which samples make a row, so both may change from one start of a run to the next.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import Lengths, Planner
from phi3v_dist.data.shards import ShardTable

Facts = Mapping[str, Any]

NO_ROWS_YET = hashlib.sha256(b"").hexdigest()  # where a chain of rows begins

# What is told to a person whose run has another value of a fact than the one it began with.
CAUSES = {
    "shards": "`data.train` names other shards, or their contents, number or order changed. Put them back",
    "lengths": "samples have other lengths: the model's tokenizer, a source's templates, `data.num_crops` or "
    "`data.fit` changed. Put them back",
    "weights": "a source's `weight` changed. Put it back",
    "seed": "`run.seed` changed. Put it back",
    "row_length_tokens": "`data.row_length_tokens` changed. Put it back",
    "window_samples": "`data.window_samples` changed. Put it back",
    "packing": "`data.packing` changed. Put it back",
    "end": "`train.epochs` changed, and with it the last rows. Put it back",
}


def facts_of(table: ShardTable, lengths: Lengths, planner: Planner) -> dict[str, Any]:
    """Everything that decides rows, under the names of `CAUSES`, and `plan`, the digest of it all and of the rules."""
    return {
        "plan": planner.digest,
        "shards": table.digest,
        "lengths": lengths.digest,
        "weights": _digest(Order(table, planner.seed).shares),
        "seed": planner.seed,
        "row_length_tokens": planner.row_length_tokens,
        "window_samples": planner.window_samples,
        "packing": planner.packing,
        "end": planner.end,
    }


def differences(before: Facts, now: Facts) -> list[str]:
    """One message for each fact that is another one now. Lengths follow from the shards and are named only alone."""
    names = [name for name in CAUSES if before.get(name) != now.get(name)]
    if "shards" in names:
        names = [name for name in names if name not in ("lengths", "weights", "end", "window_samples")]
    if not names and before.get("plan") != now.get("plan"):
        return ["this release makes other rows from the same data: go on with the release that began the run"]
    return [f"{name} {before.get(name)} is now {now.get(name)}: {CAUSES[name]}" for name in names]


def chain_rows(chain: str, rows: Iterable[tuple[int, ...]]) -> str:
    """The hash of all rows (of sample ids) so far, given that of those before; the same however steps are cut."""
    for row in rows:
        chain = hashlib.sha256(f"{chain} {row}".encode()).hexdigest()
    return chain


def strangers(hosts: list[str], facts: list[Facts]) -> list[str]:
    """One message for each rank and fact in which it differs from rank 0."""
    return [
        f"rank {rank} on {host}: {name} is {theirs.get(name)}, rank 0 on {hosts[0]} has {facts[0].get(name)}"
        for rank, (host, theirs) in enumerate(zip(hosts, facts, strict=True))
        for name in facts[0]
        if theirs.get(name) != facts[0].get(name)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
