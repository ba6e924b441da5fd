"""A run folder → `report.html`: one page that needs nothing else, for whoever paid for the run.

What comes in: `runs/<name>/`. What goes out: headline, figures, answers with their pictures, facts. Surprise: the page
has no script and may fetch nothing (its own security policy says so), so it can be mailed, printed and opened in ten
years. Text of samples goes through the template's escaping and can do nothing.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from phi3v_dist.observe import figures
from phi3v_dist.observe.gallery import gallery
from phi3v_dist.observe.metrics import format_number, format_value, lookup, panel_metrics
from phi3v_dist.observe.run_folder import Run, read_run
from phi3v_dist.observe.verdict import THROUGHPUT, sentence, tiles

logger = logging.getLogger(__name__)

STEP_PARTS = {"time/data_s": "data", "time/fwd_s": "forward", "time/bwd_s": "backward", "time/opt_s": "optimizer"}


@dataclass(frozen=True)
class Panel:
    """A figure with its title and one sentence on how to read it."""

    title: str
    caption: str
    svg: Markup


def write_report(run_folder: Path) -> Path:
    """Make RUN/report.html out of what is in the folder; missing parts are named on the page."""
    run = read_run(run_folder)
    missing = _missing(run)
    for note in missing:
        logger.warning("%s: %s", run_folder, note)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        name=run.folder.resolve().name,
        status=_status(run),
        missing=missing,
        sentence=sentence(run),
        tiles=tiles(run),
        results=list(_result_panels(run)),
        training=list(_training_panels(run)),
        speed=list(_speed_panels(run)),
        gallery=gallery(run.answered) if run.answered else {},
        evaluations=_evaluation_table(run),
        facts=_facts(run),
        settings=_settings(run.config),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _status(run: Run) -> str:
    planned = run.config.get("train", {}).get("steps")
    if run.summary:
        return f"finished at step {run.last_step:,}"
    if not run.history:
        return "not started"
    return f"not finished: last seen at step {run.last_step:,}" + (f" of {planned:,}" if planned else "")


def _missing(run: Run) -> list[str]:
    """What is not there, and how to get it."""
    again = f"`deepspeed launch/train.py --config {run.folder}/config.yaml`"
    notes = []
    if not run.history:
        notes.append(f"Nothing was logged yet: metrics.jsonl is missing or empty. {again} starts the run.")
    elif not run.summary:
        notes.append(f"No summary.json: the run is still going or was stopped. {again} continues it.")
    if run.history and not run.evaluations:
        notes.append("No evaluation yet, so there are no scores, no answers and no pictures on this page.")
    elif run.evaluations and not run.answered:
        notes.append("No predictions.jsonl was kept, so there are scores but no answers and no pictures.")
    return notes


def _result_panels(run: Run) -> Iterator[Panel]:
    for field in run.fields("number"):
        pairs, blind = _number_pairs(run, field)
        reachable = run.final.get(f"eval/best_{field}_mae")
        if pairs:
            text = f"One dot per sample; on the dashed diagonal the {field} is exactly right."
            yield _panel(f"{field.capitalize()}: true against predicted", text, figures.scatter(pairs, blind, field))
            text = "How far off the answers are. Coloured further left than grey: the pictures help."
            histogram = figures.error_histogram(pairs, blind, reachable, field)
            yield _panel(f"{field.capitalize()} error against the blind control", text, histogram)
        if lines := _measured(run, {f"eval/{field}_mae": "mean error"}):
            svg = figures.evaluations([step.scores for step in run.evaluations], lines, reachable)
            yield _panel(f"{field.capitalize()} error over training", "Mean absolute error at each evaluation.", svg)
    if label := run.label_field():
        pairs_of_labels = _label_pairs(run, label)
        if pairs_of_labels:
            svg = figures.confusion(pairs_of_labels, run.truths(label))
            yield _panel(f"{label.capitalize()}: true against answered", "Samples per cell; the diagonal is right.", svg)
    if lines := _measured(run, {f"eval/field_em/{field}": field for field in run.fields("exact")}):
        svg = figures.evaluations([step.scores for step in run.evaluations], lines, share=True)
        yield _panel("Exact match over training", "Share of samples answered exactly right at each evaluation.", svg)


def _training_panels(run: Run) -> Iterator[Panel]:
    for title in ("Loss", "Learning rate", "Gradient norm"):
        metrics = [metric for metric in panel_metrics(title) if not metric.name.startswith("eval/")]
        lines = {metric.name: metric.name.rpartition("/")[2] for metric in metrics}
        marks = {"eval/loss": "validation", "eval/blind/loss": "validation, blind"} if title == "Loss" else {}
        lines, marks = _logged(run, lines), _logged(run, marks)
        if title == "Loss":
            lines = {name: "training" for name in lines}
        if lines:
            yield _panel(title, _help(*lines), figures.curves(run.history, lines, marks))


def _speed_panels(run: Run) -> Iterator[Panel]:
    if _logged(run, {"time/step_s": ""}):
        held_s = {what: sum(row.get(f"time/{what}_s", 0.0) for row in run.history) for what in ("ckpt", "eval")}
        caption = (
            f"Seconds of one optimizer step. On top of it, in all: checkpoints {format_number(held_s['ckpt'])} s, "
            f"evaluations {format_number(held_s['eval'])} s."
        )
        yield _panel("Step time", caption, figures.step_time(run.history, _logged(run, STEP_PARTS), "time/step_s"))
    for title, name in (("Throughput", THROUGHPUT), ("Packing", "data/pack_efficiency")):
        if lines := _logged(run, {name: title}):
            yield _panel(title, _help(name), figures.curves(run.history, lines))


def _number_pairs(run: Run, field: str) -> tuple[list[figures.Pair], list[figures.Pair]]:
    """(true, predicted) of the answers that could be read: the model's, and the blind control's."""
    rows = run.answered.predictions if run.answered else []
    seen = [row["fields"].get(field) for row in rows]
    blind = [row["blind"]["fields"].get(field) for row in rows if row["blind"]]
    model, control = (
        [(score["target"], score["prediction"]) for score in scores if score and score["prediction"] is not None]
        for scores in (seen, blind)
    )
    return model, control


def _label_pairs(run: Run, field: str) -> list[tuple[str, str]]:
    scores = [row["fields"].get(field) for row in (run.answered.predictions if run.answered else [])]
    return [(str(score["target"]), str(score["prediction"])) for score in scores if score]


def _evaluation_table(run: Run) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """(column names, rows of (value, the blind control's value)); the first column is the step."""
    names = list(dict.fromkeys(name for step in run.evaluations for name in step.scores))
    names = [name for name in names if name.startswith("eval/") and not name.startswith("eval/blind/")]
    rows = []
    for step in run.evaluations:
        cells = [(f"{step.step:,}", "")]
        for name in names:
            blind = f"eval/blind/{name.removeprefix('eval/')}"
            cells.append(tuple(format_value(key, step.scores[key]) if key in step.scores else "" for key in (name, blind)))
        rows.append(cells)
    return ["step", *(name.removeprefix("eval/") for name in names)], rows


def _facts(run: Run) -> list[tuple[str, str]]:
    """What someone asks first about a run that is not theirs."""
    last: dict[str, float] = {}
    for row in run.history:
        last.update(row)
    names = ("train/samples", "train/tokens", "train/epoch", "run/world_size", "run/attempt", "data/quarantined")
    facts = [(lookup(name).help, format_value(name, last[name])) for name in names if name in last]
    if run.history:
        times = [datetime.fromtimestamp(run.history[place]["time"], UTC) for place in (0, -1)]
        facts = [("first row", f"{times[0]:%Y-%m-%d %H:%M} UTC"), ("last row", f"{times[1]:%Y-%m-%d %H:%M} UTC"), *facts]
    flat = dict(_flatten(run.config))
    facts += [(name, value) for name, value in flat.items() if "commit" in name or name.startswith("versions.")]
    facts += [(name, value) for name, value in flat.items() if name.startswith("data.") and "shard" in name]
    if (run.folder / "wandb-id").is_file():
        facts.append(("W&B", f"wandb leet {run.folder}/wandb (in a terminal), or `wandb sync` to upload"))
    return facts


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, its flat settings), the settings that stand alone first."""
    alone = [(name, _text_of_setting(value)) for name, value in config.items() if not isinstance(value, Mapping)]
    sections = [(name, list(_flatten(value))) for name, value in config.items() if isinstance(value, Mapping)]
    return [("general", alone), *sections] if alone else sections


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from _flatten(inner, f"{path}.{place}")
    else:
        yield path, _text_of_setting(value)


def _text_of_setting(value: Any) -> str:
    return "" if value is None else str(value)


def _measured(run: Run, lines: Mapping[str, str]) -> dict[str, str]:
    return {name: label for name, label in lines.items() if any(name in step.scores for step in run.evaluations)}


def _logged(run: Run, lines: Mapping[str, str]) -> dict[str, str]:
    return {name: label for name, label in lines.items() if any(name in row for row in run.history)}


def _help(*names: str) -> str:
    """The registry's words for what a panel draws, as a sentence."""
    text = "; ".join(metric.help for metric in map(lookup, names) if metric)
    return f"{text[:1].upper()}{text[1:]}."


def _panel(title: str, caption: str, svg: str) -> Panel:
    return Panel(title, caption, Markup(svg))
