"""How full rows are, how evenly ranks are loaded, and what planning costs; `python tests/bench/packing.py`.

What comes in: the mix of lengths.py. What goes out: `Figure`s. Surprise: costs are processor time of
this process, which a busy neighbour on the same core can still double; the best of a few rounds is shown.
"""

import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from figures import Figure
from lengths import long_tailed, summary, table_of
from rich.console import Console
from rich.table import Table

from phi3v_dist.config import PartsSettings
from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import Lengths, PlannedRow, Planner, RowCost, assign
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model.flops import flops

ROUNDS = 5
NUM_RANKS = 64
OFFICIAL_SIZES = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "img_processor": {},
}  # fmt: skip


def planner_of(
    lengths: Lengths,
    row_length_tokens: int,
    rows_per_step: int = NUM_RANKS,
    table: ShardTable | None = None,
    **more: Any,
) -> Planner:
    order = Order(table or table_of([200] * (len(lengths) // 200)), seed=0)
    return Planner(
        order.sample_ids, lengths, rows_per_step=rows_per_step, row_length_tokens=row_length_tokens,
        window_samples=1024, packing=True, seed=0, **more,
    )  # fmt: skip


def best_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def fill(lengths: Lengths, row_length_tokens: int, goal: float) -> list[Figure]:
    """Of an epoch from its first row to its last, which is seldom full, and the planner's cost with all it looks up."""
    planner = planner_of(lengths, row_length_tokens, end=len(lengths))
    rows = [row for step in planner for row in step.rows]
    planned = sum(len(row.sample_ids) for row in rows)
    share = sum(row.tokens for row in rows) / (row_length_tokens * len(rows))
    microseconds = 1e6 * best_seconds(lambda: list(planner)) / len(lengths)
    name = f"rows of {row_length_tokens:,}"
    return [
        Figure(f"{name}: share filled", f"{share:.4f}", f">= {goal}"),
        Figure(f"{name}: planning, CPU per sample", f"{microseconds:.1f} us", "<= 15 us"),
        Figure(f"{name}: left out as too long", f"{1 - planned / len(lengths):.2%}", ""),
    ]


def imbalance(table: list[list[PlannedRow | None]], cost: RowCost) -> list[float]:
    """Of each micro-step: the dearest rank's row over the ranks' mean."""
    costs = [[cost(row) if row else 0.0 for row in slice_] for slice_ in table]
    return [max(slice_) / mean(slice_) for slice_ in costs]


def balance(lengths: Lengths, micro_steps: int, goal: float, num_steps: int = 6) -> list[Figure]:
    """Over several epochs, since 16 micro-steps of 64 rows take one each."""
    cost = flops(OFFICIAL_SIZES, PartsSettings(), recompute=True).of_row
    planner = planner_of(lengths, 131_072, NUM_RANKS * micro_steps)
    dealt, by_arrival = [], []
    for step in islice(planner, num_steps):
        dealt += imbalance(assign(step, NUM_RANKS, micro_steps, cost), cost)
        by_arrival += imbalance([list(step.rows[i::micro_steps]) for i in range(micro_steps)], cost)
    name = f"{NUM_RANKS} ranks, rows of 131,072, {micro_steps} micro-steps"
    return [
        Figure(f"{name}: dearest rank / mean", f"{mean(dealt):.3f}", f"<= {goal}"),
        Figure(f"{name}: in order of arrival", f"{mean(by_arrival):.3f}", ""),
    ]


def scale(name: str, shard_sizes: np.ndarray, tokens: np.ndarray, row_length_tokens: int = 32_768) -> list[Figure]:
    """From nothing but the shards' sizes and the lengths to the first step, at the beginning and deep in an epoch."""
    table = table_of(shard_sizes)
    lengths = Lengths(tokens, tokens, tokens, tokens, {})
    window = int(0.9 * len(lengths)) // 1024
    late = planner_of(lengths, row_length_tokens, table=table, end=len(lengths))
    state = next(iter(late.resume({"step": 0, "window": window - 8, "rows_used": 0, "carry": ""}))).state
    while state["window"] < window:
        state = next(iter(late.resume(state))).state

    def first(begin: dict[str, Any] | None) -> None:
        planner = planner_of(lengths, row_length_tokens, table=table, end=len(lengths))
        next(iter(planner.resume(begin) if begin else planner))

    order, start, resumed = (
        1e3 * best_seconds(run, 3) for run in (lambda: Order(table, 0), lambda: first(None), lambda: first(state))
    )
    return [
        Figure(f"{name}: order, CPU", f"{order:.1f} ms", ""),
        Figure(f"{name}: order to first step, CPU", f"{start:.1f} ms", ""),
        Figure(f"{name}: the same at 90 % of the epoch", f"{resumed:.1f} ms", "<= 1.2 x + 200 ms"),
        Figure(f"{name}: state", f"{len(json.dumps(state)):,} bytes", "<= 64 KB"),
    ]


def figures(folder: Path) -> list[Figure]:
    """All of them, in about a minute; `folder` takes a file of 400 MB for a moment."""
    lengths, _ = long_tailed()
    found: list[Figure] = []
    for row_length_tokens, goal in ((8192, 0.95), (32_768, 0.99), (131_072, 0.995)):
        found += fill(lengths, row_length_tokens, goal)
    for micro_steps, goal in ((4, 1.16), (16, 1.06)):
        found += balance(lengths, micro_steps, goal)
    few_each = np.resize([1, 2, 3, 4], 100_000)
    found += scale("100,000 shards of 1 to 4 samples", few_each, np.resize(lengths.tokens, few_each.sum()))
    with tempfile.TemporaryFile(dir=folder) as file:
        many = np.memmap(file, np.int32, "w+", shape=100_000_000)
        for begin in range(0, len(many), len(lengths)):
            many[begin : begin + len(lengths)] = lengths.tokens
        found += scale("100 million samples in 100,000 shards", np.full(100_000, 1000), many)
    return found


def main() -> None:
    mix = summary(*long_tailed())
    told = ", ".join(f"{name} {value:,.0f}" if value > 1 else f"{name} {value:.1%}" for name, value in mix.items())
    view = Table("figure", "measured", "goal", title=f"20,000 samples: {told}")
    for figure in figures(Path(tempfile.gettempdir())):
        view.add_row(*figure[:3])
    Console().print(view)


if __name__ == "__main__":
    main()
