"""Answers and truths → fields → numbers.

What comes in: texts and `eval.fields`. What goes out: per answer the fields read from it, and over all answers the
metrics of the registry. Surprise: an answer that cannot be read is neither an error of 0 nor one of the full price;
it counts in `parse_fail_pct` and nowhere else. Exact match does count it, as not matching.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from phi3v_dist.config import FieldSettings
from phi3v_dist.evaluate.numbers import read_number

WITHIN_FRAC = 0.10 * (1 + 1e-9)  # 21.89 for 19.90 is within 10 %, though not in binary fractions
RELAXED_FRAC = 0.05 * (1 + 1e-9)  # ChartQA, arXiv 2203.10244
LEAST_ALIKE = 0.5


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
    """The field's value in a text; None when it is not found or the number is none."""
    value = _by_pattern(text, field.pattern) if field.pattern is not None else _by_key(text, str(field.key))
    if value is None:
        return None
    number = read_number(value, field.decimal) if field.kind in ("number", "relaxed") else None
    return value if number is None and field.kind != "number" else number


def _by_pattern(text: str, pattern: str) -> str | None:
    match = re.search(pattern, text, re.DOTALL)
    return match.group(1).strip() if match and match.group(1) is not None else None  # the group may be optional


def _by_key(text: str, key: str) -> str | None:
    """A text, number or truth value under this name in the first JSON object of a text."""
    for found in re.finditer("{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value.strip() if isinstance(value, str) else None if value is None else json.dumps(value)
    return None


def likeness(found: str, truth: str) -> float:
    """1 - edits / length of the longer text, letters of either case alike; 0 below a half (ANLS, arXiv 1907.00490)."""
    one, other = (" ".join(text.casefold().split()) for text in (found, truth))
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != wanted))
    alike = 1 - row[-1] / max(len(one), len(other), 1)
    return alike if alike >= LEAST_ALIKE else 0.0


def _is_right(found: str | float | None, truth: str | float, kind: str) -> bool:
    if kind == "relaxed" and isinstance(truth, float):
        return isinstance(found, float) and abs(found - truth) <= RELAXED_FRAC * abs(truth)
    if kind == "relaxed" and isinstance(found, str) and isinstance(truth, str):
        return found.casefold() == truth.casefold()
    return found == truth


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
        scores[name] = FieldScore(field.kind, truth, found, _is_right(found, truth, field.kind), error)
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
        metrics |= _of_kind(name, asked)
        read = [(f.error, float(f.target)) for f in asked if f.kind == "number" and f.error is not None]
        if read:
            metrics[f"{name}_mae"] = fmean(error for error, _ in read)
            metrics[f"{name}_within_10pct"] = fmean(error <= WITHIN_FRAC * abs(truth) for error, truth in read)
        shares = [100 * error / abs(truth) for error, truth in read if truth]
        if shares:
            metrics[f"{name}_median_ape_pct"] = median(shares)
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _of_kind(name: str, asked: Sequence[FieldScore]) -> dict[str, float]:
    """What only fuzzy and relaxed fields have."""
    if asked[0].kind == "fuzzy":
        alike = [likeness(str(one.prediction), str(one.target)) if one.prediction is not None else 0.0 for one in asked]
        return {f"anls/{name}": fmean(alike)}
    if asked[0].kind == "relaxed":
        return {f"relaxed_accuracy/{name}": fmean(one.correct for one in asked)}
    return {}
