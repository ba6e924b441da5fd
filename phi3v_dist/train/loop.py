"""The training loop: for each step train, observe; every N steps evaluate and save; at the end, sum up.

What comes in: a built `Run`. What goes out: a finished run folder. Surprise: this is the only file in which the world
changes. Observers get numbers and cannot change anything; the order of effects is the order of lines below.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.attempt.attempt import SUMMARY_NAME
from phi3v_dist.data.plan import PlannedStep
from phi3v_dist.observe.metrics import step_row
from phi3v_dist.parallel.local_gradients import LocalGradients
from phi3v_dist.run import Run
from phi3v_dist.survive.checkpoint import Position
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.train.accounts import Accounts, plan_state
from phi3v_dist.train.laps import Laps
from phi3v_dist.train.optim import learning_rates
from phi3v_dist.train.step import StepResult, train_step
from phi3v_dist.watch import heartbeat

log = logging.getLogger(__name__)


def fit(run: Run) -> dict[str, float] | None:
    """Train to the last step, from the newest checkpoint if there is one; returns the summary, None when stopped."""
    totals, state, accounts = _start(run)
    clock = Clock(totals.wall_s)
    guards, profiles = run.guards(), run.profiles()
    gradients = LocalGradients(run.engine.module, run.engine.device)
    loader = run.loader(state)
    run.requests.training_begins()
    asked = run.requests.agreed(run.topology)
    if asked.stop:
        _leave(run, totals)
        return None
    if _evaluation_was_missed(run, totals.step) and _evaluate(run, totals.step) is None:
        _leave(run, totals)
        return None
    with run.collector(loader) as collector:
        laps = Laps(run.topology.device)
        for plan, batches in loader if totals.step < run.num_steps else ():
            rates = learning_rates(totals.step + 1, run.num_steps, run.settings.train)
            with profiles.around(plan.number):
                result = train_step(run.engine, plan, batches, rates, run.topology, gradients, laps)
            collector.add(plan, result, laps.take())
            totals.add(result)
            totals.wall_s = clock.read_s()
            accounts.record(plan, result.unused, result.quarantined, updated=result.skipped is None)
            row = step_row(result, run.settings.data.row_length_tokens, run.topology.world_size)
            run.tracker.log(row | totals.row(run) | guards.row(result))
            guards.look(result)
            accounts.require_few_bad(totals.quarantined, totals.samples)
            asked = run.saver.edge(totals.step)
            if totals.step == run.num_steps:
                run.saver.save(run.engine, _position(run, totals, accounts.state(plan)))
                break
            laps.end("log")
            if asked.save:
                position = _position(run, totals, accounts.state(plan))
                run.saver.begin(run.engine, position, must_last=asked.stop or asked.by_hand)
                laps.end("ckpt")
            if not asked.stop and _evaluation_is_due(run, totals.step):
                _evaluate(run, totals.step)
                asked = run.saver.edge(totals.step)
                laps.skip()
            if asked.stop:
                break
    if asked.stop and totals.step < run.num_steps:
        _stop(run, totals, accounts, plan)
        return None
    accounts.require_few_bad(totals.quarantined, totals.samples, at_end=run.planner.end is not None)
    accounts.close()
    totals.wall_s = clock.read_s()
    return _finish(run, totals)


class Clock:
    """Wall time of a run, going on from what earlier attempts took to their last checkpoint."""

    def __init__(self, earlier_s: float):
        self._began = time.monotonic() - earlier_s

    def read_s(self) -> float:
        return time.monotonic() - self._began


@dataclass
class Totals:
    """What a run has done so far, over all attempts; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    quarantined: int = 0
    skipped: int = 0
    wall_s: float = 0.0

    def add(self, result: StepResult) -> None:
        self.step = result.step
        self.tokens += result.tokens
        self.samples += result.samples
        self.quarantined += result.quarantined
        self.skipped += result.skipped is not None

    def row(self, run: Run) -> dict[str, float]:
        return {
            "train/tokens": self.tokens,
            "train/samples": self.samples,
            "train/epoch": self.samples / max(1, run.train.usable(run.settings.data.row_length_tokens)),
            "data/quarantined": self.quarantined,
            "train/skipped_steps": self.skipped,
            "run/wall_s": self.wall_s,
            "run/world_size": run.topology.world_size,
        }


