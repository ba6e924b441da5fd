"""Two evaluations → what changed between them, sample by sample: `changes.html`.

What comes in: two folders with `predictions.jsonl`, of one run or of two, or of an export. What goes out: counts per
field, and every common sample with its answers of before and now. Surprise: a sample is known by its shard's name and
its key. A number counts only within one data set, and folders differ from machine to machine.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe.answers import (
    MOST_ROWS,
    Cell,
    Table,
    has_error,
    left_out,
    names_of_fields,
    number_cell,
    sample_name,
    text_cell,
)
from phi3v_dist.observe.gallery import picture_uri
from phi3v_dist.observe.metrics import Number, format_number
from phi3v_dist.observe.ranking import Prediction, badness, loss
from phi3v_dist.observe.run_folder import CONFIG_NAME, Evaluation, is_number, is_prediction, read_lines, read_run
from phi3v_dist.observe.tracker import RECORD_NAME

CHANGES_NAME = "changes.html"
MOST_CARDS = 6  # in each direction
ALL_FIELDS = "all of them"
Pair = tuple[Prediction, Prediction]


@dataclass(frozen=True)
class Answers:
    """One evaluation's answers. label: as the page calls it."""

    label: str
    folder: Path
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class Turned:
    """Of one field: how many samples were right or wrong before, and are now."""

    field: str
    still_right: int
    newly_right: int
    newly_wrong: int
    still_wrong: int


@dataclass(frozen=True)
class Moved:
    """Of one number, over samples that have it in both. before, now: its mean."""

    what: str
    num_samples: int
    before: str
    now: str
    smaller: int
    larger: int


@dataclass(frozen=True)
class Line:
    """One field of a card."""

    name: str
    truth: Cell
    before: Cell
    now: Cell
    said: str


@dataclass(frozen=True)
class Card:
    """A sample whose answer changed much."""

    name: str
    picture: str | None
    before: Prediction
    now: Prediction
    lines: list[Line]


@dataclass(frozen=True)
class Changes:
    """notes: of matching. num_reworded: samples that were answered in other words."""

    before: Answers
    now: Answers
    num_common: int
    num_reworded: int
    num_better: int
    num_worse: int
    turned: list[Turned]
    moved: list[Moved]
    cards: dict[str, list[Card]]
    table: Table
    notes: list[str]


def answers_of(evaluation: Evaluation, run_name: str) -> Answers:
    return Answers(f"{run_name}, step {evaluation.step:,}", evaluation.folder, evaluation.predictions)


def read_answers(folder: Path, notes: list[str]) -> Answers:
    """Of an evaluation's folder, or of a run's newest evaluation.

    Raises:
        ConfigError: there are no answers.
    """
    if any((folder / name).exists() for name in (CONFIG_NAME, RECORD_NAME)) and folder.is_dir():
        run = read_run(folder)
        notes += run.notes
        if run.answered:
            return answers_of(run.answered, run.name)
        raise ConfigError(f"{folder}: no evaluation of this run has kept its predictions.jsonl")
    path = folder / "predictions.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no evaluation's folder: it holds no predictions.jsonl. Name one, such as "
            f"RUN/eval/step-000200 or what {as_typed('launch/evaluate.py')} wrote, or a run for its newest one"
        )
    predictions = read_lines(path, is_prediction, notes)
    if not predictions:
        raise ConfigError([f"{path}: no line of it is an answer", *notes])
    return Answers(_label(folder), folder, predictions)


