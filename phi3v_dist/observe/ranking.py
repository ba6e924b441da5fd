"""A recorded answer → how bad it is: the one order behind "best" and "worst" on every page.

What comes in: a line of `predictions.jsonl`, whatever `eval.fields` was. What goes out: a number. 0: every field is
right. Up to 1: the mean over its fields of how wrong each is. One more when a field cannot be read, so that such
answers come last. Equal ones are ordered by the loss of the true answer, and without any fields the loss alone counts.
Surprise: a number that is nearly right is nearly good, although exact match counts it as wrong.

How wrong a field is: a number by its relative error, at most 1; a fuzzy text by 1 - its likeness to the truth; any
other is right or wrong.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from phi3v_dist.evaluate.score import likeness
from phi3v_dist.observe.run_folder import is_number

LETTERS = 64  # of a fuzzy text that are looked at: the time grows with their square
UNREADABLE = 1.0
BY_FIELDS = (
    "Best: every field right, numbers with the smallest relative error, then the lowest loss. Worst: a field that "
    "cannot be read, then the most wrong."
)
BY_LOSS = "No fields are declared (`eval.fields`), so best and worst go by the loss of the true answer."

Prediction = Mapping[str, Any]


def badness(prediction: Prediction) -> float:
    """0 to 2; 0 also where no field was asked for."""
    fields = list(prediction["fields"].values())
    if not fields:
        return 0.0
    unreadable = any(score["prediction"] is None for score in fields)
    return sum(map(wrongness, fields)) / len(fields) + UNREADABLE * unreadable


def wrongness(score: Mapping[str, Any]) -> float:
    """0 to 1, of one field."""
    found, truth, error = score["prediction"], score["target"], score["error"]
    if found is None:
        return 1.0
    if is_number(error) and is_number(truth):
        return min(1.0, abs(error / truth)) if truth else float(error != 0)
    if score["kind"] == "fuzzy" and not score["correct"]:
        return 1 - likeness(str(found)[:LETTERS], str(truth)[:LETTERS])
    return float(not score["correct"])


def loss(prediction: Prediction) -> float:
    """Of the true answer; infinite where there is none, or none that is finite."""
    found = prediction.get("loss")
    return float(found) if found is not None and is_number(found) else math.inf


def ranked(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Best first. Where some samples have fields, those without any are left out."""
    judged = [row for row in predictions if row["fields"]] or list(predictions)
    return sorted(judged, key=lambda row: (badness(row), loss(row), row["sample_id"]))


def described(predictions: Sequence[Prediction]) -> str:
    """What best and worst mean for these, as a person reads it."""
    return BY_FIELDS if any(row["fields"] for row in predictions) else BY_LOSS
