"""Shows how far a task is that may take longer than 10 s: a bar on a terminal, otherwise a log line a minute.

Note: only rank 0 shows progress, because its log alone has level INFO. A task reports numbers and gets nothing back, so
it does the same whether or not anybody looks.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from phi3v_dist.observe.metrics import format_seconds

EVERY_S = 60.0  # between lines
BYTES = "bytes"  # the unit that is shown as kB, MB, GB

ItemT = TypeVar("ItemT")

log = logging.getLogger(__name__)


@runtime_checkable
class Report(Protocol):
    """What a task calls, as often as it likes and from any thread.

    Args:
        task: what is done, such as "indexing".
        done: units done.
        total: units in all, if known.
        unit: what is counted, in the plural; default: that of `show_progress`.
    """

    def __call__(self, task: str, done: int, total: int | None, unit: str | None = None) -> None: ...


@contextmanager
def show_progress(
    unit: str, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report]:
    """Yield a function to which tasks report.

    Args:
        unit: what is counted, in the plural.
        console: of the terminal; default: stderr, so that stdout stays what the command prints.
        clock: seconds, for lines.
    """
    console = console or Console(file=sys.stderr)
    if not console.is_terminal or not log.isEnabledFor(logging.INFO) or LiveDisplay.current:
        yield _Lines(unit, clock).report
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    display = LiveDisplay(console, *columns, transient=True)
    try:
        yield _Bars(unit, display.shown).report
    finally:
        display.close()


def track(items: Collection[ItemT], task: str, unit: str) -> Iterator[ItemT]:
    """Yield the items and show how many were handled."""
    with show_progress(unit) as report:
        for done, item in enumerate(items):
            report(task, done, len(items))
            yield item
        report(task, len(items), len(items))


def summed(report: Report, task: str, total: int | None) -> Callable[[int], None]:
    """A function that is told how many more units are done."""
    done = 0

    def add(num: int) -> None:
        nonlocal done
        done += num
        report(task, done, total)

    return add


class LiveDisplay:
    """A bar that is drawn at the end of the terminal until it is closed; prints and log lines appear above it.

    Note: a process has at most one, since a second one would draw over the first. Streams that are not terminals are
    left alone, or what a command writes to a file would appear on the terminal instead.
    """

    current: ClassVar["LiveDisplay | None"] = None

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = False):
        self.shown = Progress(
            *columns,
            console=console,
            transient=transient,
            redirect_stdout=_is_terminal("stdout"),
            redirect_stderr=_is_terminal("stderr"),
        )
        streams = {getattr(sys, name): name for name in ("stdout", "stderr") if _is_terminal(name)}
        self._adopted = [
            (handler, handler.stream)
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams
        ]
        LiveDisplay.current = self
        self.shown.start()  # replaces sys.stdout and sys.stderr by proxies that print above the bar
        for handler, stream in self._adopted:
            handler.setStream(getattr(sys, streams[stream]))

    def close(self) -> None:
        """Restore the terminal and the log handlers; harmless when it was done before."""
        for handler, stream in self._adopted:
            handler.setStream(stream)
        self._adopted = []
        self.shown.stop()
        if LiveDisplay.current is self:
            LiveDisplay.current = None


def _is_terminal(name: str) -> bool:
    stream = getattr(sys, name)
    return stream is not None and stream.isatty()


class _Bars:
    """A bar for each task."""

    def __init__(self, unit: str, shown: Progress):
        self.unit, self.shown = unit, shown
        self.ids: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def report(self, task: str, done: int, total: int | None, unit: str | None = None) -> None:
        amount = format_amount(done, total, unit or self.unit)
        with self._lock:
            if task not in self.ids:
                self.ids[task] = self.shown.add_task(task, total=total, amount=amount)
            self.shown.update(self.ids[task], completed=done, total=total, amount=amount)


class _Lines:
    """A line when a task has taken a minute, and each minute from then on."""

    def __init__(self, unit: str, clock: Callable[[], float]):
        self.unit, self.clock = unit, clock
        self.began_s: dict[str, tuple[float, int]] = {}  # by task: when it was first reported, and how far it was then
        self.printed_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def report(self, task: str, done: int, total: int | None, unit: str | None = None) -> None:
        unit = unit or self.unit
        with self._lock:
            now_s = self.clock()
            began_s, first = self.began_s.setdefault(task, (now_s, done))
            if now_s - self.printed_s.setdefault(task, began_s) < EVERY_S:
                return
            self.printed_s[task] = now_s

        per_s = (done - first) / (now_s - began_s)
        left = ""
        if total is not None and per_s > 0:
            left = f", {format_seconds(round((total - done) / per_s))} left"
        log.info("%s: %s, %s%s", task, format_amount(done, total, unit), _format_rate(per_s, unit), left)


def format_amount(done: int, total: int | None, unit: str) -> str:
    """`130 of 1,000 shards`, `1.2 GB of 8.0 GB`, `900 records`."""
    if unit == BYTES:
        return decimal(done) if total is None else f"{decimal(done)} of {decimal(total)}"
    return f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"


def _format_rate(per_s: float, unit: str) -> str:
    if unit == BYTES:
        return f"{decimal(round(per_s))}/s"
    if per_s >= 1 or per_s <= 0:
        return f"{per_s:,.1f}/s" if per_s < 100 else f"{per_s:,.0f}/s"
    return f"{60 * per_s:,.1f}/min"  # 0.02/s says nothing
