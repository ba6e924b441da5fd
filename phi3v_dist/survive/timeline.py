"""The files of a run folder → what every second of its wall time went into, over all attempts.

What comes in: `metrics.jsonl`, and of each attempt `owner.json`, `phases.jsonl`, `alive` and `ended.json`. What goes
out: `Span`s from the first launch to the last sign of life, without gap or overlap. Surprise: whether a step counts is
decided later. It is `productive` until an attempt goes on from before it; from then on it was `replay`.

`Account` is the one definition: the live numbers of a run (live_goodput.py) come from it as the spans do. Steps come
first, and what is between them goes to the phase in which the main thread then was.
"""

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v_dist.attempt.attempt import ENDED_NAME, folders
from phi3v_dist.attempt.owner import COUNTER_NAME, OWNER_NAME
from phi3v_dist.cluster import starts
from phi3v_dist.observe.metrics import ATTEMPT, STEP, Number
from phi3v_dist.observe.tracker import read_rows

What = Literal["init", "restore", "productive", "data", "ckpt", "eval", "replay", "down", "other"]
WHATS: tuple[What, ...] = ("init", "restore", "productive", "data", "ckpt", "eval", "replay", "down", "other")
PHASES_NAME = "phases.jsonl"
MOST = 1e12  # a time or a step above it is damage
TRAIN = "train"  # the phase between steps: the loop's own work
STEP_S, DATA_S, EVAL_S = "time/step_s", "time/data_s", "time/eval_s"
SAVE_S, BLOCKED_S = "ckpt/save_s", "ckpt/blocked_s"  # the whole save, and what it held up
PHASES: dict[str, What] = {
    "init": "init", "restore": "restore", TRAIN: "other", "ckpt": "ckpt", "eval": "eval", "other": "other",
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """begin_s, end_s: unix seconds. attempt: for `down`, the one that is over."""

    attempt: int
    what: What
    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True)
class Step:
    """One row of the record. end_s: when it was logged, unix; step_s, and data_s of it: rank 0's clock."""

    number: int
    end_s: float
    step_s: float
    data_s: float


