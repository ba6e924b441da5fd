"""Finished steps → ledger, quarantine, and the part of a checkpoint that says where the data goes on.

What comes in: each step's plan and what could not be used of it. What goes out: the run's books, and an error when the
data is not what the books say. Surprise: ranks exchange something only when all know that there is something to
exchange: at the start, at a checkpoint, and in a step whose summed count of bad samples is not 0.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from phi3v_dist.data import identity, ledger, quarantine
from phi3v_dist.data.ledger import Ledger, Record, Status
from phi3v_dist.data.plan import Lengths, PlannedStep, Planner, accumulation
from phi3v_dist.data.quarantine import Quarantine
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import CheckpointError, DataError, Phi3VError
from phi3v_dist.parallel.topology import Topology

STATE_FORMAT = 1  # of `Accounts.state`. To upgrade from none: export, and begin another run with `model.init_from`
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass
class Accounts:
    """The books of one attempt. Every method is collective over all ranks; files are rank 0's.

    facts: what decides the rows; chain: hash of all rows trained so far.
    """

    topology: Topology
    num_consumers: int
    table: ShardTable
    rows_per_step: int
    max_bad_frac: float
    facts: identity.Facts
    chain: str
    attempt: int
    ledger: Ledger | None
    quarantine: Quarantine | None

    @classmethod
    def open(
        cls, folder: Path, topology: Topology, table: ShardTable, lengths: Lengths, planner: Planner,
        max_bad_frac: float, attempt: int, state: dict[str, Any] | None, num_consumers: int | None = None,
    ) -> "Accounts":  # fmt: skip
        """Begin the books, or go on from a checkpoint's `state`.

        Args:
            num_consumers: takers of rows; default: every rank is one.

        Raises:
            DataError: ranks see other data, or the data or the ledger is not that of the checkpoint.
            CheckpointError: the state is one of another release.
        """
        facts = identity.facts_of(table, lengths, planner)
        _agree(topology, "the data that they see", facts)
        if state is None:
            state = {"chain": identity.NO_ROWS_YET}
        else:
            _require_same(state, facts)

        def open_files() -> tuple[Ledger, Quarantine]:
            book = _open_ledger(folder / ledger.LEDGER_NAME, facts, state)
            head = state.get("quarantine")
            listed = Quarantine(folder / quarantine.QUARANTINE_NAME, quarantine.Head(*head) if head else None)
            listed.add_unusable(table, lengths)
            return book, listed

        book, listed = _on_main(topology, open_files) or (None, None)
        return cls(
            topology, num_consumers or topology.world_size, table, planner.rows_per_step, max_bad_frac, facts,
            state["chain"], attempt, book, listed,
        )  # fmt: skip

    def record(
        self, plan: PlannedStep, unused: Iterable[tuple[int, str]], num_unused: int, updated: bool = True
    ) -> None:
        """Write down a finished step.

        Args:
            unused: id and reason of each sample that this rank could not use; num_unused: how many all ranks had.
            updated: whether the step changed the weights.
        """
        rows = tuple(row.sample_ids for row in plan.rows)
        self.chain = identity.chain_rows(self.chain, rows)
        everyone = self.topology.gather(list(unused)) if num_unused else []
        if self.ledger is None or self.quarantine is None:
            return
        reasons = {sample_id: reason for share in everyone for sample_id, reason in share}
        self.quarantine.add(
            quarantine.entry_of(self.table, sample_id, reasons[sample_id], plan.number) for sample_id in sorted(reasons)
        )
        status = {}
        for place, sample_id in enumerate(plan.sample_ids):
            if sample_id in reasons:
                status[place] = Status.QUARANTINED
            elif not updated:
                status[place] = Status.SKIPPED
        world_size = self.topology.world_size
        empty_rows = accumulation(self.rows_per_step, self.num_consumers) * self.num_consumers - len(rows)
        self.ledger.append(Record(plan.number, self.attempt, world_size, rows, empty_rows, status))

    def require_few_bad(self, num_bad: int, num_seen: int, at_end: bool = False) -> None:
        """Raises DataError, on all ranks alike, when `data.max_bad_frac` is passed."""
        if not quarantine.too_many(num_bad, num_seen, self.max_bad_frac, at_end):
            return
        found = (
            f"{num_bad} of {num_seen} samples could not be used, more than `data.max_bad_frac` {self.max_bad_frac:g}"
        )
        if self.quarantine is None:
            raise DataError(f"{found}; rank 0 says which")
        raise DataError(
            f"{found}; {self.quarantine.summary()}. Mend or leave out these shards, or raise the limit; started again, "
            "the run goes on from its last checkpoint"
        )

    def state(self, plan: PlannedStep) -> dict[str, Any]:
        """What a checkpoint after this step holds of the data, JSON; all it names is on the disk when this returns."""
        _agree(self.topology, f"the rows up to step {plan.number}", {"chain": self.chain})
        heads = None
        if self.ledger and self.quarantine:
            heads = {"ledger": self.ledger.sync(), "quarantine": self.quarantine.sync()}
        return {"format": STATE_FORMAT, "plan": plan.state, "facts": self.facts, "chain": self.chain} | (heads or {})

    def close(self) -> None:
        for book in (self.ledger, self.quarantine):
            if book:
                book.close()


def plan_state(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The planner's part of a checkpoint's state."""
    return state["plan"] if state else None


def _require_same(state: dict[str, Any], facts: identity.Facts) -> None:
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"the checkpoint's data state has version {state.get('format')}, this program reads version "
            f"{STATE_FORMAT}: go on with the release that wrote it, or begin another run with `model.init_from`"
        )
    if found := identity.differences(state["facts"], facts):
        head = (
            "this run cannot go on where its checkpoint ends, because other rows would follow: some samples would be "
            "lost and some repeated. Undo what follows, or begin another run with `model.init_from`"
        )
        raise DataError([head, *found])


def _open_ledger(path: Path, facts: identity.Facts, state: dict[str, Any]) -> Ledger:
    if "ledger" in state:
        return Ledger.resume(path, ledger.Head(*state["ledger"]))
    if path.exists() and path.stat().st_size:
        log.warning("there is no checkpoint to go on from: %s is begun anew, as the weights are", path)
    return Ledger.begin(path, facts)


def _agree(topology: Topology, what: str, facts: identity.Facts) -> None:
    """Raises DataError naming each rank that has other facts than rank 0."""
    seen = topology.gather((topology.host, dict(facts)))
    if found := identity.strangers([host for host, _ in seen], [theirs for _, theirs in seen]):
        raise DataError([f"ranks differ in {what}; do all nodes read the same shards, settings and release?", *found])


def _on_main(topology: Topology, work: Callable[[], T]) -> T | None:
    """Rank 0's result there, None elsewhere; its error, if it has one, on every rank."""
    result, error = None, None
    if topology.is_main:
        try:
            result = work()
        except Phi3VError as raised:
            error = raised
    problems = topology.broadcast(error.problems if error else None)
    if error:
        raise error
    if problems:
        raise DataError(problems)
    return result
