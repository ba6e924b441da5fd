"""Rows of numbers → the places a person looks: `metrics.jsonl` (the record) and its mirrors.

What comes in: `{metric name: number}`, already reduced over the ranks, on rank 0 only. What goes out: one JSON line per
row, and the same row to every mirror (console, W&B, TensorBoard). Surprise: the sinks are not equals. The record may
stop a run, since training that leaves no trace is worth little; a mirror never does: its first failure is a warning,
and training goes on.
"""

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from phi3v_dist.observe.metrics import ATTEMPT, STEP, Number, check

logger = logging.getLogger(__name__)

RECORD_NAME = "metrics.jsonl"

JSON_NUMBERS = (float, int, type(None))  # true and false are none
LOOK_BACK_BYTES = 1 << 20

Row = Mapping[str, Number]
Prediction = Mapping[str, Any]  # one line of eval/step-NNNNNN/predictions.jsonl


class Tracker:
    """The seam between training and whoever watches it. A sink overrides the verbs that it has a use for."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Open the sink. `config` is the resolved settings, without secrets."""

    def log(self, row: Row) -> None:
        """Take one row; it carries `train/step`, and its names are in the registry."""

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        """Take the answers of one evaluation; their thumbnails' paths are relative to `folder`."""

    def preempted(self) -> None:
        """The run is stopped before its end, and `finish` comes next: another attempt goes on. May be said twice."""

    def finish(self, summary: Row) -> None:
        """Close the sink with the run's final numbers."""


class NoTracker(Tracker):
    """What every rank but 0 holds."""


class JsonlTracker(Tracker):
    """The record: append-only over all attempts, one line per row, on disk before the next step starts."""

    def __init__(self, run_folder: Path, attempt: int):
        self.path = run_folder / RECORD_NAME
        self.attempt = attempt
        self._file: TextIO | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        assert self._file is not None, "log() before start()"
        assert STEP in row, f"a row needs {STEP!r}: {dict(row)}"
        check(row)
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}  # strict JSON
        line = {"time": round(time.time(), 3), ATTEMPT: self.attempt, **numbers}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def finish(self, summary: Row) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class AllOf(Tracker):
    """The record first, then every mirror, none of which can hurt the run or the other mirrors.

    Rows come from the training thread and from the one that collects other ranks' numbers (`collect.py`): each reaches
    every sink before the next one begins, so lines stay whole and all sinks see the same order.
    """

    def __init__(self, record: JsonlTracker, mirrors: Sequence[Tracker]):
        self.record = record
        self.mirrors = mirrors
        self._warned: set[str] = set()
        self._one_at_a_time = threading.Lock()

    def start(self, config: Mapping[str, Any]) -> None:
        self.record.start(config)
        self._mirror(lambda mirror: mirror.start(config))

    def log(self, row: Row) -> None:
        with self._one_at_a_time:
            self.record.log(row)
            self._mirror(lambda mirror: mirror.log({ATTEMPT: self.record.attempt, **row}))

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        with self._one_at_a_time:
            self._mirror(lambda mirror: mirror.media(step, predictions, folder))

    def preempted(self) -> None:
        self._mirror(lambda mirror: mirror.preempted())

    def finish(self, summary: Row) -> None:
        with self._one_at_a_time:
            self.record.finish(summary)
            self._mirror(lambda mirror: mirror.finish(summary))

    def _mirror(self, tell: Callable[[Tracker], None]) -> None:
        for mirror in self.mirrors:
            name = type(mirror).__name__
            try:
                tell(mirror)
            except Exception as error:  # a client may raise anything; see OBSERVABILITY.md §0.4 for how many do
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning(
                        "%s failed (%s: %s); training goes on, the record is %s, and this is said once",
                        *(name, type(error).__name__, error, self.record.path),
                    )


def read_rows(run_folder: Path) -> list[dict[str, Number]]:
    """All rows of all attempts in the order in which they were logged, also of steps that a failure took back."""
    return list(_read_rows(run_folder / RECORD_NAME))


def read_metrics(run_folder: Path, notes: list[str] | None = None) -> list[dict[str, Number]]:
    """The surviving history: one row per step, in order; what a later attempt trained again replaces the earlier.

    An attempt that starts at step s makes everything after s that earlier attempts logged void, even steps that it has
    not reached again yet. Rows of one step (training, then evaluation) are merged. Numbers that were not finite come
    back as NaN. Each row keeps the columns `time` (unix seconds) and `run/attempt`.

    notes: where damaged lines are spoken of; None: in the log.
    """
    history: dict[int, dict[str, Number]] = {}
    attempt = 0
    for row in _read_rows(run_folder / RECORD_NAME, notes):
        step = int(row[STEP])
        if row[ATTEMPT] > attempt:
            attempt = int(row[ATTEMPT])
            history = {earlier: kept for earlier, kept in history.items() if earlier <= step}
        history[step] = {**history.get(step, {}), **row}
    return [history[step] for step in sorted(history)]


def last_attempt(run_folder: Path) -> int:
    """The latest attempt in the record, 0 if there is none. Only the end is read: an attempt that was taken over writes
    no more than a step's rows after the one that took over."""
    path, latest = run_folder / RECORD_NAME, 0
    if not path.exists():
        return latest
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOOK_BACK_BYTES))
        for line in file.read().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, RecursionError):  # torn, damaged, or cut by where reading began
                latest = max(latest, int(parse_row(line)[ATTEMPT]))
    return latest


def parse_row(line: bytes) -> dict[str, Number]:
    """One line of the record; null is NaN, and what is no number is left out. ValueError: it is not a row."""
    tree = json.loads(line)
    if not isinstance(tree, dict):
        raise ValueError("not an object")
    row = {name: math.nan if value is None else value for name, value in tree.items() if type(value) in JSON_NUMBERS}
    if not all(abs(row.get(name, math.nan)) < 2**53 for name in (STEP, ATTEMPT, "time")):
        raise ValueError(f"without {STEP}, {ATTEMPT} or time")
    return row


def _read_rows(path: Path, notes: list[str] | None = None) -> Iterator[dict[str, Number]]:
    """Every whole line of the record; a line that a kill left unfinished is not one."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield parse_row(line)
        except (ValueError, RecursionError):
            said = f"{path} line {number} is damaged ({line[:40]!r}…) and left out"
            if notes is None:
                logger.warning("%s", said)
            else:
                notes.append(said)


def cut_torn_line(path: Path) -> None:
    """Truncate a file of lines to its last whole one, so that the next does not continue a torn one."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole_bytes = content.rfind(b"\n") + 1
    if whole_bytes < len(content):
        logger.warning("%s ended in the middle of a line (a kill); cut %d bytes", path, len(content) - whole_bytes)
        with path.open("r+b") as file:
            file.truncate(whole_bytes)
