"""Where every rank is → who keeps the others waiting, if anybody does.

What comes in: `Actor`s, one for each lane of each rank of the whole job. What goes out: those to blame; none when the
silence has a reason. Surprise: the first rank to be silent for too long is usually innocent. It sits in a collective
operation and waits for another one, and as long as that one works and is within its own bound, nothing hangs. Which
one it waits for cannot be told by positions alone: in an evaluation some ranks have more batches than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TRAIN, SAVE = "train", "save"
FOR_THE_WRITER = ("load", "snapshot", "export", "finish")  # phases that may wait for a save in the background
NUMBERED = {"evaluate": "batch", "load": "checkpoint of step"}  # what a step is in other phases
STOPPED = ("T", "t")  # states of a process that is not run at all
FROZEN = (*STOPPED, "D")  # and of one that does nothing


@dataclass(frozen=True)
class Actor:
    """One line of work of one rank.

    position: base step and phases entered within it; greater is further. silent_s: since its last sign of life.
    state: of the process, one letter. waits: in a collective operation. place: innermost function.
    kind: of work, within the phase. progresses: it works by itself, and may be silent for slow_bound_s.
    """

    rank: int
    host: str
    pid: int
    lane: str
    phase: str
    step: int | None
    what: str
    position: tuple[int, int]
    silent_s: float
    bound_s: float
    state: str = ""
    kernel: str = ""
    waits: bool = False
    place: str = ""
    kind: str = ""
    slow_bound_s: float = 0.0
    progresses: bool = False

    @property
    def limit_s(self) -> float:
        """How long it may be silent."""
        if self.progresses and self.state not in STOPPED:
            return max(self.bound_s, self.slow_bound_s)
        return self.bound_s

    @property
    def overdue(self) -> bool:
        return self.silent_s > self.limit_s

    @property
    def slow(self) -> bool:
        """Silent for longer than usual, but not yet too long for one that makes progress."""
        return self.bound_s < self.silent_s <= self.limit_s

    @property
    def frozen(self) -> bool:
        return self.state in FROZEN

    @property
    def order(self) -> tuple[int, bool, int]:
        """By which actors are compared: the writer of a step comes before the training that waits for it."""
        step, entries = self.position
        return step, self.lane == TRAIN, entries

    @property
    def where(self) -> str:
        doing = f"{self.phase} ({self.kind})" if self.kind not in ("", self.phase) else self.phase
        if self.step is None:
            return doing
        return f"{doing}, {NUMBERED.get(self.phase, 'step')} {self.step}"


def judge(actors: Sequence[Actor]) -> list[Actor]:
    """Those that hang by themselves; of ranks that only wait for each other, all that are furthest behind."""
    overdue = [actor for actor in actors if actor.overdue and not _excused(actor, actors)]
    frozen = {actor.rank for actor in overdue if actor.frozen}
    if frozen:
        return [actor for actor in actors if actor.rank in frozen]  # with all that it has in hand
    suspects = [actor for actor in overdue if not actor.waits] or overdue
    first = min((actor.order for actor in suspects), default=None)
    return [actor for actor in suspects if actor.order == first]


def _excused(actor: Actor, actors: Sequence[Actor]) -> bool:
    """Whether it waits for one that is still within its limit: one that is not further, or does work of its own."""
    if actor.state in STOPPED:
        return False
    for other in actors:
        if other is actor or other.overdue or not _can_wait_for(actor, other):
            continue
        works = not other.waits
        if other.order < actor.order and (works or actor.waits):
            return True
        if actor.waits and (other.order == actor.order or (works and other.lane == actor.lane)):
            return True
    return False


def _can_wait_for(actor: Actor, other: Actor) -> bool:
    if actor.lane == other.lane:
        return True
    return actor.lane == TRAIN and actor.phase in FOR_THE_WRITER
