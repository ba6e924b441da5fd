"""Answers of one evaluation → the cards of the report's gallery: picture, question, truth and answer side by side.

Surprise: the pictures travel inside the page as data URIs, so only the few that are shown are read.
"""

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.observe.metrics import Number
from phi3v_dist.observe.run_folder import Evaluation

PART_SIZE = 6  # cards in each part of the gallery
MOST_BYTES = 1_000_000  # of a thumbnail, which has some ten thousand


@dataclass(frozen=True)
class FieldLine:
    """One field of a card: the truth, the model's answer, the answer when blind."""

    name: str
    truth: str
    answer: str
    blind: str
    right: bool


@dataclass(frozen=True)
class Card:
    """One answer. `picture` is a data URI; None for a sample without one. `prediction` is the record as stored."""

    picture: str | None
    prediction: Mapping[str, Any]
    fields: list[FieldLine]


def gallery(evaluation: Evaluation) -> dict[str, list[Card]]:
    """The best, the worst and random others, so that the page shows neither only luck nor only trouble."""
    ranked = sorted(evaluation.predictions, key=lambda row: (_badness(row), row["sample_id"]))
    size = min(PART_SIZE, len(ranked) // 3) or len(ranked)
    if size == len(ranked):
        return {"All answers": [_card(row, evaluation.folder) for row in ranked]}
    middle = random.Random(0).sample(ranked[size:-size], size)
    parts = {
        "Picked at random": middle,
        "The worst answers": ranked[: -size - 1 : -1],
        "The best answers": ranked[:size],
    }
    return {title: [_card(row, evaluation.folder) for row in rows] for title, rows in parts.items()}


def _badness(prediction: Mapping[str, Any]) -> Number:
    """Wrong words count 1, numbers by their relative error up to 1, and what cannot be read counts 1."""
    total = 0.0
    for score in prediction["fields"].values():
        if score["kind"] == "number" and score["error"] is not None and score["target"]:
            total += min(1.0, abs(score["error"] / score["target"]))
        else:
            total += not score["correct"]
    return total


def picture_uri(folder: Path, name: str | None) -> str | None:
    """A small picture of an evaluation's folder as a data URI; None without one in that folder."""
    path = (folder / name).resolve() if name and "\0" not in name else None
    try:
        if path is None or not path.is_relative_to(folder.resolve()) or path.stat().st_size > MOST_BYTES:
            return None
        kind = {".png": "png", ".webp": "webp"}.get(path.suffix.lower(), "jpeg")
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return None


def _card(prediction: Mapping[str, Any], folder: Path) -> Card:
    blind = (prediction["blind"] or {}).get("fields", {})
    fields = [
        FieldLine(
            name=name,
            truth=_text(score["target"]),
            answer=_text(score["prediction"]),
            blind=_text(blind.get(name, {}).get("prediction")),
            right=bool(score["correct"]),
        )
        for name, score in prediction["fields"].items()
    ]
    return Card(picture_uri(folder, prediction["thumbnail"]), prediction, fields)


def _text(value: str | Number | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,.10g}"
