"""A run folder → `report.html`: one page that needs nothing else, for whoever paid for the run.

What comes in: `runs/<name>/`. What goes out: headline, answers with their pictures, the layout's sections with their
figures, facts. Surprise: the page has no script and may fetch nothing (its own security policy says so), so it can be
mailed, printed and opened in ten years. Text of samples goes through the template's escaping and can do nothing.
"""

import base64
import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from phi3v_dist.errors import ConfigError
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe import facts, gantt, hard_samples, heatmap
from phi3v_dist.observe.answers import ANSWERS_NAME, answer_table
from phi3v_dist.observe.changes import CHANGES_NAME, Changes, answers_of, changes, read_answers
from phi3v_dist.observe.gallery import gallery, shown
from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.panels import part_panels, result_panels
from phi3v_dist.observe.rank_record import RankRecord, read_ranks
from phi3v_dist.observe.ranking import described
from phi3v_dist.observe.run_folder import Run, read_run
from phi3v_dist.observe.score_table import COLUMNS as SCORE_COLUMNS
from phi3v_dist.observe.score_table import score_rows
from phi3v_dist.observe.sections import Section, sections
from phi3v_dist.observe.verdict import sentence, tiles
from phi3v_dist.survive.timeline import timeline

logger = logging.getLogger(__name__)

FIRST = ("evaluation", "long")  # what a run is worth stands before how it went
REPORT_NAME = "report.html"
SCRIPT_NAME = "table_script.js.j2"
MOST_NOTES = 20


def write_report(run_folder: Path) -> Path:
    """Make RUN/report.html out of what is in the folder; what is missing or damaged is named on the page.

    Raises:
        ConfigError: not a run folder, or the page cannot be written there.
    """
    run = read_run(run_folder)
    record = read_ranks(run.folder, run.notes)
    pages = write_pages_of_answers(run)
    context = {
        "name": run.name,
        "pages": pages,
        "order": described(run.answered.predictions) if run.answered else "",
        "status": _status(run),
        "sentence": sentence(run),
        "tiles": tiles(run),
        "gallery": gallery(run.answered) if run.answered else {},
        "sections": _sections(run, record),
        "guilty": heatmap.guilty_ranks(record)[: heatmap.NAMED] if record else None,
        "scores": score_rows(run.final),
        "score_columns": SCORE_COLUMNS,
        "evaluations": facts.evaluation_table(run),
        "hard": hard_samples.hard_samples(run),
        "hard_ranges": hard_samples.ranges(),
        "quarantine": facts.quarantine_reasons(run),
        "planned": facts.planned_and_measured(run),
        "facts": facts.facts(run),
        "settings": facts.settings(run.config),
        "shown": shown,
    }
    notes = [*_missing(run), *run.notes]
    for note in notes:
        logger.warning("%s: %s", run_folder, note)
    more = [f"… and {len(notes) - MOST_NOTES} more notes."] if len(notes) > MOST_NOTES else []
    path = run.folder / REPORT_NAME
    return write_page("report.html.j2", path, {**context, "missing": [*notes[:MOST_NOTES], *more]})


def write_changes(before: Path, now: Path, path: Path) -> Path:
    """Make the page of what changed between two evaluations, by their folders or by their runs'.

    Raises:
        ConfigError: one of them has no answers, or the page cannot be written.
    """
    notes: list[str] = []
    found = changes(read_answers(before, notes), read_answers(now, notes))
    return _write_changes(found, path, "", notes)


def write_pages_of_answers(run: Run) -> dict[str, str]:
    """Pages beside the report: file name → what its link is called."""
    if run.answered is None:
        return {}
    context = {
        "name": run.name, "step": run.answered.step, "table": answer_table(run.answered), "report": REPORT_NAME,
    }  # fmt: skip
    write_page("answers.html.j2", run.folder / ANSWERS_NAME, context | _script())
    pages = {ANSWERS_NAME: "All answers"}
    kept = [evaluation for evaluation in run.evaluations if evaluation.predictions][-2:]
    if len(kept) == 2:
        before, now = (answers_of(evaluation, run.name) for evaluation in kept)
        _write_changes(changes(before, now), run.folder / CHANGES_NAME, REPORT_NAME, [])
        pages[CHANGES_NAME] = f"What changed since step {kept[0].step:,}"
    return pages


def _write_changes(found: Changes, path: Path, report: str, notes: list[str]) -> Path:
    context = {"changes": found, "report": report, "missing": [*notes, *found.notes], "shown": shown}
    return write_page("changes.html.j2", path, context | _script())


def _script() -> dict[str, Any]:
    """The pages' script, and the digest by which a browser knows that it may run."""
    script = (Path(__file__).parent / SCRIPT_NAME).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_digest": Markup(digest)}


def write_page(template: str, path: Path, context: dict[str, Any]) -> Path:
    """Fill a template of this folder; half surrogates, which a damaged file may hold, are spelled out.

    Raises:
        ConfigError: the page cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template).render(written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **context)
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{path}: the page cannot be written: {error}") from error
    return path


def _sections(run: Run, record: RankRecord | None) -> list[Section]:
    """The layout's, with what only this page has: figures of answers, of ranks and of attempts."""
    found = {section.id: section for section in sections(run)}
    found["evaluation"].panels[:0] = result_panels(run)
    found["long"].panels += part_panels(run)
    if record is not None:
        step = gantt.step_panel(record)
        found["cluster"].panels += [*heatmap.rank_panels(record), *([step] if step else [])]
    if attempts := gantt.attempts_panel(timeline(run.folder)):
        found["survival"].panels.insert(0, attempts)
    return sorted(found.values(), key=lambda section: section.id not in FIRST)


def _status(run: Run) -> str:
    train = run.config.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    if run.summary:
        return f"finished at step {run.summary.get(STEP, run.last_step):,.0f}"
    if not run.history:
        return "not started"
    said = f"not finished: last seen at step {run.last_step:,}"
    return said + (f" of {planned:,}" if isinstance(planned, int) else "")


def _missing(run: Run) -> list[str]:
    """What is not there, and how to get it."""
    command = f"`{as_typed('deepspeed launch/train.py')} --config YOUR.yaml run.name={run.name}`"
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
