"""How long each kind of work of one rank may take without a sign of life, from what the same kind has taken so far."""

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

NEVER_HANGS, FOREVER_S = "idle", 1e9

# Kinds whose intervals consist of unlike parts or wait for something else: earlier ones do not predict the next.
UNTIMED = ("start", "load", "settle", "score", "export", "finish", "flush")

REMEMBERED = 65  # intervals of each kind
ALIKE = 2.0  # an interval predicts the next one if its work was at least this part of the next one's


@dataclass(frozen=True)
class Bounds:
    """When a silent rank has hung. See `WatchSettings`."""

    hang_s: float = 30.0
    hang_factor: float = 10.0
    first_s: float = 600.0
    slow_factor: float = 10.0


class Limits:
    """The intervals that one process has taken, by kind of work, and the limit of the next one.

    An interval is the time between two signs of life. `work` is its size in a unit of the kind's own, such as tokens,
    and 0 where all intervals of a kind are alike.
    """

    def __init__(self, bounds: Bounds):
        self.bounds = bounds
        self._taken: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def add(self, kind: str, work: int, seconds: float) -> None:
        self._taken[kind].append((work, seconds))

    def usual_s(self, kind: str, work: int) -> float | None:
        """Median of intervals with as much work; None if nothing is known.

        Intervals with less than half of the work count only while there are no others, scaled up. More work than now
        is never scaled down: a part of any interval does not depend on its size.
        """
        taken = self._taken.get(kind)
        if not taken or kind in UNTIMED:
            return None
        largest = max(known for known, _ in taken)
        enough = min(work, largest) / ALIKE
        return statistics.median(
            seconds * max(1.0, work / max(known, 1)) for known, seconds in taken if known >= enough
        )

    def limit_s(self, kind: str, work: int) -> float:
        """Longer silence is a hang, unless the rank makes progress."""
        if kind == NEVER_HANGS:
            return FOREVER_S
        usual_s = self.usual_s(kind, work)
        if usual_s is None:
            return max(self.bounds.first_s, self.bounds.hang_s)
        return max(self.bounds.hang_s, self.bounds.hang_factor * usual_s)

    def slow_limit_s(self, limit_s: float) -> float:
        """The same for a rank that makes progress."""
        return min(FOREVER_S, self.bounds.slow_factor * limit_s)
