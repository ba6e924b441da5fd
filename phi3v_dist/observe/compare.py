"""Several run folders → one page: curves on common axes, final numbers with differences, settings that differ.

What comes in: two or more `Run`s. What goes out: `comparison.html`. Surprise: the first run is the one that the others
are compared with; a difference is marked as bad only where the registry knows which way is good.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from phi3v_dist.errors import ConfigError
from phi3v_dist.observe import figures, layout
from phi3v_dist.observe.facts import flatten
from phi3v_dist.observe.figures import Line
from phi3v_dist.observe.metrics import REGISTRY, STEP, Number, format_number, format_value, is_own_score, lookup
from phi3v_dist.observe.report import write_page
from phi3v_dist.observe.run_folder import Run, read_run
from phi3v_dist.observe.sections import BLIND, OF_PART, Panel, Section, capital, names_of

COMPARISON_NAME = "comparison.html"
MOST_RUNS = 12
OF_THE_RUN_ALONE = ("run.name", "run.folder", "run.id", "environment.started")
_PLACES = {metric.name: place for place, metric in enumerate(REGISTRY)}


@dataclass(frozen=True)
class Cell:
    """One run's final number. good: whether its difference from the first run's is for the better, None: neither."""

    value: str
    difference: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Row:
    name: str
    meaning: str
    cells: list[Cell]


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page that compares runs; default: `comparison.html` beside the first of them.

    Raises:
        ConfigError: fewer than two runs or too many, one of them is no run folder, or the page cannot be written.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs cannot be compared on one page: name 2 to {MOST_RUNS}")
    runs = [read_run(folder) for folder in folders]
    names = _names(runs)
    rows = final_rows(runs)
    path = out or folders[0].resolve().parent / COMPARISON_NAME
    context = {
        "names": names,
        "steps": [run.last_step for run in runs],
        "missing": [note for run in runs for note in run.notes][:MOST_RUNS],
        "sections": [section for layout_of in layout.SECTIONS if (section := _section(layout_of, runs, names)).panels],
        "rows": [row for row in rows if _is_headline(row.name)],
        "other_rows": [row for row in rows if not _is_headline(row.name)],
        "settings": differing_settings(runs),
    }
    return write_page("compare.html.j2", path, context)


def final_rows(runs: Sequence[Run]) -> list[Row]:
    """The last value of every metric that has a panel or stands in a summary, the first run's beside the others'."""
    last = [{**run.last, **run.final} for run in runs]
    names = {name for numbers in last for name in numbers if name != STEP and _is_compared(name)}
    rows = []
    for name in sorted(names, key=lambda name: (not name.startswith("eval/"), _PLACES.get(name, len(_PLACES)), name)):
        metric = lookup(name)
        if metric is None or (metric.panel is None and not any(name in run.summary for run in runs)):
            continue
        first = last[0].get(name)
        cells = [_cell(name, numbers.get(name), None if place == 0 else first) for place, numbers in enumerate(last)]
        rows.append(Row(name, metric.help, cells))
    return rows


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, each run's value) of those that are not alike everywhere."""
    flat = [dict(flatten(run.config)) if run.config else {} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = [(name, [settings.get(name, "–") for settings in flat]) for name in names if name not in OF_THE_RUN_ALONE]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _is_compared(name: str) -> bool:
    """Of evaluations what the model and its blind control scored."""
    return not name.startswith("eval/") or is_own_score(name.replace(BLIND, "eval/", 1))


def _is_headline(name: str) -> bool:
    return name.startswith(("eval/", "run/")) or name in {
        panel.tile for part in layout.SECTIONS for panel in part.panels
    }


def _section(section: layout.Section, runs: Sequence[Run], names: Sequence[str]) -> Section:
    panels = []
    for panel in section.panels:
        for name in _leading(panel, runs):
            drawn = [
                Line(label, run.series[name], sparse=panel.kind == "points")
                for label, run in zip(names, runs, strict=True)
                if name in run.series
            ]
            metric = lookup(name)
            assert metric is not None
            title = panel.title if name in _PLACES else f"{panel.title}: {name.partition('/')[2]}"
            svg = figures.lines(drawn, metric.unit, log_y=panel.log_y)
            panels.append(Panel(title, f"{capital(metric.help)}.", Markup(svg)))
    return Section(section.id, section.title, section.intro, [], panels)


def _leading(panel: layout.Panel, runs: Sequence[Run]) -> list[str]:
    """The metrics of a panel that are compared: its tile's, else the first that was logged. One line a run is enough
    for the eye; of fields that are answered each has its own figure."""
    if panel.kind == "media" or panel.title in ("Attempt", "World size"):
        return []
    logged = list(dict.fromkeys(name for run in runs for name in names_of(run, panel)))
    logged = [name for name in logged if not name.startswith(BLIND) and not OF_PART.fullmatch(name)]
    if panel.tile in logged:
        return [panel.tile]
    exact = [name for name in logged if name in _PLACES]
    return exact[:1] or logged[:4]


def _cell(name: str, value: Number | None, first: Number | None) -> Cell:
    if value is None:
        return Cell("–")
    said = format_value(name, value)
    if first is None or value == first:
        return Cell(said)
    metric = lookup(name)
    is_share = metric is not None and metric.unit in ("frac", "pct")
    change = value - first
    if is_share:
        difference = f"{change * (100 if metric and metric.unit == 'frac' else 1):+.1f} points"
    else:
        difference = f"{change / abs(first):+.1%}" if first else f"{'+' if change > 0 else ''}{format_number(change)}"
    better = metric.better if metric else None
    return Cell(said, difference, None if better is None else (change > 0) == (better == "up"))


def _names(runs: Sequence[Run]) -> list[str]:
    """Folders' names; those that are alike with as much of their path as tells them apart, or a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        paths = [run.folder.resolve() for run in runs]
        common = os.path.commonpath(paths) if len(set(paths)) > 1 else str(paths[0].parent)
        names = [os.path.relpath(path, common) for path in paths]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]
