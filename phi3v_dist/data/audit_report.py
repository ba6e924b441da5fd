"""A run folder and an `Audit` → what the `audit` command reads and what it prints.

What comes in: a run folder, wherever it lies now. What goes out: its settings and heads, and text for a person.
Surprise: the head of the newest checkpoint is read too. A ledger cut at the border of a record is a sound chain, and
only the checkpoint knows that there was more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from phi3v_dist.config import Settings
from phi3v_dist.config_file import merge, validate
from phi3v_dist.data.audit import Audit
from phi3v_dist.data.ledger import Head, Record, Status
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.quarantine import QUARANTINE_NAME, entries
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError
from phi3v_dist.printable import printable
from phi3v_dist.survive.checkpoint import committed
from phi3v_dist.survive.manifest import DamagedError, read_manifest


def settings_of(run: Path, overrides: Sequence[str]) -> Settings:
    """The settings that a run recorded, and on top what was moved since.

    Raises:
        ConfigError: the folder is no run's, or a word is no setting.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no config.yaml, so this is no run folder")
    tree, problems = merge(path, overrides)
    tree.pop("environment", None)
    tree["run"] = {**(tree.get("run") or {}), "root": str(run.resolve().parent), "name": run.resolve().name}
    settings, mistakes = validate(Settings, tree)
    if problems or mistakes or settings is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems + mistakes])
    return settings


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


def table_of(audit: Audit) -> Table:
    """A line per source."""
    table = Table(title=f"{audit.steps:,} steps, {audit.rows:,} rows, by source", title_justify="left")
    table.add_column("source")
    columns = (
        "samples", "left out", "whole epochs", "passes", "trained", "quarantined", "skipped", "in flight", "lost",
        "repeated",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for source in audit.sources:
        learned = source.uses - source.quarantined - source.skipped
        counts = (source.quarantined, source.skipped, source.in_flight, source.lost, source.repeated)
        table.add_row(
            Text(printable(source.name)), f"{source.samples:,}", f"{source.left_out:,}", f"{source.epochs}",
            f"{source.passes:.3f}", f"{learned:,}", *(f"{count:,}" for count in counts),
        )  # fmt: skip
    return table


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


def step_table(record: Record, table: ShardTable, lengths: Lengths) -> Table:
    """The samples of one step."""
    title = f"step {record.step}: attempt {record.attempt}, {record.world_size} ranks, {len(record.rows)} rows"
    empty = f", {record.empty_rows} empty" if record.empty_rows else ""
    printed = Table(title=title + empty, title_justify="left")
    for column, justify in (("row", "right"), ("sample", "left"), ("tokens", "right"), ("status", "left")):
        printed.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # rich wants literals
    place = 0
    for number, row in enumerate(record.rows, start=1):
        for sample_id in row:
            status = record.not_trained.get(place, Status.TRAINED).name.lower()
            name, tokens = printable(table.sample_name(sample_id)), f"{int(lengths.tokens[sample_id]):,}"
            printed.add_row(str(number), Text(name), tokens, status)
            place += 1
    return printed
