"""Rows of numbers → warnings about a run that trains, but not as it should.

Surprise: it only speaks. It is a sink like any other, so it cannot stop or change a run, and what it says of a stretch
of steps it says once: again only when things were well in between.
"""

import logging

from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Row, Tracker

STALL_LIMIT_PCT = 10.0  # of the time of a logging interval; a loader that keeps up is far below

logger = logging.getLogger(__name__)


class StarvationWatch(Tracker):
    """Says when training waits for data, and what to change.

    num_workers, prefetch_rows: the settings as they are, for the message.
    """

    def __init__(self, every_n_steps: int, num_workers: int, prefetch_rows: int):
        self.every_n_steps, self.num_workers, self.prefetch_rows = every_n_steps, num_workers, prefetch_rows
        self._waited_s = self._all_s = 0.0
        self._steps: list[int] = []
        self._is_starving = False

    def log(self, row: Row) -> None:
        if "data/stall_pct" not in row or row[STEP] == 1:  # the first step always waits for its first row
            return
        self._steps.append(int(row[STEP]))
        self._all_s += row["time/step_s"]
        self._waited_s += row["time/step_s"] * row["data/stall_pct"] / 100
        if len(self._steps) < self.every_n_steps:
            return
        stall_pct = 100 * self._waited_s / self._all_s
        if stall_pct > STALL_LIMIT_PCT and not self._is_starving:
            logger.warning(
                "steps %d to %d waited for data for %.0f %% of their time: raise data.num_workers (now %d; decoding is "
                "what takes longest) up to the cores each rank has, then data.prefetch_rows (now %d)",
                *(self._steps[0], self._steps[-1], stall_pct, self.num_workers, self.prefetch_rows),
            )
        self._is_starving = stall_pct > STALL_LIMIT_PCT
        self._waited_s = self._all_s = 0.0
        self._steps = []
