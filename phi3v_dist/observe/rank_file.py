"""What the ranks of one node measured of a window → a line of `RUN/ranks/HOST.jsonl`.

What comes in: a table of numbers, a line for each rank. What goes out: JSON by column; what a rank did not measure is
null. Surprise: a disk that does not take it costs this file alone: one warning, and no more lines.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phi3v_dist.observe.columns import COLUMNS
from phi3v_dist.observe.metrics import ATTEMPT, STEP
from phi3v_dist.observe.tracker import cut_torn_line
from phi3v_dist.train.laps import Span

FOLDER_NAME = "ranks"

log = logging.getLogger(__name__)


class RankFile:
    """ranks: of this node, in the order of the tables' lines."""

    def __init__(self, run_folder: Path, host: str, ranks: Sequence[int], attempt: int):
        self.path = run_folder / FOLDER_NAME / f"{host.replace('/', '_')}.jsonl"
        self._facts = {ATTEMPT: attempt, "host": host, "ranks": list(ranks)}
        self._is_ready, self._has_failed = False, False

    def append(self, step: int, table: np.ndarray, spans: Sequence[Sequence[Span]]) -> None:
        """A window that ended with `step`. spans: of that step, by rank; unix seconds."""
        if self._has_failed:
            return
        values = dict(zip(COLUMNS, ([_short(value) for value in column] for column in table.T.tolist()), strict=True))
        line = {"time": round(time.time(), 3), STEP: step, **self._facts, "values": values, "spans": spans}
        try:
            if not self._is_ready:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                cut_torn_line(self.path)
                self._is_ready = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): it gets no more lines, and training goes on", self.path, error)
            self._has_failed = True


def _short(value: float) -> float | None:
    """Six digits; the file has one number for each rank, and a run many windows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
