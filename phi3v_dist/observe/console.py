"""Rows of numbers → what a person sees while training runs: a line to grep every N steps, and a bar on a terminal.

Note: log lines appear above the bar (progress.py).
"""

import atexit
import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.table import Table

from phi3v_dist.observe import score_table
from phi3v_dist.observe.metrics import STEP, Number, format_number, format_seconds, format_value, is_own_score
from phi3v_dist.observe.tracker import Row, Tracker
from phi3v_dist.progress import LiveDisplay

logger = logging.getLogger(__name__)

LOSS, SPEED = "train/loss", "perf/tokens_per_s_per_gpu"
LINE = (LOSS, "train/grad_norm", "train/lr/text", SPEED, "time/step_s", "time/data_s")


class ConsoleTracker(Tracker):
    """`step=120/600 loss=2.103 grad_norm=1.2 …` every N steps, one line per evaluation, a table at the end."""

    def __init__(self, total_steps: int, every_n_steps: int = 10, console: Console | None = None):
        self.total_steps = total_steps
        self.every_n_steps = every_n_steps
        self.console = console or Console()
        self._bar: _Bar | None = None
        self._first: tuple[float, Number] | None = None  # (clock in seconds, step) of this attempt's first row

    def start(self, config: Mapping[str, Any]) -> None:
        if self.console.is_terminal:
            self._bar = _Bar(self.console, self.total_steps)

    def log(self, row: Row) -> None:
        step = row[STEP]
        eta = self._eta(step)
        if LOSS in row and (step % self.every_n_steps == 0 or step in (1, self.total_steps)):
            numbers = [f"{_short(name)}={_plain(row[name])}" for name in LINE if name in row]
            logger.info(" ".join([f"step={step:.0f}/{self.total_steps}", *numbers, f"eta={eta.replace(' ', '')}"]))
        names = [name for name in row if is_own_score(name.replace("eval/blind/", "eval/", 1))]
        if scores := [f"{name.removeprefix('eval/')}={_plain(row[name])}" for name in names]:
            logger.info(" ".join([f"eval step={step:.0f}/{self.total_steps}", *scores]))
        if self._bar and LOSS in row:  # other rows may be of steps long past
            self._bar.show(row, eta)

    def finish(self, summary: Row) -> None:
        if self._bar:
            self._bar.close()
        for table in filter(None, (_summary_table(summary), score_table.printed(summary))):
            score_table.widened(self.console).print(table)

    def _eta(self, step: Number) -> str:
        """Time left at this attempt's pace so far, evaluations and checkpoints included."""
        now = time.monotonic()
        self._first = self._first or (now, step)
        started, first_step = self._first
        if step <= first_step:
            return "?"
        return format_seconds(round((now - started) / (step - first_step) * (self.total_steps - step)))


class _Bar:
    """The live bar, closed at the latest when the process ends."""

    def __init__(self, console: Console, total_steps: int):
        self._display = LiveDisplay(
            console,
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[speed]} tokens/s · {task.fields[eta]} left"),
        )
        self._display.shown.add_task("train", total=total_steps, loss="?", speed="?", eta="?")
        atexit.register(self.close)

    def show(self, row: Row, eta: str) -> None:
        task = self._display.shown.tasks[0]
        for field, name in (("loss", LOSS), ("speed", SPEED)):
            if name in row:
                task.fields[field] = format_number(row[name])
        self._display.shown.update(task.id, completed=row[STEP], eta=eta)

    def close(self) -> None:
        self._display.close()
        atexit.unregister(self.close)


def _plain(number: Number) -> str:
    return format_number(number).replace(",", "")  # a line made for grep and awk


def _short(name: str) -> str:
    return "lr" if name.startswith("train/lr/") else name.rpartition("/")[2]


def _summary_table(summary: Row) -> Table | None:
    """What was done; scores have a table of their own."""
    done = [name for name in sorted(summary) if not score_table.is_of_scores(name)]
    table = Table("metric", "value", title="summary")
    for name in done:
        table.add_row(name, format_value(name, summary[name]))
    return table if done else None
