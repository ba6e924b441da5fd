"""Every rank's own time in a window of steps → which rank the others wait for, and whether its data or its computing.

What comes in: seconds a step that each rank spent without waiting for others. What goes out: numbers to log, and a
warning that names a slow rank, once for each stretch of windows in which it is slow in the same. Surprise: of two
ranks the faster one is the typical one. With a mean between them a rank that takes twice as long would score 0.75. And
in the first window nobody is slow: in it ranks set up what later steps use.
"""

import logging
from collections.abc import Sequence

import numpy as np

from phi3v_dist.observe.metrics import Number

SLOW, VERY_SLOW = 0.85, 0.7  # scores: the median rank's own time over a rank's own
PATIENCE = 3  # windows in a row below SLOW until a rank is named; below VERY_SLOW it is named at once
EXCESS_S, EXCESS_OF_STEP = 0.05, 0.1  # a slow rank is at least so much above the median, in seconds and of a step
MOST_NAMED = 8  # a line each
MOST_NODES = 64  # with a number of their own

log = logging.getLogger(__name__)


class Stragglers:
    """hosts, labels: by rank; a label is the host as a metric's name has it."""

    def __init__(self, hosts: Sequence[str], labels: Sequence[str]):
        self.hosts = hosts
        self.labels = sorted(set(labels))
        self._node = (
            np.array([self.labels.index(label) for label in labels]) if len(self.labels) <= MOST_NODES else None
        )
        self._slow_windows = np.zeros(len(hosts), int)
        self._in_data = np.zeros(len(hosts), bool)
        self._named: dict[int, str] = {}
        self._is_warm = False

    def look(
        self, steps: tuple[int, int], data_s: np.ndarray, compute_s: np.ndarray, step_s: float
    ) -> dict[str, Number]:
        """What is to be logged of a window; nothing when there is one rank.

        Args:
            steps: first and last. data_s, compute_s: [ranks] own time of a step. step_s: a whole step.
        """
        if len(self.hosts) == 1:
            return {}
        own_s = data_s + compute_s
        typical_s = max(_low_median(own_s), 1e-9)
        scores = typical_s / np.maximum(own_s, 1e-9)
        matters = own_s - typical_s > max(EXCESS_S, EXCESS_OF_STEP * step_s)
        slow = matters & (scores < SLOW) & self._is_warm
        self._is_warm = True
        in_data = data_s - _low_median(data_s) > compute_s - _low_median(compute_s)
        goes_on = slow & (self._slow_windows > 0) & (in_data == self._in_data)
        self._slow_windows, self._in_data = np.where(goes_on, self._slow_windows + 1, slow.astype(int)), in_data
        self._named = {rank: why for rank, why in self._named.items() if slow[rank]}
        new = []
        for rank in np.flatnonzero(slow & ((self._slow_windows >= PATIENCE) | (scores < VERY_SLOW))).tolist():
            why = "loading data" if in_data[rank] else "computing"
            if rank not in self._named or (why != self._named[rank] and self._slow_windows[rank] >= PATIENCE):
                self._named[rank] = why
                new.append(rank)
        for rank in new[:MOST_NAMED]:
            log.warning(
                "rank %d on %s is slow in %s: of a step (%.2f s) it works %.2f s, the median rank %.2f s, and the "
                "others wait for it (steps %d to %d). Look at that node: other programs, heat, a weak link, a slow "
                "disk",
                *(rank, self.hosts[rank], self._named[rank], step_s, own_s[rank], typical_s, *steps),
            )
        if len(new) > MOST_NAMED:
            log.warning("and %d more ranks are slow in the same steps", len(new) - MOST_NAMED)
        return {
            "health/straggler_ratio": float(own_s.max() / typical_s),
            "health/straggler_score_min": float(min(scores.min(), 1.0)),
            "health/slowest_rank": int(own_s.argmax()),
            "health/slow_ranks": int(slow.sum()),
        } | self._nodes(own_s)

    def _nodes(self, own_s: np.ndarray) -> dict[str, Number]:
        if self._node is None:
            return {}
        slowest_s = np.zeros(len(self.labels))
        np.maximum.at(slowest_s, self._node, own_s)
        return {f"node/{label}/own_s": float(s) for label, s in zip(self.labels, slowest_s, strict=True)}


def _low_median(values: np.ndarray) -> float:
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])
