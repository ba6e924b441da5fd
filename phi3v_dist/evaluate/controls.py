"""Judged answers → metrics with intervals, and the same of two controls: the model blind, and the model untuned.

What comes in: answers, and those that the model gave before it was tuned. What goes out: `eval/price_mae` with
`eval/price_mae/low` and `/high`; the controls under `eval/blind/` and `eval/base/`; how much higher the model is than
each, sample by sample, under `eval/minus_blind/` and `eval/minus_base/`. Surprise: a difference counts only samples
that have the number on both sides. An untuned model seldom answers in the form asked for, so of errors there may be no
difference at all, while the share of right answers counts every sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from phi3v_dist.config import FieldSettings
from phi3v_dist.evaluate.breakdown import Judged
from phi3v_dist.evaluate.intervals import Column
from phi3v_dist.evaluate.recorded import Answer, loss_and_labels, read_answers
from phi3v_dist.evaluate.score import columns, score_answer

Asked = tuple[str, str, str]  # shard, key, true answer: with another truth it is another question


def read_judged(folder: Path, fields: Mapping[str, FieldSettings]) -> dict[Asked, Judged]:
    """(shard, key, truth) → what an earlier evaluation's answer is worth by the fields of now."""
    return {(*name, answer["target"]): _judged(answer, fields) for name, answer in read_answers(folder).items()}


def _judged(answer: Answer, fields: Mapping[str, FieldSettings]) -> Judged:
    score = score_answer(
        answer["prediction"], answer["target"], fields, answer["stopped"], answer["num_tokens"]
    )  # fmt: skip
    return Judged(score, None, {}, *loss_and_labels(answer), {})


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
    means = np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)
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
    for name in (name for name in own if name in others):
        if difference := own[name].minus(others[name]):
            yield f"{prefix}/{name}", difference[0]
            yield from _ends(f"{prefix}/{name}", difference[1])


def _ends(name: str, interval: tuple[float, float] | None) -> Iterator[tuple[str, float]]:
    if interval:
        yield f"{name}/low", interval[0]
        yield f"{name}/high", interval[1]
