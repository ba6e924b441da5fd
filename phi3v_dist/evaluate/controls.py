"""Judged answers → metrics with intervals, and the same of two controls: the model blind, and the model untuned.

What comes in: answers, and those that the model gave before it was tuned. What goes out: `eval/price_mae` with
`eval/price_mae/low` and `/high`; the controls under `eval/blind/` and `eval/base/`; how much higher the model is than
each, sample by sample, under `eval/minus_blind/` and `eval/minus_base/`. Surprise: a difference counts only samples
that have the number on both sides. An untuned model seldom answers in the form asked for, so of errors there may be no
difference at all, while the share of right answers counts every sample.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3v_dist.evaluate.breakdown import Judged
from phi3v_dist.evaluate.intervals import Column
from phi3v_dist.evaluate.records import PREDICTIONS_NAME
from phi3v_dist.evaluate.score import AnswerScore, FieldScore, columns

log = logging.getLogger(__name__)

Place = tuple[str, str]  # (shard, key): a sample's number may be another one in other data


def read_judged(folder: Path) -> dict[Place, Judged]:
    """What an earlier evaluation's records say of each sample; lines that cannot be read are left out and counted."""
    found, damaged = {}, 0
    for line in (folder / PREDICTIONS_NAME).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            found[row["shard"], row["key"]] = _judged(row)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
    if damaged:
        log.warning("%s: %d damaged lines; nothing is compared with them", folder / PREDICTIONS_NAME, damaged)
    return found


def answer_score(row: Mapping[str, Any]) -> AnswerScore:
    """As a line of the records says it; also of what it has under `blind`."""
    fields = {name: FieldScore(**field) for name, field in row["fields"].items()}
    return AnswerScore(fields, bool(row["parsed"]), bool(row["stopped"]), int(row["num_tokens"]))


def _judged(row: Mapping[str, Any]) -> Judged:
    num_labels = int(row["label_tokens"])
    return Judged(answer_score(row), None, {}, float(row["loss"] or 0) * num_labels, num_labels, {})


def with_controls(judged: Sequence[Judged], base: Sequence[Judged | None]) -> dict[str, float]:
    """Metrics of the answers and of both controls.

    Args:
        base: what the untuned model said to the same samples; None where it was not asked.
    """
    own = _columns(judged)
    sides = {"blind": columns([one.blind for one in judged]), "base": _columns(base)}
    counts = {
        "eval/samples": len(judged),
        "eval/blind/samples": sum(one.blind is not None for one in judged),
        "eval/base/samples": sum(one is not None for one in base),
    }
    metrics = {name: float(count) for name, count in counts.items() if count} | dict(_values("eval", own))
    for side, others in sides.items():
        metrics |= dict(_values(f"eval/{side}", others))
        metrics |= dict(_differences(f"eval/minus_{side}", own, others))
    return metrics


def _columns(judged: Sequence[Judged | None]) -> dict[str, Column]:
    tokens = np.array([one.label_tokens if one else 0 for one in judged], dtype=np.float64)
    sums = np.array([one.loss_sum if one else 0.0 for one in judged], dtype=np.float64)
    means = np.divide(sums, tokens, out=np.full_like(sums, np.nan), where=tokens > 0)
    return {"loss": Column(means, weights=tokens)} | columns([one.score if one else None for one in judged])


def _values(prefix: str, found: Mapping[str, Column]) -> Iterator[tuple[str, float]]:
    for name, column in found.items():
        value = column.value()
        if value is not None:
            yield f"{prefix}/{name}", value
            yield from _ends(f"{prefix}/{name}", column.interval())


def _differences(
    prefix: str, own: Mapping[str, Column], others: Mapping[str, Column]
) -> Iterator[tuple[str, float]]:  # fmt: skip
    for name in own.keys() & others.keys():
        if difference := own[name].minus(others[name]):
            yield f"{prefix}/{name}", difference[0]
            yield from _ends(f"{prefix}/{name}", difference[1])


def _ends(name: str, interval: tuple[float, float] | None) -> Iterator[tuple[str, float]]:
    if interval:
        yield f"{name}/low", interval[0]
        yield f"{name}/high", interval[1]
