"""`RUN/ranks/*.jsonl` → what every rank measured in every window of steps, as arrays.

What comes in: one file a node, one line a window, as `observe/collect.py` writes them. What goes out: `RankRecord`.
Surprise: of a long run on many nodes these files are gigabytes. At most `READ_BYTES` of them are read, the newest part
of each, and the page says so. Windows that a failure took back are left out, as in `read_metrics`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3v_dist.observe.metrics import ATTEMPT, STEP
from phi3v_dist.observe.run_folder import is_number

FOLDER = "ranks"
READ_BYTES = 400_000_000
MAX_RANK = 1 << 20  # a larger number is damage, and would be an array of that size
DATA, COMPUTE, WAIT = "health/data_s", "health/compute_s", "comm/wait_s"
KEPT = (DATA, COMPUTE, WAIT, "time/data_s", "time/step_s")

Span = tuple[str, float, float]  # (what, begin, end), unix seconds


@dataclass(frozen=True)
class RankRecord:
    """steps [windows]: the last one of each. ranks [ranks], ascending. values: name → [windows, ranks], NaN where not
    measured. hosts: of each rank, as the newest line says. spans: of the newest window that has any, by rank."""

    steps: np.ndarray
    ranks: np.ndarray
    values: Mapping[str, np.ndarray]
    hosts: Mapping[int, str]
    spans: Mapping[int, list[Span]]
    span_step: int

    def of(self, name: str) -> np.ndarray:
        """[windows, ranks]; all NaN where nobody measured it."""
        return self.values.get(name, np.full((len(self.steps), len(self.ranks)), np.nan))

    @property
    def data_s(self) -> np.ndarray:
        """Seconds of a step that each rank spent in its own loader."""
        own = self.of(DATA)
        return own if np.isfinite(own).any() else self.of("time/data_s")

    @property
    def own_s(self) -> np.ndarray:
        """Seconds of a step that no other rank's pace hides: data and computing, without waits."""
        return self.data_s + self.of(COMPUTE)

    @property
    def step_s(self) -> np.ndarray:
        """Seconds of a whole step."""
        whole = self.of("time/step_s")
        return whole if np.isfinite(whole).any() else self.own_s + np.nan_to_num(self.of(WAIT))


def read_ranks(run_folder: Path, notes: list[str]) -> RankRecord | None:
    """None when no rank has written a window; what cannot be read is added to `notes`."""
    paths = sorted((run_folder / FOLDER).glob("*.jsonl"))
    windows = [window for path in paths for window in _windows(path, READ_BYTES // len(paths), notes)]
    first_steps: dict[int, int] = {}
    for window in windows:
        attempt, step = window[ATTEMPT], window[STEP]
        first_steps[attempt] = min(step, first_steps.get(attempt, step))
    windows = [
        window
        for window in windows
        if all(window[STEP] < first for attempt, first in first_steps.items() if attempt > window[ATTEMPT])
    ]
    if not windows:
        return None
    windows.sort(key=lambda window: (window[ATTEMPT], window[STEP]))
    steps = np.unique([window[STEP] for window in windows])
    ranks = np.unique(np.concatenate([window["ranks"] for window in windows]))
    return RankRecord(steps, ranks, _arrays(windows, steps, ranks), *_names_and_spans(windows))


def _arrays(windows: list[dict[str, Any]], steps: np.ndarray, ranks: np.ndarray) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    rows = np.searchsorted(steps, [window[STEP] for window in windows])
    for row, window in zip(rows, windows, strict=True):
        columns = np.searchsorted(ranks, window["ranks"])
        for name, numbers in window["values"].items():
            table = values.setdefault(name, np.full((len(steps), len(ranks)), np.nan, np.float32))
            table[row, columns] = numbers
    return values


def _names_and_spans(windows: list[dict[str, Any]]) -> tuple[dict[int, str], dict[int, list[Span]], int]:
    hosts = {rank: window["host"] for window in windows for rank in window["ranks"].tolist()}
    with_spans = [window for window in windows if window["spans"]]
    last = max((window[STEP] for window in with_spans), default=0)
    spans = {
        rank: found
        for window in with_spans
        if window[STEP] == last
        for rank, found in zip(window["ranks"].tolist(), window["spans"], strict=False)
        if found
    }
    return hosts, spans, int(last)


def _windows(path: Path, most_bytes: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines that can be read; of all but the newest the spans are not looked at."""
    lines = _lines(path, most_bytes, notes)
    num_damaged = 0
    for place, line in enumerate(lines):
        if place < len(lines) - 1 and (cut := line.rfind(b',"spans":')) > 0:
            line = line[:cut] + b"}"  # half the bytes, and only the newest are drawn
        try:
            yield _window(json.loads(line), path.stem)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            num_damaged += 1
    if num_damaged:
        notes.append(f"{path}: {num_damaged} damaged lines are left out")


def _lines(path: Path, most_bytes: int, notes: list[str]) -> list[bytes]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - most_bytes))
            lines = file.read().split(b"\n")[:-1]  # a line without an end is still being written, or was torn by a kill
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error})")
        return []
    if size > most_bytes:
        notes.append(f"{path}: only its last {most_bytes / 1e6:,.0f} MB of {size / 1e6:,.0f} are shown")
        return lines[1:]
    return lines


def _window(tree: Any, stem: str) -> dict[str, Any]:
    """Raises ValueError, TypeError, KeyError or AttributeError where a line is not as it should be."""
    ranks = np.array([int(rank) for rank in tree["ranks"]])
    if not len(ranks) or ranks.min() < 0 or ranks.max() > MAX_RANK:
        raise ValueError(f"ranks {ranks}")
    values = {}
    for name in KEPT:
        if (numbers := tree["values"].get(name)) is not None:
            values[name] = np.array([np.nan if number is None else number for number in numbers], np.float32)
            if values[name].shape != ranks.shape:
                raise ValueError(f"{name}: {len(numbers)} values of {len(ranks)} ranks")
    spans = [[_span(span) for span in of_rank or ()] for of_rank in tree.get("spans") or ()]
    return {
        STEP: int(tree[STEP]), ATTEMPT: int(tree.get(ATTEMPT, 1)), "host": str(tree.get("host", stem)), "ranks": ranks,
        "values": values, "spans": spans,
    }  # fmt: skip


def _span(span: Any) -> Span:
    what, begin, end = span
    if not (is_number(begin) and is_number(end) and begin <= end):
        raise ValueError(f"span {span}")
    return str(what), float(begin), float(end)
