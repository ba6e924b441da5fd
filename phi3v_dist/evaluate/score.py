"""Answers and truths → fields → numbers.

What comes in: texts and `eval.fields`. What goes out: per answer the fields read from it, and over all answers the
metrics of the registry. Surprise: an answer that cannot be read is neither an error of 0 nor one of the full price;
it counts in `parse_fail_pct` and nowhere else. Exact match does count it, as not matching.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from phi3v_dist.config import FieldSettings

WITHIN_FRAC = 0.10 * (1 + 1e-9)  # 21.89 for 19.90 is within 10 %, though not in binary fractions


@dataclass(frozen=True)
class FieldScore:
    """One field of one answer. prediction: None when it could not be read. error: absolute, of a number."""

    kind: str
    target: str | float
    prediction: str | float | None
    correct: bool
    error: float | None


@dataclass(frozen=True)
class AnswerScore:
    """One answer. parsed: every field that its truth has could be read from it."""

    fields: dict[str, FieldScore]
    parsed: bool
    stopped: bool
    num_tokens: int


def read_field(text: str, field: FieldSettings) -> str | float | None:
    """The field's value in a text; None when the pattern is not found or the number is none."""
    match = re.search(field.pattern, text, re.DOTALL)
    if not match or match.group(1) is None:  # the group may be optional
        return None
    value = match.group(1).strip()
    if field.kind == "exact":
        return value
    try:
        number = float(value.rstrip(".,").replace(",", ""))  # "1,299.50." ends a sentence
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def score_answer(
    text: str, target: str, fields: Mapping[str, FieldSettings], stopped: bool, num_tokens: int
) -> AnswerScore:
    """Compare one answer with its truth. Fields that the truth does not have are not asked for."""
    scores = {}
    for name, field in fields.items():
        truth = read_field(target, field)
        if truth is None:
            continue
        found = read_field(text, field)
        error = abs(found - truth) if isinstance(found, float) and isinstance(truth, float) else None
        scores[name] = FieldScore(field.kind, truth, found, found == truth, error)
    return AnswerScore(scores, all(s.prediction is not None for s in scores.values()), stopped, num_tokens)


def summarize(scores: Sequence[AnswerScore], prefix: str = "eval") -> dict[str, float]:
    """Metrics over answers; a metric over nothing is left out."""
    if not scores:
        return {}
    metrics = {
        "samples": float(len(scores)),
        "parse_fail_pct": 100 * fmean(not score.parsed for score in scores),
        "stop_pct": 100 * fmean(score.stopped for score in scores),
        "gen_tokens/mean": fmean(score.num_tokens for score in scores),
    }
    for name in sorted({name for score in scores for name in score.fields}):
        asked = [score.fields[name] for score in scores if name in score.fields]
        metrics[f"field_em/{name}"] = fmean(field.correct for field in asked)
        read = [(field.error, float(field.target)) for field in asked if field.error is not None]
        if read:
            metrics[f"{name}_mae"] = fmean(error for error, _ in read)
            metrics[f"{name}_within_10pct"] = fmean(error <= WITHIN_FRAC * abs(truth) for error, truth in read)
        shares = [100 * error / abs(truth) for error, truth in read if truth]
        if shares:
            metrics[f"{name}_median_ape_pct"] = median(shares)
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
