"""The layout and the registry → the report's sections: every panel whose numbers were logged, drawn.

What comes in: a `Run`. What goes out: `Section`s of `Panel`s and tiles. Surprise: no metric is named here. What a panel
draws, how its lines are called and what its axis is follow from the registry, so that one line there is enough for a
new figure here, and a panel without numbers leaves no hole.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from phi3v_dist.observe import figures, layout
from phi3v_dist.observe.figures import Line
from phi3v_dist.observe.metrics import PLACEHOLDER, REGISTRY, Metric, Number, format_value, lookup
from phi3v_dist.observe.run_folder import Run

MAX_LINES = 8  # in one figure; of sixty nodes those with the largest values are shown
SPOKEN = ("tokens/s", "tokens", "nats", "samples", "steps", "ranks", "restarts", "GiB", "rows")  # units said in tiles
LONG_CAPTION = 190  # characters; longer ones are folded away
BLIND = "eval/blind/"
OF_PART = re.compile(r"eval/(?:blind/)?by_([a-z0-9_]+)/([a-z0-9_]+)/(.+)")
WORDS = {
    "fwd": "forward", "bwd": "backward", "opt": "optimizer", "ckpt": "checkpoint", "log": "bookkeeping",
    "attn": "attention", "p50": "median", "p99": "99th percentile", "eval": "validation", "train": "training",
    "alloc": "tensors", "mae": "error", "init": "start-up", "mfu": "MFU",
}  # fmt: skip
_PLACES = {metric.name: place for place, metric in enumerate(REGISTRY)}


@dataclass(frozen=True)
class Panel:
    """A figure with its title and one sentence on how to read it. terms: (line, what it is), folded away."""

    title: str
    caption: str
    svg: Markup
    terms: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figure:
    """The last value of a metric, as a section's tile."""

    label: str
    value: str
    unit: str
    note: str


@dataclass
class Section:
    """One section of the page."""

    id: str
    title: str
    intro: str
    tiles: list[Figure] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)


def sections(run: Run) -> list[Section]:
    """All of the layout's sections in its order, also those without a panel: the page has more for some of them."""
    found = []
    for section in layout.SECTIONS:
        panels = [drawn for panel in section.panels for drawn in _panels(run, panel)]
        tiles = [_tile(run, panel) for panel in section.panels if panel.tile in run.last]
        found.append(Section(section.id, section.title, section.intro, tiles, panels))
    return found


def names_of(run: Run, panel: layout.Panel) -> list[str]:
    """The logged metrics that a panel draws: the registry's order, names with a field sorted, blind controls last."""
    names = [name for name in run.series if (metric := lookup(name)) and metric.panel == panel.title]
    return sorted(names, key=lambda name: (name.startswith(BLIND), _PLACES.get(name, len(_PLACES)), name))


def labels_of(names: Sequence[str]) -> list[str]:
    """What tells the names of one figure apart: the words that not all of them have."""
    exact = all(name in _PLACES for name in names)  # a name of the data, such as a source's, stays whole
    pieces = [re.split("[/_]" if exact else "/", name) for name in names]
    shared = set.intersection(*map(set, pieces)) if len(names) > 1 else set(pieces[0])
    labels = []
    for name, words in zip(names, pieces, strict=True):
        if part := OF_PART.fullmatch(name):
            labels.append(part_label(part.group(2)))
            continue
        rest = [WORDS.get(word, word) for word in words if word not in shared]
        labels.append(" ".join(rest) or _whole(name))
    return labels


def part_label(part: str) -> str:
    """A part's piece of a metric's name, as a person reads it."""
    if bounds := re.fullmatch("from_(minus_)?([0-9_e]+)_to_(minus_)?([0-9_e]+)", part):
        signs, numbers = bounds.group(1, 3), bounds.group(2, 4)
        try:
            low, high = (
                float(number.replace("_", ".")) * (-1 if sign else 1)
                for sign, number in zip(signs, numbers, strict=True)
            )
        except ValueError:
            return part.replace("_", " ")
        return f"{low:,.10g} – {high:,.10g}"
    return part.removeprefix("is_").replace("_", " ")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _panels(run: Run, panel: layout.Panel) -> Iterator[Panel]:
    """One figure, or one for each field and each way of parting where the values of several have no common axis."""
    if panel.kind == "media":
        return
    groups: dict[str, list[str]] = {}
    for name in names_of(run, panel):
        groups.setdefault(_group(name), []).append(name)
    for group, names in groups.items():
        title = f"{panel.title}: {group}" if group else panel.title
        yield _draw(run, panel, title, names)


