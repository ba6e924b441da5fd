"""Rows of numbers → warnings about a run that trains, but not as it should.

Surprise: it only speaks. It cannot stop or change a run, and what it says of a stretch of steps it says once: again
only when things were well in between.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from phi3v_dist.data.outcomes import listed
from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Row, Tracker

STALL_LIMIT_PCT = 10.0  # of the time of a logging interval; a loader that keeps up is far below
FEWEST = 20  # losses before one can be called unusual
SPREADS, SHARE = 6.0, 0.1  # a noisy loss must be far out of its noise, a smooth one by a tenth at least

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


class SpikeWatch:
    """Says when a loss is far above those before it, with the samples of the step.

    It knows the last `window` losses of this attempt only: a run started again begins anew and is silent until it has
    seen `FEWEST` of them. sample_name: id → `shard:key`.
    """

    def __init__(self, sample_name: Callable[[int], str], window: int = 50, is_main: bool = True):
        self.sample_name, self.is_main = sample_name, is_main
        self._losses: deque[float] = deque(maxlen=window)
        self._is_high = False

    def look(self, step: int, loss: float, sample_ids: Sequence[int]) -> bool:
        """Whether this loss is a spike; spoken of once for each stretch of them.

        Spread is 1.4826 x the median absolute deviation, which for a normal distribution is its standard deviation;
        a spike is more than `SPREADS` of them and `SHARE` of the median above the median. Losses that are not finite
        are no spikes: those steps are skipped, and spoken of elsewhere.
        """
        if not math.isfinite(loss):
            return False
        is_spike = False
        if len(self._losses) >= FEWEST:
            typical = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(known - typical) for known in self._losses)
            is_spike = loss - typical > max(SPREADS * spread, SHARE * abs(typical))
            if is_spike and not self._is_high and self.is_main:
                logger.warning(
                    "step %d: loss %.4g, where %.4g is typical of the last %d steps. Its samples: %s",
                    *(step, loss, typical, len(self._losses), listed(sample_ids, self.sample_name)),
                )
        self._is_high = is_spike
        self._losses.append(loss)
        return is_spike
