"""Answers and truths → fields → numbers.

What comes in: texts and `eval.fields`. What goes out: per answer the fields read from it, and over all answers the
metrics of the registry. Surprise: an answer that cannot be read is neither an error of 0 nor one of the full price;
it counts in `parse_fail_pct` and nowhere else. Exact match does count it, as not matching.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from phi3v_dist.config import FieldSettings
from phi3v_dist.evaluate.intervals import Column, Statistic
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
    return Levenshtein.normalized_similarity(one, other, score_cutoff=LEAST_ALIKE)


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


def columns(scores: Sequence[AnswerScore | None]) -> dict[str, Column]:
    """Metric → its numbers, sample by sample; None: this sample was not answered."""
    found = [_numbers(score) if score else {} for score in scores]
    names = sorted({name for numbers in found for name in numbers})
    return {
        name: Column(np.array([numbers.get(name, math.nan) for numbers in found], dtype=np.float64), *_made_by(name))
        for name in names
    }


def summarize(scores: Sequence[AnswerScore], prefix: str = "eval") -> dict[str, float]:
    """Metrics over answers; a metric over nothing is left out."""
    values = {name: column.value() for name, column in columns(scores).items()}
    counted = {"samples": float(len(scores))} if scores else {}
    return {f"{prefix}/{name}": value for name, value in (counted | values).items() if value is not None}


def _numbers(score: AnswerScore) -> dict[str, float]:
    """What one answer brings to each metric; nothing where it has no say."""
    found: dict[str, float] = {
        "parse_fail_pct": 100 * (not score.parsed),
        "stop_pct": 100 * score.stopped,
        "gen_tokens/mean": score.num_tokens,
    }
    for name, field in score.fields.items():
        found[f"field_em/{name}"] = field.correct
        if field.kind == "fuzzy":
            read = field.prediction is not None
            found[f"anls/{name}"] = likeness(str(field.prediction), str(field.target)) if read else 0.0
        elif field.kind == "relaxed":
            found[f"relaxed_accuracy/{name}"] = field.correct
        elif field.kind == "number" and field.error is not None:
            truth = abs(float(field.target))
            found[f"{name}_mae"] = field.error
            found[f"{name}_within_10pct"] = field.error <= WITHIN_FRAC * truth
            if truth:
                found[f"{name}_median_ape_pct"] = 100 * field.error / truth
    return {name: float(number) for name, number in found.items()}


def _made_by(metric: str) -> tuple[Statistic, float]:
    """How a metric comes of its numbers, and what a number is at most where it is one of a share."""
    if metric.endswith("_median_ape_pct"):
        return "median", 1.0
    if metric in ("parse_fail_pct", "stop_pct"):
        return "share", 100.0
    is_share = metric.endswith("_within_10pct") or metric.startswith(("field_em/", "relaxed_accuracy/"))
    return "share" if is_share else "mean", 1.0
