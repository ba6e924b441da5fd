"""When a run is saved: the interval, the wishes of people and Slurm, and what the last save said, at each step's edge.

What comes in: the step just done. What goes out: `Asked`, the same on every rank, and checkpoints begun in the
background. Surprise: nothing here is decided by one rank alone. Its clock, its signal or its full disk is a vote; what
all of them hear is the sum of the votes.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Asked, Requests
from phi3v_dist.errors import CheckpointError, LaunchError
from phi3v_dist.observe.tracker import Tracker
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.best import BestCheckpoint
from phi3v_dist.survive.best_file import Best
from phi3v_dist.survive.checkpoint import Checkpoints, Position, Saved
from phi3v_dist.survive.interval import Interval
from phi3v_dist.watch import heartbeat

log = logging.getLogger(__name__)


@dataclass
class Saver:
    """Every method is collective over all ranks, except that only rank 0's interval counts."""

    topology: Topology
    attempt: Attempt
    requests: Requests
    checkpoints: Checkpoints
    interval: Interval
    tracker: Tracker
    best: BestCheckpoint | None = None  # of rank 0: by which metric one is kept besides; None: by none
    committed_step: int = 0  # the newest that is in the run folder
    _begun_step: int = 0
    _begun_in_run_folder: bool = False
    _candidate: Best | None = None  # the best step so far, once its save is committed
    _due: bool = False  # also when the one before was still being written
    _save_s: float = 0.0  # what the last one into the run folder took
    _warned_slow: bool = False
    _edge: tuple[int, float] | None = None  # the step at which it was last asked, and when that was over
    _said: bool = False  # what interval follows from the first save's cost

    def edge(self, step: int) -> Asked:
        """What is wished of the run after this step.

        Raises:
            LaunchError: a newer attempt has taken the run over.
            CheckpointError: the third save in a row failed.
        """
        if self._edge is not None and step > self._edge[0]:
            self.requests.limit.step_took(time.monotonic() - self._edge[1])
        self._edge = step, time.monotonic()
        self._due |= self.topology.is_main and self.interval.due(step)
        other = self.attempt.lost_to()
        asked = self.requests.agreed(self.topology, self._due, self.checkpoints.busy, other is not None)
        if asked.lost:
            raise LaunchError(f"this run was taken over{f' by {other}' if other else ''}: this attempt ends, unsaved")
        if not asked.busy:  # on any rank, so that all hear of the same save after the same step
            self._heard(self.checkpoints.poll())
        if asked.save and asked.busy and not asked.stop and not self._warned_slow and self.topology.is_main:
            self._warned_slow = True
            log.warning(
                "step %d should be saved, but the save of step %d is still being written; the next one waits for it. A "
                "longer `checkpoint.every_steps` or a higher `checkpoint.write_mb_per_s` would suit this disk",
                *(step, self._begun_step),
            )
        return replace(asked, save=asked.save and not asked.busy)

    def begin(self, engine: Any, position: Position, must_last: bool = False) -> None:
        """Copy the state of this step and have it written while training goes on, after the save before.

        must_last: in the run folder, also when it would be the turn of the nodes' own disks.
        """
        heartbeat.enter("snapshot", position.step, kind="settle")
        self.settle()
        self._begun_in_run_folder = self.checkpoints.begin(engine, position, must_last)
        self._begun_step, self._due = position.step, False
        self.interval.began(position.step)
        self.requests.saved()

    def save(self, engine: Any, position: Position) -> None:
        """As `begin`, until it is in the run folder, as fast as the disk takes it; tried again when it fails.

        Raises:
            CheckpointError: the third save in a row failed.
        """
        while self.committed_step < position.step:
            self.begin(engine, position, must_last=True)
            self.settle()

    def must_save_best(self, step: int) -> bool:
        """After an evaluation: whether this step is the best so far and has yet to be saved in the run folder. One that
        is there, or on its way, is kept from now on."""
        found = self.topology.broadcast(self.best.candidate(step) if self.best else None)
        if found is None:
            return False
        self._candidate = found
        if self.committed_step == step:
            self._keep_candidate()
            return False
        return (self._begun_step, self._begun_in_run_folder) != (step, True)

    def settle(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError when the third save in a row failed."""
        heartbeat.beat(kind="settle")
        self._heard(self.checkpoints.wait())

    def fits(self) -> bool:
        """Whether a save can be done before the job is killed, as far as that is known: going by what the last took."""
        left_s = self.requests.agreed(self.topology).left_s
        return self.topology.max([self._save_s])[0] < left_s

    def _heard(self, outcome: Saved | CheckpointError | None) -> None:
        """Write down what became of the last save. One that failed is tried again when the next is due."""
        if isinstance(outcome, Saved):
            save_s = outcome.blocked_s + outcome.write_s
            if outcome.is_shared:
                self.committed_step, self._save_s = outcome.step, save_s
                if self._candidate and self._candidate.step == outcome.step:
                    self._keep_candidate()
            self.interval.saved(outcome.step, outcome.blocked_s, outcome.write_s)
            if self.topology.is_main and not self._said and self.interval.every_steps is None:
                self._said = True
                log.info("from here on %s", self.interval)
            if self.topology.is_main:
                log.info("saved    %s, %.1f s (training waited %.2f s)", outcome.path, save_s, outcome.blocked_s)
            self.tracker.log(
                {
                    "train/step": outcome.step, "ckpt/save_s": save_s, "ckpt/blocked_s": outcome.blocked_s,
                    "ckpt/gib": outcome.size_bytes / 2**30,
                    "ckpt/gib_per_s": outcome.size_bytes / 2**30 / max(outcome.write_s, 1e-9),
                }
            )  # fmt: skip
        elif outcome is not None:
            lost = self._candidate and (self._begun_step, self._begun_in_run_folder) == (self._candidate.step, True)
            if self.topology.is_main:
                log.warning("%s; training goes on%s", outcome, " without that step, the best so far" if lost else "")
            self._candidate = None if lost else self._candidate

    def _keep_candidate(self) -> None:
        if self.best and self._candidate:
            self.best.keep(self._candidate)
        self._candidate = None
