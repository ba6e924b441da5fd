"""What sections of the benchmark give back, and the clock they share.

What comes in: things to run. What goes out: `Figure`s, which run.py prints and writes down. Surprise: where work is
compared by wall time, both sides run in turn in one process and the ratio is taken pair by pair, so that a busy
neighbour slows both.
"""

import resource
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

ROUNDS = 5


class Figure(NamedTuple):
    """One line of the table. goal: as a person would write it, empty where there is none. detail: how it came about."""

    name: str
    value: str
    goal: str = ""
    detail: str = ""


def compare(
    name: str,
    unit: str,
    amount: float,
    ours: Callable[[], None],
    other: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
    goal: str = "",
) -> Figure:
    """Time both in turn, after one round that does not count; rates from medians, the ratio from pairs."""
    seconds = []
    for _ in range(ROUNDS + 1):
        pair = []
        for run in (ours, other):
            began = clock()
            run()
            pair.append(clock() - began)
        seconds.append(pair)
    ratios = [b / a for a, b in seconds[1:]]
    rates = [amount / median(column) for column in zip(*seconds[1:], strict=True)]
    detail = "{:,.0f} against {:,.0f} {}".format(*rates, unit)
    return Figure(name, f"{median(ratios):.2f} x", goal, f"{detail}, spread {max(ratios) / min(ratios):.2f}")


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended, page faults and all."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
