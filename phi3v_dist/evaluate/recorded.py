"""The answers of an evaluation as they lie on disk → a metric over any of them.

What comes in: `eval/step-…/predictions.jsonl`. What goes out: the number that the evaluation would have logged, had it
asked those samples alone. Surprise: answers are scored again, by the fields of now. Two evaluations can so be compared
over the samples that both were asked, even when one asked ten times as many or `eval.fields` has changed meanwhile.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3v_dist.config import FieldSettings
from phi3v_dist.evaluate.records import PREDICTIONS_NAME
from phi3v_dist.evaluate.score import AnswerScore, FieldScore, score_answer, summarize
from phi3v_dist.observe.metrics import lookup

log = logging.getLogger(__name__)

LOSS = "eval/loss"
BOUNDS = ("/low", "/high")  # of an interval: no figure to be good at
WANTED = {"shard": str, "key": str, "target": str, "prediction": str, "stopped": bool, "num_tokens": int}

Answer = dict[str, Any]
Name = tuple[str, str]


def read_answers(folder: Path) -> dict[Name, Answer]:
    """(shard, key) → the line of `predictions.jsonl`; damaged lines are left out and counted. Raises OSError."""
    found, damaged = {}, 0
    with open(folder / PREDICTIONS_NAME, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError):
                answer = None
            if isinstance(answer, dict) and all(isinstance(answer.get(name), kind) for name, kind in WANTED.items()):
                found[answer["shard"], answer["key"]] = answer
            else:
                damaged += 1
    if damaged:
        log.warning("%s: %d damaged lines are left out", folder / PREDICTIONS_NAME, damaged)
    return found


def loss_and_labels(answer: Answer) -> tuple[float, int]:
    """Summed loss of its learned tokens, and how many they are; (0, 0) where the line does not say."""
    loss, count = answer.get("loss"), answer.get("label_tokens")
    if not isinstance(loss, int | float) or not isinstance(count, int):
        return 0.0, 0
    return float(loss) * count, count


def in_both(first: Mapping[Name, Answer], second: Mapping[Name, Answer]) -> list[Name]:
    """Samples that both evaluations asked, with the same truth, in the second one's order."""
    return [name for name in second if name in first and first[name]["target"] == second[name]["target"]]


def metric_over(answers: Sequence[Answer], metric: str, fields: Mapping[str, FieldSettings]) -> float | None:
    """One of `comparable_metrics` over these answers; None when they do not give it."""
    if metric == LOSS:
        sums, counts = zip(*map(loss_and_labels, answers), strict=True) if answers else ((), ())
        return sum(sums) / sum(counts) if sum(counts) else None
    scores = [
        score_answer(one["prediction"], one["target"], fields, one["stopped"], one["num_tokens"]) for one in answers
    ]
    return summarize(scores).get(metric)


def comparable_metrics(fields: Mapping[str, FieldSettings]) -> list[str]:
    """What an evaluation with these fields logs of which one direction is better."""
    truths = {name: 1.0 if field.kind in ("number", "relaxed") else "text" for name, field in fields.items()}
    perfect = {
        name: FieldScore(field.kind, truths[name], truths[name], True, 0.0 if truths[name] == 1.0 else None)
        for name, field in fields.items()
    }
    names = [LOSS, *summarize([AnswerScore(perfect, parsed=True, stopped=True, num_tokens=1)])]
    found = ((name, lookup(name)) for name in names if not name.endswith(BOUNDS))
    return [name for name, metric in found if metric and metric.better]
