"""One look at the machine → a `Check`, within a time limit.

What comes in: a function that looks and notes. What goes out: what it noted, and how long it took. Surprise: it runs in
a thread that may never end. A file server or a driver that hangs keeps whoever asks it in the kernel, where no signal
reaches; so nobody who has to answer in time may ask it himself.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from phi3v_dist.cluster.report import LAUNCH, Check
from phi3v_dist.config import Settings
from phi3v_dist.errors import Phi3VError

LIMIT_S = 60.0  # of one look
WHOLE_S = 240.0  # of the preflight, unless PHI3V_EXAMINE_S says another time
LOOKS_FRAC, MEET_FRAC, PROBE_FRAC = 0.4, 0.15, 0.35  # of that: looks, nodes that have not come, the network
SHOWN = 4  # problems of one kind that a check lists


@dataclass(frozen=True)
class Place:
    """What a node knows about its part in the job, and how much time it has.

    ranks_per_node: None when nobody said it. limit_s: of the whole preflight, from `began_s` (monotonic) on.
    """

    settings: Settings
    host: str
    num_nodes: int
    ranks_per_node: int | None
    folder: Path
    limit_s: float = WHOLE_S
    began_s: float = field(default_factory=time.monotonic)

    def left_s(self, frac: float) -> float:
        """Seconds until this part of the time is over."""
        return self.began_s + frac * self.limit_s - time.monotonic()


@dataclass
class Notes:
    """What a look finds, in order. detail: a few words for a good outcome."""

    detail: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


Look = Callable[[Place, Notes], None]


def check(name: str, look: Look, place: Place, kind: str = LAUNCH, limit_s: float = LIMIT_S) -> Check:
    """Whatever a look raises or hangs in is a problem of the node, and stops no other look but for want of time."""
    notes = Notes()
    began_s = time.monotonic()
    limit_s = min(limit_s, place.left_s(LOOKS_FRAC))
    if limit_s <= 0:
        return Check(name, warnings=("not looked at: other looks took all the time (PHI3V_EXAMINE_S)",))

    def run() -> None:
        try:
            look(place, notes)
        except Phi3VError as error:
            notes.problems += error.problems
        except Exception as error:  # of a machine that may be broken in any way
            notes.problem(f"the look itself failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        notes = Notes(problems=[f"no answer within {limit_s:.0f} s: a disk, file server or driver hangs"])
    seconds = round(time.monotonic() - began_s, 3)
    problems = notes.problems[:SHOWN]
    if (left_out := len(notes.problems) - SHOWN) > 0:
        problems.append(f"and {left_out} more of this kind")
    return Check(name, notes.detail, tuple(problems), tuple(notes.warnings[:SHOWN]), kind, seconds)
