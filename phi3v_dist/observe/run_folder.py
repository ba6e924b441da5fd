"""A run folder on disk → `Run`: everything a report needs, read once, whatever is missing or damaged.

What comes in: `runs/<name>/`. What goes out: settings, surviving history, evaluations, final numbers. Surprise: nothing
but the folder is required. A run that was killed has no summary, one that has just begun has no evaluation, and one on
a full disk has half a file; all are worth a look. What cannot be read is left out and named in `Run.notes`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe.figures import Series
from phi3v_dist.observe.metrics import ATTEMPT, FIELD, STEP, Number, entry_name
from phi3v_dist.observe.tracker import RECORD_NAME, read_metrics

MAX_LABELS = 24  # a field with more different values is a text, not a label: no confusion matrix
MAX_DAMAGED = 3  # lines that are named one by one
CONFIG_NAME, SUMMARY_NAME = "config.yaml", "summary.json"
PREDICTION: dict[str, type | tuple[type, ...]] = {
    "sample_id": int, "shard": str, "key": str, "prompt": str, "prediction": str, "fields": dict,
    "blind": (dict, type(None)), "thumbnail": (str, type(None)),
}  # fmt: skip
SCORE = ("kind", "target", "prediction", "correct", "error")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `scores` by metric name, and the answers behind them (empty if they were not kept)."""

    step: int
    scores: Mapping[str, Number]
    predictions: list[dict[str, Any]]
    folder: Path


@dataclass(frozen=True)
class Run:
    """What a run left behind. `summary` is empty unless the run came to its end. notes: what could not be read."""

    folder: Path
    config: Mapping[str, Any]
    history: list[dict[str, Number]]
    summary: Mapping[str, Number]
    evaluations: list[Evaluation]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def series(self) -> dict[str, Series]:
        """Every number of the history, and of evaluations' folders, over steps; by metric name."""
        scored: dict[Number, dict[str, Number]] = {}
        for evaluation in self.evaluations:
            scored.setdefault(evaluation.step, {}).update(evaluation.scores)
        rows = {row[STEP]: {**row, **scored.pop(row[STEP], {})} for row in self.history}
        rows |= {step: {**row, STEP: step} for step, row in scored.items()}
        return _columns(rows[step] for step in sorted(rows))

    @cached_property
    def last(self) -> dict[str, Number]:
        """The last finite value of every metric."""
        return {name: float(series.values[-1]) for name, series in self.series.items()}

    @property
    def takeovers(self) -> list[Number]:
        """Steps from which a later attempt took over."""
        if ATTEMPT not in self.series:
            return []
        found = self.series[ATTEMPT]
        return [float(step) for step in found.steps[1:][np.diff(found.values) > 0]]

    @property
    def final(self) -> dict[str, Number]:
        """The last evaluation's numbers under the summary's."""
        last = self.evaluations[-1].scores if self.evaluations else {}
        return {**last, **self.summary}

    @property
    def answered(self) -> Evaluation | None:
        """The latest evaluation whose answers were kept."""
        return next((evaluation for evaluation in reversed(self.evaluations) if evaluation.predictions), None)

    @property
    def last_step(self) -> int:
        return int(self.history[-1][STEP]) if self.history else 0

    @property
    def attempts(self) -> int:
        return int(max((row[ATTEMPT] for row in self.history), default=0))

    def fields(self, kind: str) -> list[str]:
        """Names of the answers' fields of one kind, "exact" or "number", in the order of the answers."""
        if self.answered:
            fields = {name: score["kind"] for row in self.answered.predictions for name, score in row["fields"].items()}
            return [name for name, its_kind in fields.items() if its_kind == kind]
        wanted = "eval/field_em/<field>" if kind == "exact" else "eval/<field>_median_ape_pct"
        before, after = wanted.split(FIELD)
        return [name.removeprefix(before).removesuffix(after) for name in self.final if entry_name(name) == wanted]

    def label_field(self) -> str | None:
        """The first exact field with few different true values: what the run is asked to tell apart."""
        exact = self.fields("exact")
        if not self.answered:
            return exact[-1] if exact else None
        return next((name for name in exact if 2 <= len(self.truths(name)) <= MAX_LABELS), None)

    def truths(self, field: str) -> list[str]:
        """The different true values of an exact field, sorted."""
        predictions = self.answered.predictions if self.answered else []
        return sorted({str(row["fields"][field]["target"]) for row in predictions if field in row["fields"]})


def require_run_folder(folder: Path) -> None:
    """ConfigError when `folder` is not a run folder at all."""
    if not any((folder / name).exists() for name in (CONFIG_NAME, RECORD_NAME, "attempts")):
        found = "there is no such folder"
        if folder.exists():
            found = f"it holds neither {CONFIG_NAME} nor {RECORD_NAME}" if folder.is_dir() else "it is a file"
        command = as_typed("deepspeed launch/train.py --config launch/configs/quickstart.yaml")
        raise ConfigError(
            f"{folder} is not a run folder: {found}. Name a folder that {as_typed('launch/train.py')} made "
            f"(runs/<name>), or make one with `{command}`"
        )


