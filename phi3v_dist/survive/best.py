"""The records of evaluations → whether a step is the best so far by `checkpoint.best`, and `checkpoints/best.json`.

What comes in: a metric's name, and `eval/step-NNNNNN/predictions.jsonl`. What goes out: a candidate, and the file once
its checkpoint is committed. Surprise: logged values are not compared. The last evaluation may ask more samples than
those before, so the answers of both steps are scored again, over the samples that both were asked.
"""

import difflib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from phi3v_dist.config import FieldSettings, Settings
from phi3v_dist.evaluate.recorded import Answer, Name, comparable_metrics, in_both, metric_over, read_answers
from phi3v_dist.observe.metrics import format_value, lookup
from phi3v_dist.survive.best_file import BEST_NAME, Best, best_checkpoint, read_best
from phi3v_dist.survive.fence import Fence

log = logging.getLogger(__name__)


def problems(settings: Settings) -> list[str]:
    """Why checkpoints cannot be compared by `checkpoint.best`; empty when they can, or need not be."""
    metric = settings.checkpoint.best
    if metric is None:
        return []
    if not settings.data.validation:
        return [
            f"`checkpoint.best` is {metric}, but `data.validation` names no shards, so nothing is evaluated: name "
            "some, or leave it out"
        ]
    known = comparable_metrics(settings.eval.fields)
    if metric in known:
        return []
    found, near = lookup(metric), difflib.get_close_matches(metric, known, n=1)
    why = "is no metric of an evaluation with these `eval.fields`"
    if found and found.better is None:
        why = "is neither better higher nor better lower"
    elif found and metric.startswith(("eval/blind/", "eval/by_")):
        why = "is of the blind control or of a part, and whole evaluations are compared"
    meant = f"did you mean {near[0]}? " if near else ""
    return [f"`checkpoint.best` is {metric}, which {why}: {meant}there are {', '.join(known)}"]


def describe(settings: Settings) -> list[str]:
    """What will be kept, as a line for the start."""
    metric = settings.checkpoint.best
    if metric is None:
        return []
    every = settings.eval.every_steps
    when = f"every {every} steps and at the end" if every else "at the end alone (`eval.every_steps` is not set)"
    return [f"best     the checkpoint of the {_word(metric)} {metric} is kept too; evaluated {when}"]


def _word(metric: str) -> str:
    found = lookup(metric)
    return "highest" if found and found.better == "up" else "lowest"


class BestCheckpoint:
    """Of one run; for rank 0 alone."""

    def __init__(self, run_folder: Path, metric: str, fields: Mapping[str, FieldSettings], attempt: int):
        self.metric = metric
        self._run_folder = run_folder
        self._fields = fields
        self._fence = Fence(run_folder / "checkpoints", attempt)
        self._said = False

    def candidate(self, step: int) -> Best | None:
        """This step, if its evaluation is better than that of the best so far; None: it is not, or there is none."""
        best = self._record()
        ours = self._answers(step)
        if not ours or (best and best.step == step):
            return None
        theirs = self._answers(best.step) if best else {}
        names = in_both(theirs, ours)
        if best and not names:
            log.warning(
                "step %d was asked none of the samples of step %d, the best so far by %s: the search begins anew",
                step, best.step, self.metric,
            )  # fmt: skip
        value = self._value(ours, names or list(ours))
        if value is None:
            if not self._said:
                log.warning("step %d and others without a finite %s cannot be the best", step, self.metric)
            self._said = True
            return None
        before = self._value(theirs, names)
        is_better = before is None or (value > before if _word(self.metric) == "highest" else value < before)
        return Best(step, self.metric, value) if is_better else None

    def keep(self, best: Best) -> None:
        """Write down that this checkpoint, which is committed, is the best. Without the file the older one stays."""
        try:
            self._fence.publish(BEST_NAME, json.dumps(asdict(best)) + "\n")
        except OSError as error:
            log.warning("step %d is the best by %s, which cannot be written down: %s", best.step, best.metric, error)
            return
        log.info("best     step %d: %s is %s", best.step, best.metric, format_value(best.metric, best.value))

    def _record(self) -> Best | None:
        """What is written down, once it is seen to be about this metric and a checkpoint that is there."""
        folder = self._run_folder / "checkpoints"
        best = read_best(folder)
        if best is None:
            return None
        if best.metric != self.metric:
            why = f"the best checkpoint so far, step {best.step}, was that by {best.metric}"
        elif best_checkpoint(folder) is None:
            why = f"the checkpoint of step {best.step}, the best so far, is gone"
        else:
            return best
        log.warning("%s: the search for the best by %s begins anew", why, self.metric)
        try:
            self._fence.withdraw(BEST_NAME)
        except OSError as error:
            log.warning("%s cannot be removed: %s", folder / BEST_NAME, error)
        return None

    def _answers(self, step: int) -> dict[Name, Answer]:
        try:
            return read_answers(self._run_folder / "eval" / f"step-{step:06d}")
        except OSError:  # not evaluated, or somebody has tidied up
            return {}

    def _value(self, answers: Mapping[Name, Answer], names: list[Name]) -> float | None:
        value = metric_over([answers[name] for name in names], self.metric, self._fields) if names else None
        return value if value is not None and math.isfinite(value) else None
