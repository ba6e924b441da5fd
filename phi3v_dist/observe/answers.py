"""Answers of the newest evaluation → `answers.html`: a table of all of them, to be searched and sorted.

What comes in: an `Evaluation`. What goes out: rows of cells. Surprise: the page has a few lines of script, which the
report itself has not. The browser is told their digest, so that no other script can run there, whatever an answer says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from phi3v_dist.observe.gallery import shown
from phi3v_dist.observe.metrics import Number, format_number
from phi3v_dist.observe.ranking import Prediction
from phi3v_dist.observe.run_folder import Evaluation, is_number

ANSWERS_NAME = "answers.html"
MOST_ROWS = 2000  # a page of some 2 MB
MOST_CHARACTERS = 240  # of a cell


@dataclass(frozen=True)
class Cell:
    """sort: by what a column is sorted where that is not the text. kind: how it looks."""

    text: str
    sort: Number | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """left_out: how many rows are not shown, and where they are; empty when all are."""

    columns: list[str]
    rows: list[list[Cell]]
    left_out: str = ""


def answer_table(evaluation: Evaluation) -> Table:
    """All answers in the order in which they were asked, as many as a page takes."""
    predictions = evaluation.predictions
    fields = names_of_fields(predictions)
    is_blind = any(row["blind"] for row in predictions)
    has_questions = len({row["prompt"] for row in predictions}) > 1
    columns = ["sample", *["question"][: int(has_questions)]]
    for name in fields:
        columns += [name, f"{name}: truth", *[f"{name}: blind"][: int(is_blind)]]
        columns += [f"{name}: error"][: int(has_error(predictions, name))]
    columns += ["answer", "truth", *["blind"][: int(is_blind)], "loss"]
    rows = []
    for row in predictions[:MOST_ROWS]:
        blind = row["blind"] or {}
        cells = [text_cell(sample_name(row)), *[text_cell(row["prompt"], "long")][: int(has_questions)]]
        for name in fields:
            cells += _field_cells(row["fields"].get(name), blind.get("fields", {}).get(name), is_blind)
            if f"{name}: error" in columns:
                cells.append(number_cell((row["fields"].get(name) or {}).get("error")))
        cells += [text_cell(row["prediction"], "long"), text_cell(row.get("target"), "long")]
        cells += [text_cell(blind.get("prediction"), "blind long")][: int(is_blind)]
        rows.append([*cells, number_cell(row.get("loss"))])
    return Table(columns, rows, left_out(len(predictions), len(rows), f"{evaluation.folder.name}/predictions.jsonl"))


def left_out(num_all: int, num_shown: int, file: str) -> str:
    """The sentence that says what the table does not show."""
    if num_all == num_shown:
        return ""
    return f"The first {num_shown:,} of {num_all:,}; the other {num_all - num_shown:,} are in {file}."


def names_of_fields(predictions: Sequence[Prediction]) -> list[str]:
    return list(dict.fromkeys(name for row in predictions for name in row["fields"]))


def has_error(predictions: Sequence[Prediction], field: str) -> bool:
    """Whether it is a number in some answer."""
    return any(is_number((row["fields"].get(field) or {}).get("error")) for row in predictions)


def sample_name(prediction: Prediction) -> str:
    """Without the folder of its shard, which is the same for all of them nearly always."""
    return f"{PurePosixPath(prediction['shard']).name} · {prediction['key']}"


def text_cell(value: Any, kind: str = "") -> Cell:
    """A text or a number as it is; None: nothing was found."""
    if is_number(value) and not isinstance(value, bool):
        return Cell(f"{value:,.10g}", value, f"{kind} number".strip())
    return Cell("–" if value is None else shown(str(value), MOST_CHARACTERS), kind=kind)


def number_cell(value: Any) -> Cell:
    return Cell(format_number(value), value, "number") if is_number(value) else Cell("", kind="number")


def _field_cells(score: Mapping[str, Any] | None, blind: Mapping[str, Any] | None, is_blind: bool) -> list[Cell]:
    if score is None:
        return [Cell("")] * (2 + is_blind)
    answer = text_cell(score["prediction"], "" if score["correct"] else "wrong")
    control = text_cell(blind["prediction"] if blind else None, "blind")
    return [answer, text_cell(score["target"]), *[control][: int(is_blind)]]
