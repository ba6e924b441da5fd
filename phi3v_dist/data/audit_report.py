"""A run folder and an `Audit` → what the `audit` command reads and what it prints.

What comes in: a run folder, wherever it lies now. What goes out: its settings and heads, and text for a person.
Surprise: the head of the newest checkpoint is read too. A ledger cut at the border of a record is a sound chain, and
only the checkpoint knows that there was more.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from phi3v_dist.data.audit import Audit, SourceAudit
from phi3v_dist.data.ledger import Head, Record, Status
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.quarantine import QUARANTINE_NAME, entries
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.printable import printable
from phi3v_dist.survive.checkpoint import committed
from phi3v_dist.survive.manifest import DamagedError, read_manifest

SOURCES_ABREAST = 4  # with counts up to 999,999,999,999 they fit into 80 columns
COUNTS: dict[str, Callable[[SourceAudit], str]] = {
    "samples": lambda source: f"{source.samples:,}",
    "left out": lambda source: f"{source.left_out:,}",
    "whole epochs": lambda source: f"{source.epochs:,}",
    "passes": lambda source: f"{source.passes:,.3f}",
    "trained": lambda source: f"{source.uses - source.quarantined - source.skipped:,}",
    "quarantined": lambda source: f"{source.quarantined:,}",
    "skipped": lambda source: f"{source.skipped:,}",
    "in flight": lambda source: f"{source.in_flight:,}",
    "lost": lambda source: f"{source.lost:,}",
    "repeated": lambda source: f"{source.repeated:,}",
}


def newest_head(run: Path) -> Head | None:
    """Up to where the newest checkpoint needs the ledger; None when there is no checkpoint."""
    for path in committed(run / "checkpoints"):
        try:
            state: dict[str, Any] = read_manifest(path)["position"]["loader"]
        except DamagedError:
            continue
        if "ledger" in state:
            return Head(*state["ledger"])
    return None


def listed_in(run: Path) -> set[int]:
    """Sample ids in the run's quarantine file."""
    path = run / QUARANTINE_NAME
    return {entry["sample_id"] for entry in entries(path.read_bytes())} if path.exists() else set()


def tables_of(audit: Audit) -> Iterator[Table]:
    """A column per source and a line per count; as many tables as it takes for each to fit into 80 columns."""
    for begin in range(0, max(1, len(audit.sources)), SOURCES_ABREAST):
        sources = audit.sources[begin : begin + SOURCES_ABREAST]
        title = f"{audit.steps:,} steps, {audit.rows:,} rows, by source"
        table = Table(title=None if begin else title, title_justify="left")
        table.add_column("", no_wrap=True)
        for source in sources:
            table.add_column(Text(printable(source.name)), justify="right", overflow="fold")
        for label, count in COUNTS.items():
            table.add_row(label, *(count(source) for source in sources))
        yield table


def lines_of(audit: Audit) -> list[str]:
    """What the table does not say."""
    lines = [
        f"attempt {a.number}: steps {a.first_step} to {a.last_step} on {a.world_size} rank{'s' * (a.world_size > 1)}"
        for a in audit.attempts
    ]
    lines.append(f"ledger: {audit.size_bytes:,} bytes, every record verified; rows' hash {audit.chain[:16]}")
    if audit.torn_bytes:
        lines.append(
            f"its last {audit.torn_bytes:,} bytes are part of a record: a kill cut it off, or the run is writing it now"
        )
    in_flight = sum(source.in_flight for source in audit.sources)
    if in_flight:
        lines.append(f"in flight: {in_flight:,} samples were drawn and come in rows after step {audit.steps}")
    lost, repeated = (sum(getattr(source, name) for source in audit.sources) for name in ("lost", "repeated"))
    verdict = "every row is the plan's, each sample once per epoch of its source"
    lines.append(f"{lost:,} lost, {repeated:,} repeated" + ("" if audit.problems else f": {verdict}"))
    return lines


def step_lines(record: Record, table: ShardTable, lengths: Lengths) -> Iterator[str]:
    """The samples of one step, a line each: row, `shard:key` in full, tokens and what became of it."""
    empty = f", {record.empty_rows} empty" if record.empty_rows else ""
    ranks = f"{record.world_size} rank{'s' * (record.world_size > 1)}"
    yield f"step {record.step}: attempt {record.attempt}, {ranks}, {len(record.rows)} rows{empty}"
    rows = [number for number, row in enumerate(record.rows, start=1) for _ in row]
    for place, (row, sample_id) in enumerate(zip(rows, record.sample_ids, strict=True)):
        status = record.not_trained.get(place, Status.TRAINED).name.lower()
        tokens = int(lengths.tokens[sample_id])
        yield f"row {row}  {printable(table.sample_name(sample_id))}  {tokens:,} tokens  {status}"
