"""A `Run` → the panels that only its answers have: scatter, errors, confusion, scores of parts.

Surprise: a panel appears only if its numbers were logged, so that every kind of run (no prices, no pictures, no
evaluation yet) gets a page without holes.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from markupsafe import Markup

from phi3v_dist.observe import result_figures
from phi3v_dist.observe.result_figures import Pair
from phi3v_dist.observe.run_folder import Run
from phi3v_dist.observe.sections import Panel, capital, part_label

PART = re.compile(r"eval/by_([a-z0-9_]+)/([a-z0-9_]+)/(loss|field_em/[a-z0-9_]+)")
AXES = {"position": "position in the document, tokens", "depth": "where the answer stands (0: beginning, 1: end)"}


class PartMetric(NamedTuple):
    """How a score of parts is called."""

    title: str
    caption: str
    unit: str


PART_METRICS = {
    "loss": PartMetric("loss", "Mean loss of the label tokens of each part; down is better.", "nats"),
    "field_em": PartMetric(
        "right", "Share of samples answered exactly right in each part, at the last evaluation; up is better.", ""
    ),
}


def result_panels(run: Run) -> Iterator[Panel]:
    """What the answers are worth, against the blind control."""
    for field in run.fields("number"):
        name = capital(field)
        pairs, blind = _number_pairs(run, field)
        reachable = run.final.get(f"eval/best_{field}_mae")
        if pairs:
            caption = f"One dot per sample; on the dashed diagonal the {field} is exactly right."
            yield _panel(f"{name}: true against predicted", caption, result_figures.scatter(pairs, blind, field))
            caption = "How far off the answers are, on a logarithmic axis. Upright lines are means; left is better."
            histogram = result_figures.error_histogram(pairs, blind, reachable, field)
            yield _panel(f"{name} error against the blind control", caption, histogram)
    label = run.label_field()
    if label and (labels := _label_pairs(run, label)):
        caption = "Samples per cell; on the diagonal the answer is right. “Other” holds unreadable answers too."
        yield _panel(
            f"{capital(label)}: true against answered", caption, result_figures.confusion(labels, run.truths(label))
        )


def part_panels(run: Run) -> Iterator[Panel]:
    """The last evaluation's scores by what `eval.by` names."""
    parts: dict[tuple[str, str], dict[str, str]] = {}  # (axis, metric) → label of a part → full name
    for name in run.final:
        if found := PART.fullmatch(name):
            axis, part, metric = found.groups()
            parts.setdefault((axis, metric), {})[part_label(part)] = name
    for (axis, metric), names in parts.items():
        bars = {label: run.final[name] for label, name in names.items()}
        hidden = {label: f"eval/blind/{name.removeprefix('eval/')}" for label, name in names.items()}
        blind = {label: run.final[name] for label, name in hidden.items() if name in run.final}
        what, shown = PART_METRICS[metric.partition("/")[0]], metric.partition("/")[2].replace("_", " ")
        title = f"{capital(f'{shown} {what.title}'.strip())} by {axis.replace('_', ' ')}"
        chance = run.final.get(f"eval/chance_{metric.removeprefix('field_em/')}")
        name = next(iter(names.values()))
        svg = result_figures.parts(bars, blind, chance, name, AXES.get(axis, axis.replace("_", " ")), what.unit)
        yield _panel(title, what.caption, svg)


def _number_pairs(run: Run, field: str) -> tuple[list[Pair], list[Pair]]:
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


def _panel(title: str, caption: str, svg: str) -> Panel:
    return Panel(title, caption, Markup(svg))