def changes(before: Answers, now: Answers) -> Changes:
    """Compare what both were asked. The largest changes come first, those for the worse before those for the better."""
    notes: list[str] = []
    pairs = _pairs(before, now, notes)
    fields = [name for name in names_of_fields(now.predictions) if any(name in old["fields"] for old, _ in pairs)]
    only = set(names_of_fields(before.predictions)) ^ set(names_of_fields(now.predictions))
    if only:
        notes.append(f"Only one of the two has these fields, which are not compared: {', '.join(sorted(only))}.")
    steps = {id(pair[1]): _change(*pair) for pair in pairs}
    ordered = sorted(pairs, key=lambda pair: (-abs(steps[id(pair[1])]), pair[1]["sample_id"]))
    worse = [pair for pair in ordered if steps[id(pair[1])] > 0]
    better = [pair for pair in ordered if steps[id(pair[1])] < 0]
    folders = (before.folder, now.folder)
    cards = {
        "Got worse the most": [_card(pair, fields, folders) for pair in worse[:MOST_CARDS]],
        "Got better the most": [_card(pair, fields, folders) for pair in better[:MOST_CARDS]],
    }
    return Changes(
        before, now, len(pairs), sum(old["prediction"] != new["prediction"] for old, new in pairs), len(better),
        len(worse), _turned(pairs, fields), _moved(pairs, fields),
        {title: some for title, some in cards.items() if some}, _table(ordered, fields, now), notes,
    )  # fmt: skip


def _pairs(before: Answers, now: Answers, notes: list[str]) -> list[Pair]:
    """Common samples in the order of now, without those whose truth or question is another one."""
    found = _matched(before.predictions, now.predictions)
    same = [
        (old, new) for old, new in found if old.get("target") == new.get("target") and old["prompt"] == new["prompt"]
    ]
    if len(same) < len(found):
        notes.append(
            f"{len(found) - len(same)} samples have the same name and another question or truth: they are left out."
        )
    return same


def _matched(before: Sequence[Prediction], now: Sequence[Prediction]) -> list[Pair]:
    """By shard as it was written and key; where that finds none, by the shard's name alone, if that is one sample's."""
    whole = {(row["shard"], row["key"]): row for row in before}
    pairs = [(whole[name], row) for row in now if (name := (row["shard"], row["key"])) in whole]
    if pairs:
        return pairs
    counts = [Counter(map(_short, rows)) for rows in (before, now)]
    short = {_short(row): row for row in before}
    return [
        (short[name], row) for row in now if (name := _short(row)) in short and all(one[name] == 1 for one in counts)
    ]


def _short(row: Prediction) -> tuple[str, str]:
    return PurePosixPath(row["shard"].partition("?")[0]).name, row["key"]


def _change(old: Prediction, new: Prediction) -> float:
    """By how much worse it is now; without fields, of the loss."""
    if old["fields"] and new["fields"]:
        return badness(new) - badness(old)
    before, now = loss(old), loss(new)
    return float(now - before) if math.isfinite(before) and math.isfinite(now) else 0.0


def _turned(pairs: Sequence[Pair], fields: Sequence[str]) -> list[Turned]:
    found = []
    for name in fields:
        both = [(old["fields"][name], new["fields"][name]) for old, new in pairs if _has(name, old, new)]
        found.append(_counted(name, [(bool(old["correct"]), bool(new["correct"])) for old, new in both]))
    if len(fields) > 1:
        whole = [(_all_right(old), _all_right(new)) for old, new in pairs if old["fields"] and new["fields"]]
        found.append(_counted(ALL_FIELDS, whole))
    return found


def _counted(name: str, turns: Sequence[tuple[bool, bool]]) -> Turned:
    counts = Counter(turns)
    return Turned(name, counts[True, True], counts[False, True], counts[True, False], counts[False, False])


def _moved(pairs: Sequence[Pair], fields: Sequence[str]) -> list[Moved]:
    """Errors of numbers, and the loss."""
    rows = [row for pair in pairs for row in pair]
    numeric = [name for name in fields if has_error(rows, name)]
    values = {f"error of {name}": [_errors(pair, name) for pair in pairs] for name in numeric}
    values["loss"] = [(old.get("loss"), new.get("loss")) for old, new in pairs]
    found = []
    for what, sides in values.items():
        both = [(old, new) for old, new in sides if is_number(old) and is_number(new)]
        if both:
            before, now = (format_number(sum(side) / len(both)) for side in zip(*both, strict=True))
            smaller, larger = sum(new < old for old, new in both), sum(new > old for old, new in both)
            found.append(Moved(what, len(both), before, now, smaller, larger))
    return found