def read_run(folder: Path) -> Run:
    """Read what is there; ConfigError when `folder` is not a run folder at all."""
    require_run_folder(folder)
    notes: list[str] = []
    history = _read_history(folder, notes)
    return Run(
        folder=folder,
        config=_parse(folder / CONFIG_NAME, lambda text: _mapping(yaml.safe_load(text) or {}), {}, notes),
        history=history,
        summary=_numbers(folder / SUMMARY_NAME, notes),
        evaluations=_read_evaluations(folder, history, notes),
        notes=notes,
    )


def _read_history(folder: Path, notes: list[str]) -> list[dict[str, Number]]:
    damaged: list[str] = []
    try:
        history = read_metrics(folder, damaged)
    except OSError as error:
        notes.append(f"{folder / RECORD_NAME}: cannot be read ({error})")
        return []
    more = len(damaged) - MAX_DAMAGED
    notes += damaged[:MAX_DAMAGED] + ([f"{folder / RECORD_NAME}: {more} more damaged lines"] if more > 0 else [])
    return history


def read_lines(path: Path, fits: Callable[[Any], bool], notes: list[str], most: int | None = None) -> list[Any]:
    """The JSON lines of a file that are as they should be, the first `most` of them; notes says how many are not."""
    found: list[Any] = []
    num_damaged = 0
    for line in _parse(path, str.splitlines, [], notes):
        if len(found) == most:
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            num_damaged += 1
            continue
        if fits(value):
            found.append(value)
        else:
            num_damaged += 1
    if num_damaged:
        notes.append(f"{path}: {num_damaged} damaged lines are left out")
    return found


def is_number(value: object) -> bool:
    """Finite, and small enough for a float."""
    return isinstance(value, int | float) and abs(value) < 1e300  # false for NaN too


def _read_evaluations(folder: Path, history: list[dict[str, Number]], notes: list[str]) -> list[Evaluation]:
    """Every evaluation of the surviving steps, from its folder where there is one, else from the record."""
    scores = {
        int(row[STEP]): found
        for row in history
        if (found := {name: row[name] for name in row if name.startswith("eval/") and is_number(row[name])})
    }
    named = ((re.fullmatch(r"step-(\d+)", path.parent.name), path.parent) for path in folder.glob("eval/*/scores.json"))
    folders = {int(name.group(1)): its_folder for name, its_folder in named if name}  # not those still being written
    last_step = history[-1][STEP] if history else math.inf
    steps = [step for step in sorted(scores.keys() | folders.keys()) if step <= last_step]  # the rest was rolled back
    evaluations = []
    for step in steps:
        its_folder = folders.get(step, folder)
        numbers = {STEP: step, **scores.get(step, {}), **_numbers(its_folder / "scores.json", notes)}
        predictions = read_lines(its_folder / "predictions.jsonl", is_prediction, notes)
        evaluations.append(Evaluation(step, numbers, predictions, its_folder))
    return evaluations


def is_prediction(row: object) -> bool:
    """Whether a line has what the page shows of an answer, each of its kind."""
    if not isinstance(row, dict):
        return False
    answers = [row, row.get("blind") or {"fields": {}}]
    return all(isinstance(row.get(name), kind) for name, kind in PREDICTION.items()) and all(
        isinstance(answer.get("fields"), dict) and all(map(_is_score, answer["fields"].values())) for answer in answers
    )


def _is_score(score: object) -> bool:
    if not isinstance(score, dict) or any(name not in score for name in SCORE):
        return False
    plain = all(isinstance(score[name], str | int | float | None) for name in ("target", "prediction"))
    if score["kind"] != "number":
        return plain
    return all(score[name] is None or is_number(score[name]) for name in ("prediction", "error")) and is_number(
        score["target"]
    )


def _columns(rows: Iterable[Mapping[str, Number]]) -> dict[str, Series]:
    """Rows in the order of steps → series without the values that are not finite."""
    columns: dict[str, tuple[list[Number], list[Number]]] = {}
    for row in rows:
        step = row[STEP]
        for name, value in row.items():
            steps, values = columns.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    found = {}
    for name, (steps, values) in columns.items():
        numbers = np.array(values, dtype=float)
        finite = np.isfinite(numbers)
        if finite.any():
            found[name] = Series(np.array(steps, dtype=float)[finite], numbers[finite])
    return found


def _numbers(path: Path, notes: list[str]) -> dict[str, Number]:
    """A flat JSON object of numbers; what is not a number (null: not measured) is left out."""
    content = _parse(path, lambda text: _mapping(json.loads(text)), {}, notes)
    return {name: value for name, value in content.items() if is_number(value)}


def _mapping(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{type(content).__name__} where names and values are expected")
    return content


def _parse(path: Path, parse: Callable[[str], Any], nothing: Any, notes: list[str]) -> Any:
    """The file's content; `nothing` where there is no such file, and with a note where it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else nothing
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        notes.append(f"{path}: cannot be read ({said}) and is left out; mend it or move it away")
        return nothing
