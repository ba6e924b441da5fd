"""A run without a model, to be killed: every rank plans by itself and takes its rows; the books are the real ones.

`python simulated_run.py FOLDER WORLD_SIZE ROWS_PER_STEP [TEAR_AT_STEP]` goes on from FOLDER/run/checkpoint.json. It
prints each finished step. At TEAR_AT_STEP it dies in the middle of writing the step's record.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import Lengths, Planner, accumulation, assign
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.train.accounts import Accounts, plan_state

CHECKPOINT_EVERY_STEPS = 7
STEP_S = 0.002  # so that there is a time to be killed at
STATE_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True)
class OneProcess(Topology):
    """Ranks that live in one process and always agree."""

    def gather(self, value):
        return [value] * self.world_size

    def broadcast(self, value):
        return value


def open_data(folder: Path) -> tuple[ShardTable, Lengths]:
    sources = [SourceSettings(**source) for source in json.loads((folder / "sources.json").read_text())]
    columns = np.load(folder / "lengths.npz")
    bad = {int(i): "damaged" for i in np.flatnonzero(columns["tokens"] == 0)}
    return ShardTable.open(sources), Lengths(**columns, bad=bad)


def planner_of(table: ShardTable, lengths: Lengths, rows_per_step: int, epochs: int = 3) -> Planner:
    order = Order(table, seed=5)
    return Planner(
        order.sample_ids, lengths, rows_per_step=rows_per_step, row_length_tokens=2048, window_samples=256,
        packing=True, seed=5, end=epochs * order.num_samples, order_digest=order.digest,
    )  # fmt: skip


def main(folder: Path, world_size: int, rows_per_step: int, tear_at: int = 0) -> None:
    table, lengths = open_data(folder)
    planner = planner_of(table, lengths, rows_per_step)
    saved = folder / "run" / "checkpoint.json"
    checkpoint = json.loads(saved.read_text()) if saved.exists() else {"data": None, "attempt": 0, "learned": [0]}
    attempt = checkpoint["attempt"] + 1
    books = Accounts.open(
        folder / "run", OneProcess(world_size=world_size), table, lengths, planner, 1.0, attempt, checkpoint["data"]
    )  # fmt: skip
    state = plan_state(checkpoint["data"])
    plans = [iter(planner.resume(state) if state else planner) for _ in range(world_size)]  # each rank its own
    learned = [sum(checkpoint["learned"]), *[0] * (world_size - 1)]  # stands for partitions of weights
    for steps in zip(*plans, strict=True):
        taken = []
        for rank, step in enumerate(steps):
            mine = [slice_[rank] for slice_ in assign(step, world_size, accumulation(rows_per_step, world_size))]
            learned[rank] += sum(row.tokens for row in mine if row)
            taken += [row.sample_ids for row in mine if row]
        step = steps[0]
        assert Counter(taken) == Counter(row.sample_ids for row in step.rows)
        if step.number == tear_at:
            die_while_writing(books)
        books.record(step, [], 0)
        print(step.number, flush=True)
        time.sleep(STEP_S)
        if step.number % CHECKPOINT_EVERY_STEPS == 0:
            save(saved, books.state(step), attempt, learned)
    save(saved, books.state(step), attempt, learned)
    print("end", flush=True)


def save(path: Path, data: dict, attempt: int, learned: list[int]) -> None:
    assert len(json.dumps(data)) <= STATE_LIMIT_BYTES
    write_durably(path, json.dumps({"data": data, "attempt": attempt, "learned": learned}))


def die_while_writing(books: Accounts) -> None:
    """Half of the next record reaches the file."""
    file = books.ledger._file
    write = file.write

    class Dying:
        def write(self, content: bytes) -> int:
            write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        def fileno(self) -> int:
            return file.fileno()

    books.ledger._file = Dying()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