def _errors(pair: Pair, field: str) -> tuple[Any, Any]:
    old, new = ((row["fields"].get(field) or {}).get("error") for row in pair)
    return _size(old), _size(new)


def _size(error: Any) -> Any:
    return abs(error) if is_number(error) else None


def _table(pairs: Sequence[Pair], fields: Sequence[str], now: Answers) -> Table:
    columns = ["sample", "what changed", "worse by"]
    for name in fields:
        columns += [f"{name}: truth", f"{name}: before", f"{name}: now"]
    columns += ["answer before", "answer now"]
    rows = []
    for old, new in pairs[:MOST_ROWS]:
        lines = [_line(name, old, new) for name in fields]
        said = "; ".join(f"{line.name}: {line.said}" for line in lines if line.said)
        step = _change(old, new)
        other_words = "other words" if old["prediction"] != new["prediction"] else "nothing"
        cells = [text_cell(sample_name(new)), Cell(said or other_words), number_cell(step)]
        for line in lines:
            cells += [line.truth, line.before, line.now]
        rows.append([*cells, text_cell(old["prediction"], "long"), text_cell(new["prediction"], "long")])
    return Table(columns, rows, left_out(len(pairs), len(rows), f"{now.folder.name}/predictions.jsonl"))


def _card(pair: Pair, fields: Sequence[str], folders: tuple[Path, Path]) -> Card:
    old, new = pair
    pictures = (picture_uri(folder, row["thumbnail"]) for folder, row in zip(folders[::-1], pair[::-1], strict=True))
    lines = [_line(name, old, new) for name in fields]
    if not lines:
        texts = (new.get("target"), old["prediction"], new["prediction"])
        lines = [Line("answer", text_cell(texts[0]), text_cell(texts[1]), text_cell(texts[2]), said="")]
    return Card(sample_name(new), next(filter(None, pictures), None), old, new, lines)


def _line(name: str, old: Prediction, new: Prediction) -> Line:
    if not _has(name, old, new):
        return Line(name, Cell(""), Cell(""), Cell(""), "")
    was, is_now = old["fields"][name], new["fields"][name]
    before, now = (text_cell(score["prediction"], "" if score["correct"] else "wrong") for score in (was, is_now))
    return Line(name, text_cell(is_now["target"]), before, now, _verdict(was, is_now))


def _verdict(was: Mapping[str, Any], is_now: Mapping[str, Any]) -> str:
    """What became of one field; empty when its answer is the same."""
    said = []
    if bool(was["correct"]) != bool(is_now["correct"]):
        said.append("newly right" if is_now["correct"] else "newly wrong")
    if is_number(was["error"]) and is_number(is_now["error"]) and was["error"] != is_now["error"]:
        step: Number = abs(is_now["error"]) - abs(was["error"])
        said.append(f"error {'+' if step > 0 else '−'}{format_number(abs(step))}" if step else "error turned round")
    elif (was["prediction"] is None) != (is_now["prediction"] is None):
        said.append("can be read now" if was["prediction"] is None else "cannot be read now")
    if not said and was["prediction"] != is_now["prediction"]:
        said.append("another wrong answer" if not is_now["correct"] else "another right answer")
    return ", ".join(said)


def _has(name: str, old: Prediction, new: Prediction) -> bool:
    return name in old["fields"] and name in new["fields"]


def _all_right(row: Prediction) -> bool:
    return all(score["correct"] for score in row["fields"].values())


def _label(folder: Path) -> str:
    """`run, step 200` where the folder's place says so."""
    whole = folder.resolve()
    step = whole.name.removeprefix("step-")
    if whole.parent.name == "eval" and step.isdecimal():
        return f"{whole.parent.parent.name}, step {int(step):,}"
    return str(folder)
