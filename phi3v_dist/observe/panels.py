"""A `Run` → the report's panels: each a figure, its title, and one sentence on how to read it.

Surprise: a panel appears only if its numbers were logged, so that every kind of run (no prices, no pictures, no
evaluation yet) gets a page without holes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from phi3v_dist.observe import figures
from phi3v_dist.observe.metrics import format_seconds, panel_metrics
from phi3v_dist.observe.run_folder import Run

STEP_PARTS = {"time/data_s": "data", "time/fwd_s": "forward", "time/bwd_s": "backward", "time/opt_s": "optimizer"}
HELD_UP = {"ckpt/blocked_s": "checkpoints", "time/eval_s": "evaluations"}
ANSWER_FORM = {"eval/stop_pct": "finished", "eval/parse_fail_pct": "unreadable"}
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


@dataclass(frozen=True)
class Panel:
    title: str
    caption: str
    svg: Markup


def result_panels(run: Run) -> Iterator[Panel]:
    """What the answers are worth, against the blind control."""
    scores = [evaluation.scores for evaluation in run.evaluations]
    for field in run.fields("number"):
        name = _capital(field)
        pairs, blind = _number_pairs(run, field)
        reachable = run.final.get(f"eval/best_{field}_mae")
        if pairs:
            caption = f"One dot per sample; on the dashed diagonal the {field} is exactly right."
            yield _panel(f"{name}: true against predicted", caption, figures.scatter(pairs, blind, field))
            caption = "How far off the answers are, on a logarithmic axis. Upright lines are means; left is better."
            histogram = figures.error_histogram(pairs, blind, reachable, field)
            yield _panel(f"{name} error against the blind control", caption, histogram)
        if lines := _logged(scores, {f"eval/{field}_mae": "model"}):
            caption = "Mean absolute error at each evaluation; down is better."
            yield _panel(f"{name} error over training", caption, figures.evaluations(scores, lines, reachable))
    if lines := _logged(scores, {f"eval/field_em/{field}": field for field in run.fields("exact")}):
        caption = "Share of samples answered exactly right at each evaluation; up is better."
        yield _panel("Exact match over training", caption, figures.evaluations(scores, lines))
    label = run.label_field()
    if label and (labels := _label_pairs(run, label)):
        caption = "Samples per cell; on the diagonal the answer is right. “Other” holds unreadable answers too."
        yield _panel(f"{_capital(label)}: true against answered", caption, figures.confusion(labels, run.truths(label)))
    if lines := _logged(scores, ANSWER_FORM):
        caption = "Share of answers that end by themselves, and of those whose fields cannot be read."
        yield _panel("Answer form over training", caption, figures.evaluations(scores, lines))
    yield from _part_panels(run)


def _part_panels(run: Run) -> Iterator[Panel]:
    """The last evaluation's scores by what `eval.by` names."""
    parts: dict[tuple[str, str], dict[str, str]] = {}  # (axis, metric) → label of a part → full name
    for name in run.final:
        if found := PART.fullmatch(name):
            axis, part, metric = found.groups()
            parts.setdefault((axis, metric), {})[_part_label(part)] = name
    for (axis, metric), names in parts.items():
        bars = {label: run.final[name] for label, name in names.items()}
        hidden = {label: f"eval/blind/{name.removeprefix('eval/')}" for label, name in names.items()}
        blind = {label: run.final[name] for label, name in hidden.items() if name in run.final}
        what, shown = PART_METRICS[metric.partition("/")[0]], metric.partition("/")[2].replace("_", " ")
        title = f"{_capital(f'{shown} {what.title}'.strip())} by {axis.replace('_', ' ')}"
        chance = run.final.get(f"eval/chance_{metric.removeprefix('field_em/')}")
        name = next(iter(names.values()))
        svg = figures.parts(bars, blind, chance, name, AXES.get(axis, axis.replace("_", " ")), what.unit)
        yield _panel(title, what.caption, svg)


def _part_label(part: str) -> str:
    """A part's piece of a metric's name, as a person reads it."""
    if bounds := re.fullmatch("from_(.+)_to_(.+)", part):
        low, high = (float(bound.replace("minus_", "-").replace("_", ".")) for bound in bounds.groups())
        return f"{low:,.10g} – {high:,.10g}"
    return part.removeprefix("is_")


def training_panels(run: Run) -> Iterator[Panel]:
    """How the optimisation went."""
    if lines := _logged(run.history, {"train/loss": "training"}):
        marks = _logged(run.history, {"eval/loss": "validation", "eval/blind/loss": "validation, blind"})
        yield _panel("Loss", "Mean loss per label token; down is better.", figures.curves(run.history, lines, marks))
    rates = {metric.name: metric.name.rpartition("/")[2] for metric in panel_metrics("Learning rate")}
    if lines := _logged(run.history, rates):
        caption = "Warmup and decay of each parameter group."
        yield _panel("Learning rate", caption, figures.curves(run.history, lines))
    yield from _plain_panels(run, "Gradient norm", "Label tokens")


def speed_panels(run: Run) -> Iterator[Panel]:
    """Where the time goes."""
    if _logged(run.history, {"time/step_s": ""}):
        held_s = {what: sum(row.get(name, 0.0) for row in run.history) for name, what in HELD_UP.items()}
        extra = ", ".join(f"{what} {format_seconds(total_s)}" for what, total_s in held_s.items() if total_s)
        caption = "Parts of one optimizer step." + (f" Beside the steps, in all: {extra}." if extra else "")
        yield _panel(
            "Step time", caption, figures.step_time(run.history, _logged(run.history, STEP_PARTS), "time/step_s")
        )
    yield from _plain_panels(run, "Throughput", "Images", "Packing", "Data wait", "Slowest rank")


def _plain_panels(run: Run, *titles: str) -> Iterator[Panel]:
    """Panels that draw one metric each, in the registry's words."""
    for title in titles:
        for metric in panel_metrics(title):
            if _logged(run.history, {metric.name: title}):
                svg = figures.curves(run.history, {metric.name: title})
                yield _panel(title, f"{_capital(metric.help)}.", svg)


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


def _logged(rows: figures.History, lines: Mapping[str, str]) -> dict[str, str]:
    """Those of `lines` (metric name → label) that any row holds a finite number for."""
    return {name: label for name, label in lines.items() if len(figures.series(rows, name)[0])}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _panel(title: str, caption: str, svg: str) -> Panel:
    return Panel(title, caption, Markup(svg))
