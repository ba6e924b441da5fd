"""The training loop: for each step train, observe; every N steps evaluate and save; at the end, sum up.

What comes in: a built `Run`. What goes out: a finished run folder. Surprise: this is the only file in which the world
changes. Observers get numbers and cannot change anything; the order of effects is the order of lines below.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

from phi3v_dist.observe.health import SpikeWatch
from phi3v_dist.observe.metrics import step_row
from phi3v_dist.parallel.local_gradients import LocalGradients
from phi3v_dist.parallel.waits import WAITS, Stragglers
from phi3v_dist.run import Run
from phi3v_dist.survive import replicas
from phi3v_dist.survive.checkpoint import Position
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.train.accounts import Accounts, plan_state
from phi3v_dist.train.optim import learning_rates
from phi3v_dist.train.skipped import SkippedSteps
from phi3v_dist.train.step import StepResult, train_step

SUMMARY_NAME = "summary.json"

log = logging.getLogger(__name__)


def fit(run: Run) -> dict[str, float]:
    """Train to the last step, from the newest checkpoint if there is one; returns the summary."""
    totals, state, accounts = _start(run)
    clock = Clock(totals.wall_s)
    gradients = LocalGradients(run.engine.module, run.engine.device)
    skipped = SkippedSteps(
        run.settings.watch.bad_steps, run.train.table.sample_name, run.checkpoints.newest, run.topology.is_main
    )
    WAITS.watch(run.topology)
    stragglers = Stragglers(run.topology, run.settings.observe.log_every_steps)
    spikes = SpikeWatch(run.train.table.sample_name, is_main=run.topology.is_main)
    for plan, batches in run.loader(state) if totals.step < run.num_steps else ():
        rates = learning_rates(totals.step + 1, run.num_steps, run.settings.train)
        result = train_step(run.engine, plan, batches, rates, run.topology, gradients)
        totals.add(result)
        totals.wall_s = clock.read_s()
        accounts.record(plan, result.unused, result.quarantined, updated=result.skipped is None)
        slowest = stragglers.look(result.step, result.own_s, sum(result.seconds.values()))
        is_spike = spikes.look(result.step, result.loss, result.sample_ids)
        run.tracker.log(
            step_row(result, run.settings.data.row_length_tokens, run.topology.world_size)
            | totals.row(run)
            | slowest
            | {"train/spike": int(is_spike)}
        )
        if totals.step % run.settings.watch.compare_every_steps == 0:
            replicas.compare(run.engine, run.topology)
        skipped.look(result)
        accounts.require_few_bad(totals.quarantined, totals.samples)
        last = totals.step == run.num_steps
        if last or totals.step % (run.settings.checkpoint.every_steps or 200) == 0:
            _save(run, totals, accounts.state(plan))
        if last:
            break
        if run.settings.eval.every_steps and totals.step % run.settings.eval.every_steps == 0:
            _evaluate(run, totals.step, run.settings.eval.samples)
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
            "train/skipped": self.skipped,
            "run/wall_s": self.wall_s,
            "run/world_size": run.topology.world_size,
        }


def _start(run: Run) -> tuple[Totals, dict[str, Any] | None, Accounts]:
    """Open the sinks and go back to the newest checkpoint: what was done, where the data goes on, and the books."""
    run.tracker.start(run.resolved)
    newest = run.checkpoints.newest()
    position = run.checkpoints.load(run.engine, newest) if newest else None
    accounts = run.accounts(position.loader if position else None)
    if position is None:
        return Totals(), None, accounts
    log.info("continuing from %s, step %d of %d", newest, position.step, run.num_steps)
    if position.config_digest != run.config_digest:
        log.warning("the settings are not those that %s was saved with; compare %s", newest, run.folder / "config.yaml")
    return Totals(**position.extra), plan_state(position.loader), accounts


def _save(run: Run, totals: Totals, data_state: dict[str, Any]) -> None:
    began = time.perf_counter()
    position = Position(
        step=totals.step, run_id=run.run_id, loader=data_state, attempt=run.tracker.attempt, seed=run.settings.run.seed,
        config_digest=run.config_digest, extra=asdict(totals),
    )  # fmt: skip
    run.checkpoints.save(run.engine, position)
    seconds = time.perf_counter() - began
    run.tracker.log({"train/step": totals.step, "ckpt/save_s": seconds, "time/ckpt_s": seconds})


def _evaluate(run: Run, step: int, num_samples: int | None) -> dict[str, float]:
    if run.evaluator is None:
        return {}
    began = time.perf_counter()
    folder = run.folder / "eval" / f"step-{step:06d}"
    metrics = run.evaluator.run(run.engine.module, folder, num_samples)
    run.tracker.log({"train/step": step, "time/eval_s": time.perf_counter() - began} | metrics)
    if run.topology.is_main:
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        run.tracker.media(step, rows, folder)
    return metrics


def _finish(run: Run, totals: Totals) -> dict[str, float]:
    """The last evaluation, and summary.json, whose presence says that the run is complete."""
    metrics = _evaluate(run, totals.step, run.settings.eval.final_samples)
    summary = {"train/step": totals.step} | totals.row(run) | metrics | run.reference
    run.tracker.finish(summary)
    if run.topology.is_main:
        write_durably(run.folder / SUMMARY_NAME, json.dumps(summary, indent=2) + "\n")
    run.topology.barrier()
    return summary
