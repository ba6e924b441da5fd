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
from phi3v_dist.observe.ranking import ranked
from phi3v_dist.observe.run_folder import Evaluation
from phi3v_dist.printable import printable

PART_SIZE = 6  # cards in each part of the gallery
MOST_CHARACTERS = 1500  # of a question
MOST_BYTES = 1_000_000  # of a thumbnail, which has some ten thousand


@dataclass(frozen=True)
class FieldLine:
    """One field of a card: the truth, the model's answer, the answer when blind. right: None where nothing judges."""

    name: str
    truth: str
    answer: str
    blind: str
    right: bool | None


@dataclass(frozen=True)
class Card:
    """One answer. `picture` is a data URI; None for a sample without one. `prediction` is the record as stored."""

    picture: str | None
    prediction: Mapping[str, Any]
    fields: list[FieldLine]


def gallery(evaluation: Evaluation) -> dict[str, list[Card]]:
    """The best, the worst and random others, so that the page shows neither only luck nor only trouble."""
    rows = ranked(evaluation.predictions)
    size = min(PART_SIZE, len(rows) // 3) or len(rows)
    if size == len(rows):
        return {"All answers": [_card(row, evaluation.folder) for row in rows]}
    middle = random.Random(evaluation.step).sample(rows[size:-size], size)
    parts = {
        "Picked at random": middle,
        "The worst answers": rows[: -size - 1 : -1],
        "The best answers": rows[:size],
    }
    return {title: [_card(row, evaluation.folder) for row in rows] for title, rows in parts.items()}


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text of a sample: as it is but for what does not show, and long ones without their middle."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {len(text) - most:,} characters … {text[-most // 2 :]}"
    return printable(text, keep="\n\t")


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
    if not fields:
        texts = (prediction.get("target"), prediction["prediction"], (prediction["blind"] or {}).get("prediction"))
        truth, answer, control = (shown(text) if isinstance(text, str) else "–" for text in texts)
        fields = [FieldLine("answer", truth, answer, control, right=None)]
    return Card(picture_uri(folder, prediction["thumbnail"]), prediction, fields)


def _text(value: str | Number | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,.10g}"
