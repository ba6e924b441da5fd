"""Rows of numbers → messages worth waking somebody for: one small table, each kind at most once an hour.

Surprise: an alert is sent by whoever shows the run (W&B mails it), so it is sent online only. What it says stands in
the log as well, from whoever noticed it there: this is no second judge, it reads the logged numbers.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phi3v_dist.observe.metrics import STEP, Number
from phi3v_dist.observe.stragglers import VERY_SLOW

EVERY_S = 3600.0  # between two alerts of one kind
DISK_LOOK_S = 60.0
LEAST_ROOM_GIB = 1.0  # where no checkpoint has said how much the next one takes

Rule = Callable[[float, float], bool]  # (now, before): whether this is worth an alert; before is NaN at first


@dataclass(frozen=True)
class Alert:
    """metric: whose value is looked at. text: may quote any metric of the row by `{name}`."""

    title: str
    metric: str
    is_due: Rule
    level: Literal["INFO", "WARN", "ERROR"]
    text: str


def rises(now: float, before: float) -> bool:
    return now > before


def is_set(now: float, before: float) -> bool:
    return now > 0


def below(limit: float) -> Rule:
    return lambda now, before: now < limit


ALERTS = (
    Alert("Step skipped", "train/skipped_steps", rises, "WARN", "{train/skipped_steps} steps so far made no update"),
    Alert("Loss spike", "train/spike", is_set, "WARN", "the loss is {train/loss}, far above its last steps"),
    Alert("Slow rank", "health/straggler_score_min", below(VERY_SLOW), "WARN",
          "rank {health/slowest_rank} holds the others up: score {health/straggler_score_min}, the median's is 1"),
    Alert("Bad samples", "data/quarantined", rises, "INFO", "{data/quarantined} bad samples were left out so far"),
    Alert("Another start", "goodput/restarts", rises, "INFO", "start {run/attempt} of the run"),
    Alert("Little room", "", is_set, "ERROR", "{folder} has {free} GiB left, a checkpoint takes {needed} GiB"),
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


class Alerts:
    """Looks at each row. free_gib: room on the run folder's disk, asked at most once a minute."""

    def __init__(
        self, run_folder: Path, clock: Callable[[], float] = time.monotonic,
        free_gib: Callable[[Path], float] = lambda folder: shutil.disk_usage(folder).free / 2**30,
    ):  # fmt: skip
        self.run_folder, self._clock, self._free_gib = run_folder, clock, free_gib
        self._before: dict[str, float] = {}
        self._said_s: dict[str, float] = {}
        self._looked_s = -math.inf
        self._needed_gib = 0.0

    def look(self, row: Mapping[str, Number]) -> list[Said]:
        """What to say of this row; the row's numbers are remembered for the next."""
        found = []
        for alert in ALERTS:
            if alert.metric in row:
                now, before = float(row[alert.metric]), self._before.get(alert.metric, math.nan)
                if alert.is_due(now, before):
                    found.append(self._say(alert, {name: f"{value:g}" for name, value in row.items()}))
            elif not alert.metric:
                found.append(self._look_at_disk(alert, row))
        self._before.update({name: float(value) for name, value in row.items()})
        return [said for said in found if said]

    def _look_at_disk(self, alert: Alert, row: Mapping[str, Number]) -> Said | None:
        self._needed_gib = float(row.get("ckpt/gib", self._needed_gib))
        if self._clock() - self._looked_s < DISK_LOOK_S:
            return None
        self._looked_s = self._clock()
        free, needed = self._free_gib(self.run_folder), max(self._needed_gib, LEAST_ROOM_GIB)
        words = {"folder": str(self.run_folder), "free": f"{free:.3g}", "needed": f"{needed:.3g}", STEP: str(row[STEP])}
        return self._say(alert, words) if free < needed else None

    def _say(self, alert: Alert, words: Mapping[str, str]) -> Said | None:
        if self._clock() - self._said_s.get(alert.title, -math.inf) < EVERY_S:
            return None
        self._said_s[alert.title] = self._clock()
        text = alert.text
        for name, value in words.items():
            text = text.replace(f"{{{name}}}", value)
        return Said(alert.title, f"step {words[STEP]}: {text}", alert.level)
