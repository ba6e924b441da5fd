"""A run folder on disk → `Run`: everything a report needs, read once, whatever is missing.

What comes in: `runs/<name>/`. What goes out: settings, surviving history, evaluations, final numbers. Surprise: nothing
but the folder is required. A run that was killed has no summary, one that has just begun has no evaluation, and both
are worth a look; only a file that is there and cannot be read is an error.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.observe.metrics import ATTEMPT, STEP, Number
from phi3v_dist.observe.tracker import RECORD_NAME, read_metrics

MAX_LABELS = 24  # a field with more different values is a text, not a label: no confusion matrix


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `scores` by metric name, and the answers behind them (empty if they were not kept)."""

    step: int
    scores: Mapping[str, Number]
    predictions: list[dict[str, Any]]
    folder: Path


@dataclass(frozen=True)
class Run:
    """What a run left behind. `summary` is empty unless the run came to its end."""

    folder: Path
    config: Mapping[str, Any]
    history: list[dict[str, Number]]
    summary: Mapping[str, Number]
    evaluations: list[Evaluation]

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
        before, after = ("eval/field_em/", "") if kind == "exact" else ("eval/", "_median_ape_pct")
        return [
            name.removeprefix(before).removesuffix(after)
            for name in self.final
            if name.startswith(before) and name.endswith(after) and not name.startswith("eval/blind/")
        ]

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


def read_run(folder: Path) -> Run:
    """Read what is there; ConfigError when `folder` is not a run folder at all."""
    if not (folder / "config.yaml").is_file() and not (folder / RECORD_NAME).is_file():
        found = "it holds neither config.yaml nor metrics.jsonl" if folder.is_dir() else "there is no such folder"
        raise ConfigError(
            f"{folder} is not a run folder: {found}. Name a folder that launch/train.py made (runs/<name>), or make "
            "one with `deepspeed launch/train.py --config launch/configs/quickstart.yaml`"
        )
    history = read_metrics(folder)
    return Run(
        folder=folder,
        config=_read(folder / "config.yaml", yaml.safe_load) or {},
        history=history,
        summary=_numbers(folder / "summary.json"),
        evaluations=_read_evaluations(folder, history),
    )


def _read_evaluations(folder: Path, history: list[dict[str, Number]]) -> list[Evaluation]:
    """Every evaluation of the surviving steps, from its folder where there is one, else from the record."""
    scores = {
        int(row[STEP]): {name: value for name, value in row.items() if name.startswith("eval/")}
        for row in history
        if any(name.startswith("eval/") for name in row)
    }
    named = ((re.fullmatch(r"step-(\d+)", path.parent.name), path.parent) for path in folder.glob("eval/*/scores.json"))
    folders = {int(name.group(1)): its_folder for name, its_folder in named if name}  # not those still being written
    last_step = history[-1][STEP] if history else float("inf")
    evaluations = []
    for step in sorted(scores.keys() | folders.keys()):
        if step > last_step:  # left by an attempt that was rolled back
            continue
        its_folder = folders.get(step, folder)
        numbers = {STEP: step, **scores.get(step, {}), **_numbers(its_folder / "scores.json")}
        predictions = _read(its_folder / "predictions.jsonl", _parse_lines) or []
        evaluations.append(Evaluation(step, numbers, predictions, its_folder))
    return evaluations


def _numbers(path: Path) -> dict[str, Number]:
    """A flat JSON object of numbers; what is not a number (null: not measured) is left out."""
    content = _read(path, json.loads) or {}
    return {name: value for name, value in content.items() if isinstance(value, int | float)}


def _parse_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _read(path: Path, parse: Any) -> Any:
    """The file's content, None when there is no such file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"reading {path} for a report: it is damaged ({error}); mend it or move it away") from error