def _start(run: Run) -> tuple[Totals, dict[str, Any] | None, Accounts]:
    """Open the sinks and go back to the newest checkpoint: what was done, where the data goes on, and the books."""
    if run.topology.is_main:  # the others watch nothing
        run.tracker.start(run.record)
    run.saver.checkpoints.prepare(run.engine)
    resumed = run.saver.checkpoints.resume(run.engine)
    accounts = run.accounts(resumed[1].loader or None if resumed else None)  # an imported one has no data behind it
    if resumed is None:
        return Totals(), None, accounts
    newest, position = resumed
    if newest.is_relative_to(run.folder):
        run.saver.committed_step = position.step
    log.info("continuing from %s, step %d of %d", newest, position.step, run.num_steps)
    return Totals(**position.extra), plan_state(position.loader), accounts


def _position(run: Run, totals: Totals, data_state: dict[str, Any]) -> Position:
    return Position(
        step=totals.step, run_id=run.run_id, loader=data_state, attempt=run.attempt.number, seed=run.settings.run.seed,
        config_digest=run.config_digest, extra=asdict(totals),
    )  # fmt: skip


def _stop(run: Run, totals: Totals, accounts: Accounts, plan: PlannedStep) -> None:
    """A clean stop: this step saved, if there is time for it."""
    heartbeat.enter("finish", totals.step)
    run.tracker.preempted()  # before the save: the kill may come first
    run.saver.settle()
    if run.saver.committed_step < totals.step:
        if run.saver.fits():
            run.saver.save(run.engine, _position(run, totals, accounts.state(plan)))
        else:
            log.warning("no time to save step %d before the kill: step %d is", totals.step, run.saver.committed_step)
    accounts.close()
    _leave(run, totals)


def _leave(run: Run, totals: Totals) -> None:
    """Say that the run was stopped and not finished, first of all in `stopped.json`, which a batch script looks for."""
    why = run.requests.why or "another rank was asked to"
    run.requests.stopped(run.saver.committed_step, why)
    step = run.saver.committed_step
    log.info("stopped %s (%s); the same command goes on", f"after step {step}, saved" if step else "with no save", why)
    run.tracker.preempted()
    run.tracker.finish({"train/step": totals.step} | totals.row(run))
    run.topology.barrier()


def _evaluation_is_due(run: Run, step: int) -> bool:
    if step == 0:
        return run.settings.eval.base
    every_steps = run.settings.eval.every_steps
    return every_steps is not None and step % every_steps == 0


def _evaluation_was_missed(run: Run, step: int) -> bool:
    """Whether the untuned model has not been asked yet; or a kill or a stop came between the save of this step, from
    which the run goes on, and its evaluation."""
    if step == run.num_steps or not _evaluation_is_due(run, step):
        return False
    return not run.topology.broadcast(_evaluation_folder(run, step).exists())


def _evaluation_folder(run: Run, step: int) -> Path:
    return run.folder / "eval" / f"step-{step:06d}"


def _evaluate(run: Run, step: int) -> dict[str, float] | None:
    """Scores of this step; None when the run was asked to stop meanwhile."""
    if run.evaluator is None:
        return {}
    began = time.perf_counter()
    folder, base = _evaluation_folder(run, step), _evaluation_folder(run, 0)
    samples = run.settings.eval.final_samples if step in (0, run.num_steps) else run.settings.eval.samples
    metrics = run.evaluator.run(
        run.engine.module, folder, samples, run.requests.heard, base if step and base.exists() else None, blind=step > 0
    )
    if metrics is None:
        log.warning("the evaluation of step %d was given up: the run was asked to stop", step)
        return None
    run.tracker.log({"train/step": step, "time/eval_s": time.perf_counter() - began} | metrics)
    if run.topology.is_main:
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        run.tracker.media(step, rows, folder)
    return metrics


def _finish(run: Run, totals: Totals) -> dict[str, float] | None:
    """The last evaluation, and summary.json, whose presence says that the run is complete."""
    metrics = _evaluate(run, totals.step)
    heartbeat.enter("finish", totals.step)
    if metrics is None:
        _leave(run, totals)
        return None
    summary = {"train/step": totals.step} | totals.row(run) | metrics | run.reference
    if run.topology.is_main:
        write_durably(run.folder / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
        run.requests.forget()
    run.tracker.finish(summary)
    run.topology.barrier()
    run.saver.checkpoints.finish()
    return summary