@dataclass
class History:
    """What the files say of one attempt; times in unix seconds, None where they do not say.

    launched_s: its process, or the batch script's start before that. taken_s: it had the run folder, so an earlier
    attempt was over. phases: when each began, in order. resumed_step: it went on from there. last_s: sign of life.
    """

    number: int
    launched_s: float | None = None
    taken_s: float | None = None
    last_s: float | None = None
    resumed_step: int | None = None
    phases: list[tuple[float, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def begin_s(self) -> float | None:
        begins_s = (step.end_s - step.step_s for step in self.steps[:1])
        known = [self.launched_s, *begins_s, *(at_s for at_s, _ in self.phases[:1]), self.last_s]
        return min((at_s for at_s in known if at_s is not None), default=None)

    @property
    def end_s(self) -> float:
        known = [self.begin_s, self.taken_s, self.last_s, *(step.end_s for step in self.steps[-1:])]
        return max((at_s for at_s in [*known, *(at_s for at_s, _ in self.phases)] if at_s is not None), default=0.0)


class Account:
    """Takes what happened, attempt by attempt and in the order of time; gives each second to one of `WHATS`."""

    def __init__(self, keep_spans: bool = False) -> None:
        self.seconds: dict[What, float] = dict.fromkeys(WHATS, 0.0)
        self.spans: list[Span] = []
        self.num_launches = 0
        self._keep_spans = keep_spans
        self._now_s: float | None = None
        self._attempt = 0
        self._what: What = "init"
        self._phases: deque[tuple[float, str]] = deque()

    def launch(self, attempt: int, at_s: float) -> None:
        """A new attempt. One that was launched before the earlier one ended begins with that end."""
        if self._now_s is None:
            self._now_s = at_s
        self._to(at_s, "down")
        self.num_launches += 1
        self._attempt, self._what = attempt, "init"
        self._phases.clear()

    def phase(self, at_s: float, name: str) -> None:
        """What the main thread does from now on, beside steps; may be told ahead of the steps before it."""
        self._phases.append((at_s, name))

    def step(self, step: Step, lost: bool = False) -> None:
        """A step that is done. lost: a failure took it back."""
        self.until(step.end_s - step.step_s)
        if not lost:
            assert self._now_s is not None
            self._to(min(self._now_s + step.data_s, step.end_s), "data")
        self._to(step.end_s, "replay" if lost else "productive")

    def until(self, at_s: float) -> None:
        """No more steps before this moment."""
        while self._phases and self._phases[0][0] <= at_s:
            begin_s, name = self._phases.popleft()
            self._to(begin_s, self._what)
            self._what = PHASES.get(name, "other")
        self._to(at_s, self._what)

    def _to(self, end_s: float, what: What) -> None:
        """The clock goes on, and never back."""
        begin_s = self._now_s
        if begin_s is None or end_s <= begin_s:
            return
        self._now_s = end_s
        self.seconds[what] += end_s - begin_s
        if not self._keep_spans:
            return
        if self.spans and (self.spans[-1].attempt, self.spans[-1].what) == (self._attempt, what):
            begin_s = self.spans.pop().begin_s
        self.spans.append(Span(self._attempt, what, begin_s, end_s))

    def metrics(self) -> dict[str, Number]:
        """As the registry names them; nothing before the first second."""
        wall_s = math.fsum(self.seconds.values())
        if not wall_s:
            return {}
        lost = {f"goodput/lost_{what}_s": seconds for what, seconds in self.seconds.items() if what != "productive"}
        return {
            "goodput/productive_pct": 100 * self.seconds["productive"] / wall_s,
            "goodput/restarts": self.num_launches - 1,
        } | lost


def timeline(run_folder: Path) -> list[Span]:
    """Where the wall time went so far, oldest first; empty where nothing was launched yet.

    Steps after the last checkpoint count until an attempt begins without them. A damaged file is named in the log, and
    costs no more than what it said.
    """
    account = Account(keep_spans=True)
    tell(account, histories(run_folder))
    return account.spans


def parts(spans: Iterable[Span]) -> dict[What, float]:
    """Seconds by what they went into; their sum is the wall time."""
    sums: dict[What, list[float]] = {what: [] for what in WHATS}
    for span in spans:
        sums[span.what].append(span.seconds)
    return {what: math.fsum(seconds) for what, seconds in sums.items()}


def tell(
    account: Account, attempts: Sequence[History], resumed_step: int | None = None, until_s: float = math.inf
) -> None:  # fmt: skip
    """Everything that is known of some attempts, oldest first.

    resumed_step: from which one that follows them went on; until_s: when that took the run over.
    """
    told: list[tuple[History, float, float]] = []
    kept_step = math.inf if resumed_step is None else resumed_step
    for history in reversed(attempts):  # what the later ones say decides what became of the earlier ones
        told.append((history, kept_step, until_s))
        kept_step = min(kept_step, math.inf if history.resumed_step is None else history.resumed_step)
        until_s = min(until_s, history.taken_s if history.taken_s is not None else until_s)
    for history, last_kept, last_s in reversed(told):
        if (begin_s := history.begin_s) is None:
            continue
        account.launch(history.number, begin_s)
        for at_s, name in history.phases:
            account.phase(at_s, name)
        for step in history.steps:
            if step.end_s <= last_s:
                account.step(step, lost=step.number > last_kept)
        account.until(min(history.end_s, last_s))


def histories(run_folder: Path) -> list[History]:
    """All attempts that left a trace, oldest first."""
    rows: dict[int, list[dict[str, Number]]] = defaultdict(list)
    for row in read_rows(run_folder):
        if all(_number(row.get(name)) is not None for name in ("time", ATTEMPT, STEP)):
            rows[int(row[ATTEMPT])].append(row | {"time": float(row["time"])})
    begun = {str(start.life): start.unix_s for start in starts.read(run_folder)}
    places = {int(folder.name): folder for folder in folders(run_folder)}
    return [_history(number, places.get(number), rows[number], begun) for number in sorted({*places, *rows})]


def _history(number: int, folder: Path | None, rows: list[dict[str, Number]], begun: dict[str, float]) -> History:
    history = History(number, last_s=max((row["time"] for row in rows), default=None))
    history.steps = [
        Step(int(row[STEP]), row["time"], row[STEP_S], _or_0(row.get(DATA_S))) for row in rows if _timed(row)
    ]
    if rows:
        history.resumed_step = int(rows[0][STEP]) - (STEP_S in rows[0])  # an evaluation may come before the first step
    if folder is not None:
        _read_owner(history, folder, begun)
        _read_phases(history, folder)
        signs = [history.last_s, _alive_s(folder), _ended_s(folder)]
        history.last_s = max((at_s for at_s in signs if at_s is not None), default=None)
    history.phases = sorted(history.phases or _phases_of_rows(rows))
    return history


def _read_owner(history: History, folder: Path, begun: dict[str, float]) -> None:
    owner = _tree(folder / OWNER_NAME)
    launched_s = _number(owner.get("pid_started"))
    if launched_s is None:
        return
    history.taken_s = launched_s + (_number(owner.get("start_s")) or 0.0)
    start = f"{owner.get('job')}.{owner.get('restart')}.{owner.get('start')}"
    history.launched_s = min(launched_s, begun.get(start, launched_s))


def _read_phases(history: History, folder: Path) -> None:
    for tree in _lines(folder / PHASES_NAME):
        at_s = _number(tree.get("unix_s"))
        if at_s is None:
            continue
        history.phases.append((at_s, str(tree.get("phase"))))
        if (
            tree.get("phase") == TRAIN
            and history.resumed_step is None
            and (step := _number(tree.get("step"))) is not None
        ):
            history.resumed_step = int(step) - 1


def _phases_of_rows(rows: list[dict[str, Number]]) -> list[tuple[float, str]]:
    """For attempts of earlier releases, which wrote no phases: as far as the record tells them."""
    phases = []
    trained_s = {int(row[STEP]): row["time"] for row in rows if _timed(row)}
    for row in rows:
        if _timed(row):
            phases.append((row["time"] - row[STEP_S], TRAIN))
        elif EVAL_S in row:
            phases += [(row["time"] - _or_0(row[EVAL_S]), "eval"), (row["time"], TRAIN)]
        elif BLOCKED_S in row and (begin_s := trained_s.get(int(row[STEP]))) is not None:
            phases += [(begin_s, "ckpt"), (begin_s + _or_0(row[BLOCKED_S]), TRAIN)]
    return phases


def _timed(row: dict[str, Number]) -> bool:
    return _number(row.get(STEP_S)) is not None


def _or_0(value: object) -> float:
    return _number(value) or 0.0


def _alive_s(folder: Path) -> float | None:
    """When the counter was last renewed. Written in it, since a copied file has another time."""
    try:
        _, _, at_s = (folder / COUNTER_NAME).read_text().partition(" ")
        return float(at_s) if at_s and math.isfinite(float(at_s)) else None
    except (OSError, ValueError):
        return None


def _ended_s(folder: Path) -> float | None:
    """When it gave the run back. Others that found it dead say when that was, which is later."""
    ended = _tree(folder / ENDED_NAME)
    return _number(ended.get("unix_s")) if ended.get("by") == "itself" else None


def _tree(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%r): the timeline goes on without it", path, error)
        return {}
    return tree if isinstance(tree, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; a kill may have left another one."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        found += [tree] if isinstance(tree, dict) else []
    return found


def _number(value: object) -> float | None:
    """What may be any JSON, as a number that a time or a step can have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST:
        return None
    return float(value)
