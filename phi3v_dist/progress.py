"""Shows how far a task is that may take longer than 10 s: a bar on a terminal, otherwise a log line a minute.

Note: only rank 0 shows progress, because its log alone has level INFO. A task reports numbers and gets nothing back, so
it does the same whether or not anybody looks.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from phi3v_dist.observe.metrics import format_seconds

EVERY_S = 60.0  # between lines

Report = Callable[[str, int, int | None], None]  # task, units done, units in all if known

log = logging.getLogger(__name__)


@contextmanager
def show_progress(
    unit: str, *, bar: bool = True, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report]:
    """Yield a function to which a task reports `(task, done, total)`, as often as it likes.

    Args:
        unit: what is counted, in the plural.
        bar: draw a bar where there is a terminal. False inside training, which has its own.
        console: of the terminal; default: stderr, so that stdout stays what the command prints.
        clock: seconds, for lines.
    """
    console = console or Console(file=sys.stderr)
    if bar and console.is_terminal and log.isEnabledFor(logging.INFO):
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        shown = Progress(*columns, console=console, transient=True)
        try:
            shown.start()
        except LiveError:  # another bar is on this terminal
            yield _Lines(unit, clock).report
            return
        try:
            yield _Bars(shown).report
        finally:
            shown.stop()
    else:
        yield _Lines(unit, clock).report


class _Bars:
    """A bar for each task."""

    def __init__(self, shown: Progress):
        self.shown = shown
        self.ids: dict[str, TaskID] = {}

    def report(self, task: str, done: int, total: int | None) -> None:
        if task not in self.ids:
            self.ids[task] = self.shown.add_task(task, total=total)
        self.shown.update(self.ids[task], completed=done, total=total)


class _Lines:
    """A line when a task has taken a minute, and each minute from then on."""

    def __init__(self, unit: str, clock: Callable[[], float]):
        self.unit, self.clock = unit, clock
        self.began_s: dict[str, tuple[float, int]] = {}  # by task: when it was first reported, and how far it was then
        self.printed_s: dict[str, float] = {}

    def report(self, task: str, done: int, total: int | None) -> None:
        now_s = self.clock()
        began_s, first = self.began_s.setdefault(task, (now_s, done))
        if now_s - self.printed_s.setdefault(task, began_s) < EVERY_S:
            return
        self.printed_s[task] = now_s

        per_s = (done - first) / (now_s - began_s)
        amount = f"{done:,} {self.unit}" if total is None else f"{done:,} of {total:,} {self.unit}"
        left = ""
        if total is not None and per_s > 0:
            left = f", {format_seconds(round((total - done) / per_s))} left"
        log.info("%s: %s, %s/s%s", task, amount, f"{per_s:,.1f}" if per_s < 100 else f"{per_s:,.0f}", left)