def _group(name: str) -> str:
    if part := OF_PART.fullmatch(name):
        what = part.group(3).removeprefix("field_em/").replace("_", " ")
        return f"{what}, by {part.group(1).replace('_', ' ')}"
    metric = lookup(name)
    plain = name.removeprefix(BLIND).removeprefix("eval/").rpartition("_")[0]
    return plain.replace("_", " ") if metric and metric.unit == "field" else ""


def _draw(run: Run, panel: layout.Panel, title: str, names: list[str]) -> Panel:
    metrics = [metric for name in names if (metric := lookup(name))]
    labels = labels_of(names)
    drawn = [
        Line(label, run.series[metric.name], _is_sparse(panel, metric), metric.name.startswith(BLIND))
        for label, metric in zip(labels, metrics, strict=True)
    ]
    caption, terms = _caption(panel, metrics, labels)
    if len(drawn) > MAX_LINES and panel.kind not in ("area", "share"):
        caption += f" The {MAX_LINES} with the largest values of {len(drawn)}."
        drawn = sorted(drawn, key=lambda line: -line.series.values.max())[:MAX_LINES]
    unit = metrics[0].unit
    if panel.kind in ("area", "share") and len(drawn) > 1:
        svg = figures.stack(drawn, unit, run.takeovers, share=panel.kind == "share")
    else:
        svg = figures.lines(drawn, unit, run.takeovers, panel.log_y, _reachable(run, metrics))
    return Panel(title, caption, Markup(svg), terms)


def _caption(
    panel: layout.Panel, metrics: Sequence[Metric], labels: Sequence[str]
) -> tuple[str, list[tuple[str, str]]]:
    """What is drawn, in which unit, which way is good; and what each line is, if that takes more than a sentence."""
    directions = {metric.better for metric in metrics}
    better = f", {directions.pop()} is better" if len(directions) == 1 and None not in directions else ""
    spoken = [metric for metric in metrics if not metric.name.startswith(BLIND)] or list(metrics)
    family = [metric for metric in layout.metrics_of(panel) if not metric.name.startswith(BLIND)]
    if len(spoken) > 1 and len(family) == 1:  # lines that differ by a name of the data have one meaning
        spoken = [replace(family[0], help=PLACEHOLDER.sub(r"each \1", family[0].help))]
    stems = list(dict.fromkeys(metric.help.partition(";")[0] for metric in spoken))
    unit = {"field": "the field's own unit", "frac": "%", "pct": "%", "s": "seconds"}.get(
        spoken[0].unit, spoken[0].unit
    )
    if len(stems) == 1:
        return f"{capital(stems[0])} ({unit}{better}).", []
    said = [(label, metric.help) for label, metric in zip(labels, metrics, strict=True) if metric in spoken]
    words = "; ".join(f"{label}: {stem}" for (label, _), stem in zip(said, stems, strict=False))
    if len(stems) == len(said) and len(words) < LONG_CAPTION:
        return f"{capital(words)} ({unit}{better}).", []
    return f"{capital(unit)}{better}.", said


def _is_sparse(panel: layout.Panel, metric: Metric) -> bool:
    return panel.kind == "points" or metric.cadence in ("checkpoint", "evaluation")


def _reachable(run: Run, metrics: Sequence[Metric]) -> Number | None:
    """The best value that the data's noise allows, if the run knows it."""
    best = [metric.name.replace("eval/", "eval/best_", 1) for metric in metrics if metric.name.startswith("eval/")]
    return next((run.final[name] for name in best if name in run.final), None)


def _whole(name: str) -> str:
    """For a line whose name has nothing that the others lack."""
    metric = lookup(name)
    if name.startswith("eval/"):
        return "model"
    return (
        "each step"
        if metric and metric.cadence == "step"
        else WORDS.get(last := name.rpartition("/")[2], last.replace("_", " "))
    )


def _tile(run: Run, panel: layout.Panel) -> Figure:
    assert panel.tile is not None
    metric = lookup(panel.tile)
    assert metric is not None, f"the tile {panel.tile} is not in the registry"
    said = format_value(panel.tile, run.last[panel.tile])
    return Figure(panel.title, said, metric.unit if metric.unit in SPOKEN else "", metric.help)
