"""A run folder → `report.html`: one page that needs nothing else, for whoever paid for the run.

What comes in: `runs/<name>/`. What goes out: headline, figures, answers with their pictures, facts. Surprise: the page
has no script and may fetch nothing (its own security policy says so), so it can be mailed, printed and opened in ten
years. Text of samples goes through the template's escaping and can do nothing.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phi3v_dist.observe.gallery import gallery
from phi3v_dist.observe.metrics import STEP, Number, format_value, lookup
from phi3v_dist.observe.panels import result_panels, speed_panels, training_panels
from phi3v_dist.observe.run_folder import Run, read_run
from phi3v_dist.observe.verdict import sentence, tiles
from phi3v_dist.planner.record import read_plan

logger = logging.getLogger(__name__)

RAN_WITH = re.compile(r"(^|\.)(versions\.\w+|commit)$")  # settings that say what the run ran with
COUNTS = ("train/samples", "train/tokens", "train/epoch", "run/world_size", "run/attempt", "data/quarantined")


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
        results=list(result_panels(run)),
        training=list(training_panels(run)),
        speed=list(speed_panels(run)),
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
    planned = (run.config.get("train") or {}).get("steps")
    if run.summary:
        return f"finished at step {run.summary.get(STEP, run.last_step):,.0f}"
    if not run.history:
        return "not started"
    return f"not finished: last seen at step {run.last_step:,}" + (f" of {planned:,}" if planned else "")


def _missing(run: Run) -> list[str]:
    """What is not there, and how to get it."""
    command = f"`deepspeed launch/train.py --config YOUR.yaml run.name={run.folder.resolve().name}`"
    notes = []
    if not run.history:
        notes.append(f"Nothing was logged yet: metrics.jsonl is missing or empty. To train: {command}.")
    elif not run.summary:
        notes.append(
            f"No summary.json: the run is still going, or was stopped. To continue it: {command}, as at first."
        )
    if run.history and not run.evaluations:
        notes.append("No evaluation yet, so there are no scores, no answers and no pictures on this page.")
    elif run.evaluations and not run.answered:
        notes.append("No predictions.jsonl was kept, so there are scores but no answers and no pictures.")
    return notes


def _evaluation_table(run: Run) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """(column names, rows of (value, the blind control's value)); the first column is the step."""
    names = list(dict.fromkeys(name for step in run.evaluations for name in step.scores))
    apart = ("eval/blind/", "eval/by_")  # beside their own, and in their own figures
    names = [name for name in names if name.startswith("eval/") and not name.startswith(apart)]
    rows = []
    for step in run.evaluations:
        cells = [(f"{step.step:,}", "")]
        for name in names:
            blind = f"eval/blind/{name.removeprefix('eval/')}"
            value, control = (
                format_value(key, step.scores[key]) if key in step.scores else "" for key in (name, blind)
            )
            cells.append((value, control))
        rows.append(cells)
    return ["step", *(name.removeprefix("eval/") for name in names)], rows


def _facts(run: Run) -> list[tuple[str, str]]:
    """What someone asks first about a run that is not theirs."""
    last: dict[str, Number] = {}
    for row in run.history:
        last.update(row)
    facts = []
    for what, ends in (("first step logged", run.history[:1]), ("last step logged", run.history[-1:])):
        facts += [(what, f"{datetime.fromtimestamp(row['time'], UTC):%Y-%m-%d %H:%M} UTC") for row in ends]
    for metric in filter(None, map(lookup, COUNTS)):
        if metric.name in last:
            facts.append((metric.help, format_value(metric.name, last[metric.name])))
    facts += _planned_and_measured(run, last)
    flat = dict(_flatten(run.config))
    facts += [(name.rpartition(".")[2], value) for name, value in flat.items() if RAN_WITH.search(name)]
    facts += [(name, value) for name, value in flat.items() if name.startswith("data.") and "shard" in name]
    if (run.folder / "wandb-id").is_file():
        facts.append(("W&B", f"wandb leet {run.folder}/wandb (in a terminal), or `wandb sync` to upload"))
    return facts


def _planned_and_measured(run: Run, last: Mapping[str, Number]) -> list[tuple[str, str]]:
    """What the planner said of a rank's memory beside what the GPU's allocator counted."""
    plan = read_plan(run.folder)
    if "traced_bytes" not in plan:
        return []
    planned, measured = plan["traced_bytes"] / 2**30, last.get("mem/alloc_peak_gib/max")
    said = "not measured (no GPU)" if measured is None else f"{measured:.2f} GiB ({planned / measured - 1:+.0%})"
    return [("memory of a rank's tensors at their peak, planned and measured", f"{planned:.2f} GiB; {said}")]


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
