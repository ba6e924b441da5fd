"""What a save costs and how often something fails → when to save next.

What comes in: the seconds that saves held training up and took in the background, as measured. What goes out: yes or no
at each step edge, on rank 0, which tells the others. Surprise: only the time for which training stands still decides,
not the time a save takes: what is written in the background costs no step, so a slow disk hardly makes saves rarer.

Young's interval is sqrt(2 C M), for a save that holds training up for C and a failure about every M (CACM 17(9), 1974);
used here is Daly's, of higher order: sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C, and M where C ≥ 2M
(Future Generation Computer Systems 22(3), 2006).
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from phi3v_dist.config import CheckpointSettings
from phi3v_dist.observe.tracker import ATTEMPT, read_rows
from phi3v_dist.survive.timeline import BLOCKED_S, SAVE_S

ESTIMATED_BLOCKED_S = 1.0  # what a save holds training up for, until one is measured
FIRST_SAVE_S = 300.0  # most failures of an attempt come early, and the first save measures what the next ones cost
FRUITLESS_FACTOR = 4.0  # by which it comes earlier for each attempt in a row that ended before it saved anything
EARLIEST_SAVE_S = 10.0
MOST_AT_RISK_S = 1800.0  # the failures of a day on a bad machine are not those of the formula: bound what one can cost
WRITES_BETWEEN = 2.0  # in units of a save's own time in the background: the writer rests half of the time
NUM_REMEMBERED = 5  # saves whose median counts: the first one also allocates its buffers


@dataclass(frozen=True)
class Choice:
    """Seconds from the beginning of one save to that of the next, and what decided."""

    interval_s: float
    why: str


@dataclass(frozen=True)
class Earlier:
    """What earlier attempts of a run say about this one.

    measured: (blocked, write) seconds of the last saves. fruitless: attempts in a row that ended without a save.
    """

    measured: tuple[tuple[float, float], ...] = ()
    fruitless: int = 0

    @classmethod
    def of(cls, run_folder: Path, attempt: int) -> "Earlier":
        """attempt: the number of this one."""
        saves = [row for row in read_rows(run_folder) if {SAVE_S, BLOCKED_S} <= row.keys() and row[ATTEMPT] < attempt]
        costs = tuple((row[BLOCKED_S], row[SAVE_S] - row[BLOCKED_S]) for row in saves[-NUM_REMEMBERED:])
        last = max((int(row[ATTEMPT]) for row in saves), default=0)
        return cls(costs, max(0, attempt - 1 - last))


def daly_s(blocked_s: float, mean_between_failures_s: float) -> float:
    """Daly's interval plus the save itself, in seconds from save to save."""
    if blocked_s >= 2 * mean_between_failures_s:
        return mean_between_failures_s + blocked_s
    ratio = blocked_s / (2 * mean_between_failures_s)
    return math.sqrt(2 * blocked_s * mean_between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9)


def choose(blocked_s: float, write_s: float, mean_between_failures_s: float) -> Choice:
    """The interval of least loss, within the bounds named above.

    Args:
        blocked_s: for which one save holds training up.
        write_s: which it then takes in the background; what it saves counts only after that.
    """
    best_s = daly_s(blocked_s, mean_between_failures_s)
    most_s, least_s = max(0.0, MOST_AT_RISK_S - write_s), WRITES_BETWEEN * write_s
    if least_s >= min(best_s, most_s):
        return Choice(least_s, f"writing one takes {about(write_s)} in the background")
    if best_s > most_s:
        return Choice(most_s, f"no more than {about(MOST_AT_RISK_S)} of work are ever at risk")
    failure = about(mean_between_failures_s)
    return Choice(best_s, f"a save holds training up for {about(blocked_s)}, a failure comes about every {failure}")


class Interval:
    """Says when to save. For rank 0 alone: the others do as it says, since clocks differ.

    num_nodes: of the job; n nodes fail n times as often as one.
    """

    def __init__(
        self, settings: CheckpointSettings, num_nodes: int, clock: Callable[[], float] = time.monotonic,
        earlier: Earlier = Earlier(),  # noqa: B008
    ):  # fmt: skip
        self.every_steps = settings.every_steps
        self.mean_between_failures_s = settings.node_hours_between_failures * 3600 / num_nodes
        self._clock = clock
        self._began_s = clock()
        self._began_step: int | None = None
        self._fruitless, self._is_first = earlier.fruitless, True
        # (blocked, write) seconds
        self._measured: deque[tuple[float, float]] = deque(earlier.measured, maxlen=NUM_REMEMBERED)

    @property
    def choice(self) -> Choice:
        """As things stand."""
        costs = self._measured or [(ESTIMATED_BLOCKED_S, 0.0)]
        blocked_s, write_s = (median(seconds) for seconds in zip(*costs, strict=True))
        usual = choose(blocked_s, write_s, self.mean_between_failures_s)
        return min(usual, self._first, key=lambda c: c.interval_s) if self._is_first else usual

    @property
    def _first(self) -> Choice:
        if not self._fruitless:
            why = "most failures come early" if self._measured else "it measures what a save costs"
            return Choice(FIRST_SAVE_S, why)
        attempts = "the last attempt" if self._fruitless == 1 else f"the last {self._fruitless} attempts"
        early_s = max(EARLIEST_SAVE_S, FIRST_SAVE_S / FRUITLESS_FACTOR ** min(self._fruitless, 10))
        return Choice(early_s, f"{attempts} ended without a save")

    def due(self, step: int) -> bool:
        """Whether to save after this step, which it stays until a save begins. Ask at each step edge."""
        if self._began_step is None:
            self._began_step = step - 1  # the attempt begins there
        if self.every_steps is not None:
            return step // self.every_steps > self._began_step // self.every_steps
        return self._clock() - self._began_s >= self.choice.interval_s

    def began(self, step: int) -> None:
        """A save was begun, for whatever reason: the next one is counted from here, also when this one fails."""
        self._began_s, self._began_step = self._clock(), step

    def saved(self, step: int, blocked_s: float, write_s: float) -> None:
        """A save that began was committed. blocked_s, write_s: as in `choose`."""
        self._measured.append((blocked_s, write_s))
        self._is_first = False

    def __str__(self) -> str:
        """What was chosen and why, as a sentence."""
        if self.every_steps is not None:
            steps = "step" if self.every_steps == 1 else f"{self.every_steps:,} steps"
            return f"a checkpoint every {steps}, as `checkpoint.every_steps` says"
        first = "the first checkpoint after" if self._is_first else "a checkpoint every"
        return f"{first} {about(self.choice.interval_s)}: {self.choice.why}"


def about(seconds: float) -> str:
    """`0.2 s`, `14 min`, `15 h`, `12 days`: two digits are all that an estimate has."""
    for unit, size_s, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * size_s:
            return f"{_two_digits(seconds / size_s)} {unit}"
    return f"{_two_digits(seconds / 86400)} days"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
