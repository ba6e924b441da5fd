"""Rows on their way to the record → the same rows, some with the goodput so far; phases → `attempts/NNNN/phases.jsonl`.

What comes in: rank 0's rows and the phases of its main thread. What goes out: `goodput/…` every few steps and at the
end. Surprise: the record is read once, at the start. Of earlier attempts only the sums are kept, which nothing can
change any more, and a step of this one costs a few additions: timeline.py's, so both say the same.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.errors import Phi3VError
from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Prediction, Row, Tracker
from phi3v_dist.survive.timeline import DATA_S, PHASES_NAME, STEP_S, TRAIN, Account, History, Step, histories, tell
from phi3v_dist.watch import heartbeat

PHASE_OF = {
    "load": "restore", "data": TRAIN, "forward": TRAIN, "backward": TRAIN, "optimizer": TRAIN, "snapshot": "ckpt",
    "evaluate": "eval", "score": "eval", "finish": "other",
}  # fmt: skip

log = logging.getLogger(__name__)


class GoodputTracker(Tracker):
    """Stands before the sinks of rank 0. Whatever goes wrong in it costs its own numbers and nothing else."""

    def __init__(self, sinks: Tracker, run_folder: Path, attempt: Attempt, every_steps: int):
        self.sinks = sinks
        self.run_folder, self.attempt, self.every_steps = run_folder, attempt, every_steps
        self._account = Account()
        self._earlier: list[History] = []
        self._began = False  # the account knows of the earlier attempts
        self._last_step: int | None = None
        self._phase = ""
        self._early: list[tuple[float, str]] = []
        self._warned = False

    def start(self, config: Mapping[str, Any]) -> None:
        self.sinks.start(config)
        try:
            self._earlier = [one for one in histories(self.run_folder) if one.number <= self.attempt.number]
        except (OSError, ValueError, Phi3VError) as error:
            self._warn(f"earlier attempts cannot be read ({error}), so goodput is that of this one alone")
        heartbeat.listen(self._entered)

    def log(self, row: Row) -> None:
        if STEP_S in row:
            now_s, self._last_step = time.time(), int(row[STEP])
            self._begin(self._last_step - 1)
            self._account.step(Step(self._last_step, now_s, float(row[STEP_S]), float(row.get(DATA_S, 0.0))))
            if self._last_step % self.every_steps == 0:
                row = {**row, **self._account.metrics()}
        self.sinks.log(row)

    def media(self, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
        self.sinks.media(step, predictions, folder)

    def preempted(self) -> None:
        self.sinks.preempted()

    def finish(self, summary: Row) -> None:
        heartbeat.forget(self._entered)
        self._begin(None)
        self._account.until(time.time())
        goodput = self._account.metrics()
        if self._last_step is not None:
            self.sinks.log({STEP: self._last_step, **goodput})
        self.sinks.finish({**summary, **goodput})

    def _begin(self, resumed_step: int | None) -> None:
        """Once it is known from where this attempt goes on, the account of the earlier ones is final."""
        if self._began:
            return
        self._began = True
        ours = next((one for one in self._earlier if one.number == self.attempt.number), None)
        earlier = [one for one in self._earlier if one.number < self.attempt.number]
        launched_s, taken_s = (ours.begin_s, ours.taken_s) if ours else (None, None)
        tell(self._account, earlier, resumed_step, math.inf if taken_s is None else taken_s)
        self._earlier = []
        self._account.launch(self.attempt.number, time.time() if launched_s is None else launched_s)
        for at_s, phase in self._early:
            self._account.phase(at_s, phase)

    def _entered(self, heard: str, step: int | None) -> None:
        """The main thread enters a phase; most are the same as before."""
        phase = PHASE_OF.get(heard, "other")
        if phase == self._phase:
            return
        now_s, self._phase = time.time(), phase
        if self._began:
            self._account.phase(now_s, phase)
        else:
            self._early.append((now_s, phase))
        line = {"unix_s": round(now_s, 3), "phase": phase} | ({"step": step} if phase == TRAIN else {})
        try:
            with (self.attempt.folder / PHASES_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._warn(f"{self.attempt.folder / PHASES_NAME} cannot be written ({error}): the timeline will lack it")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("goodput: %s", message)
