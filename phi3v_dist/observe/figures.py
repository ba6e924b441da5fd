"""Numbers of a run → the report's figures, as SVG text to put into a page.

What comes in: the surviving history (`read_metrics`), evaluations, predictions. What goes out: one `<svg>` each, in one
style. Surprise: the colours drawn here are placeholders. They are exchanged for CSS variables at the end, so that the
page, not the picture, decides how light and dark look; text stays text and can be searched.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from phi3v_dist.observe.metrics import ATTEMPT, STEP, Number, format_number, lookup

WIDTH_IN, HEIGHT_IN = 5.4, 3.1
ROW_CHARACTERS = 68  # of a legend, six per entry for its handle
BUCKETS = 160  # points per curve; a longer history is drawn as the mean and the range of each bucket

INK, MUTED, GRID, PAGE, ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
TINTS = ["#050505", "#060606", "#070707", "#080808", "#090909"]  # of the one accent, strong to faint
_THEME = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAGE: "--card", ACCENT: "--accent"},
    **{tint: f"--tint-{place}" for place, tint in enumerate(TINTS) if place > 0},
}
_STYLE: dict[Any, Any] = {
    **{"font.size": 9.5, "svg.fonttype": "none", "svg.hashsalt": "phi3v", "text.parse_math": False},
    **{"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"axes.edgecolor": GRID, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.6, "legend.frameon": False},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "axes.xmargin": 0.01},
    **{"legend.fontsize": 9, "legend.borderpad": 0, "legend.handlelength": 1.6},
}
LINE_STYLES: list[Any] = ["-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5))]

History = Sequence[Mapping[str, Number]]
Pair = tuple[Number, Number]  # (true, predicted)


def curves(history: History, lines: Mapping[str, str], marks: Mapping[str, str] | None = None) -> str:
    """Curves over steps. `lines`: metric name → label; `marks`: sparse metrics drawn as points on the same axis."""

    def plot(axes: Axes) -> None:
        for place, (name, label) in enumerate(lines.items()):
            style = {"color": TINTS[min(place, 2)], "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
            _curve(axes, *series(history, name), label=label, **style)
        for place, (name, label) in enumerate((marks or {}).items()):
            steps, values = series(history, name)
            axes.plot(steps, values, "o-", color=(INK, MUTED)[place % 2], markersize=4, linewidth=1, label=label)
        _unit_axis(axes, next(iter(lines)))
        _steps_axis(axes, history)
        _legend(axes)

    return draw(plot)


def step_time(history: History, parts: Mapping[str, str], total: str) -> str:
    """Where the seconds of a step go: parts stacked, and what they leave of the total as `other`."""
    rows = [row for row in history if total in row]
    steps, _ = series(rows, total)
    heights = [np.array([row.get(name, 0.0) for row in rows]) for name in parts]
    rest = np.clip(np.array([row[total] for row in rows]) - sum(heights), 0, None)
    buckets = _buckets(len(rows))
    centres = [float(np.mean(steps[bucket])) for bucket in buckets]
    stacked = [[float(np.mean(height[bucket])) for bucket in buckets] for height in [*heights, rest]]

    def plot(axes: Axes) -> None:
        axes.stackplot(centres, stacked, labels=[*parts.values(), "other"], colors=[*TINTS[: len(parts)], GRID], lw=0)
        axes.set_ylabel("seconds")
        _steps_axis(axes, history)
        _legend(axes)

    return draw(plot)


def evaluations(scores: History, lines: Mapping[str, str], reachable: Number | None = None) -> str:
    """Scores over steps in the accent, the same of the blind control in grey, the best reachable as a dashed line."""

    def plot(axes: Axes) -> None:
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        for place, (name, label) in enumerate(lines.items()):
            dashes, tint = LINE_STYLES[place % len(LINE_STYLES)], TINTS[min(place, 2)]
            axes.plot(*series(scores, name), color=tint, linestyle=dashes, zorder=3, label=label, **style)
        for place, name in enumerate(lines):
            steps, values = series(scores, f"eval/blind/{name.removeprefix('eval/')}")
            once = "blind control" if place == 0 and len(steps) else None  # the grey lines share one legend entry
            dashes = LINE_STYLES[place % len(LINE_STYLES)]
            axes.plot(steps, values, color=MUTED, linewidth=1.2, linestyle=dashes, label=once, **style)
        if reachable is not None:
            axes.axhline(reachable, color=INK, linestyle=LINE_STYLES[1], linewidth=1, label="best reachable")
        axes.set_ylim(bottom=0)
        _unit_axis(axes, next(iter(lines)))
        _steps_axis(axes, scores)
        _legend(axes)

    return draw(plot)


def error_histogram(pairs: Sequence[Pair], blind: Sequence[Pair], reachable: Number | None, label: str) -> str:
    """How absolute errors are distributed, the model's before the blind control's; lines at the two means.

    The axis is logarithmic, or the blind control's large errors would press all of the model's into one bar.
    """
    errors, blind_errors = ([abs(predicted - truth) for truth, predicted in points] for points in (pairs, blind))
    high = max(float(np.quantile([*errors, *blind_errors], 0.995)), 1e-9)
    low = min(max(float(np.quantile(errors, 0.05)), high / 1000), high / 10)
    bins = np.geomspace(low, high, 32)

    def plot(axes: Axes) -> None:
        for values, colour, name, alpha in ((blind_errors, MUTED, "blind", 0.35), (errors, ACCENT, "model", 0.75)):
            if values:
                axes.hist(np.clip(values, low, high), bins=bins.tolist(), color=colour, alpha=alpha, label=name)
                axes.axvline(float(np.mean(values)), color=colour, linewidth=1.4)
        if reachable is not None:
            axes.axvline(reachable, color=INK, linestyle=LINE_STYLES[1], linewidth=1, label="best reachable")
        axes.set(xscale="log", xlabel=f"absolute error of {label}", ylabel="samples")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=False, axis="x")
        _legend(axes)

    return draw(plot)


def scatter(pairs: Sequence[Pair], blind: Sequence[Pair], label: str) -> str:
    """True against predicted; on the diagonal an answer is right."""
    low, high = np.min([*pairs, *blind]), np.max([*pairs, *blind])

    def plot(axes: Axes) -> None:
        axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=LINE_STYLES[1])
        for points, colour, name, alpha in ((blind, MUTED, "blind control", 0.4), (pairs, ACCENT, "model", 0.75)):
            if points:
                truth, predicted = zip(*points, strict=True)
                axes.scatter(truth, predicted, s=13, color=colour, alpha=alpha, linewidths=0, label=name)
        axes.set(xlabel=f"true {label}", ylabel=f"predicted {label}")
        _legend(axes)

    return draw(plot)


def confusion(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> str:
    """Rows: the truth; columns: the answer; `other` for answers that are none of the labels."""
    columns = [*labels, "other"]
    counts = np.zeros((len(labels), len(columns)), dtype=int)
    for truth, answer in pairs:
        counts[labels.index(truth), columns.index(answer if answer in labels else "other")] += 1
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def plot(axes: Axes) -> None:
        for row, column in np.argwhere(counts):
            share = shares[row, column]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=ACCENT, alpha=0.12 + 0.88 * share, linewidth=0))
            colour = PAGE if share > 0.5 else INK
            axes.text(column + 0.5, row + 0.5, str(counts[row, column]), ha="center", va="center", color=colour)
        axes.set(xlim=(0, len(columns)), ylim=(len(labels), 0), xlabel="answered", ylabel="true")
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels)
        axes.grid(visible=False)

    return draw(plot, height_in=max(HEIGHT_IN, 1.2 + 0.28 * len(labels)))


def parts(
    bars: Mapping[str, Number], blind: Mapping[str, Number], chance: Number | None, name: str, xlabel: str, ylabel: str
) -> str:
    """One score for parts of the samples: a bar each, the blind control as a dash on it, guessing as a dashed line.

    bars, blind: label of a part → value of the metric `name`, whose unit the axis has.
    """
    places = {label: place for place, label in enumerate(bars)}

    def plot(axes: Axes) -> None:
        axes.bar(list(places.values()), list(bars.values()), width=0.62, color=ACCENT, alpha=0.75, label="model")
        seen = [(places[label], value) for label, value in blind.items() if label in places]
        if seen:
            at, values = zip(*seen, strict=True)
            axes.hlines(values, np.array(at) - 0.31, np.array(at) + 0.31, color=INK, label="blind control")
        if chance is not None:
            axes.axhline(chance, color=MUTED, linestyle=LINE_STYLES[1], linewidth=1.2, label="guessing")
        crowded = max(map(len, bars)) * len(bars) > ROW_CHARACTERS
        turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(list(places.values()), list(places), **turned)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        axes.grid(visible=False, axis="x")
        _unit_axis(axes, name)
        _legend(axes)

    return draw(plot)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """The mean of each bucket over the range of its values: smooth enough to read, nothing hidden."""
    buckets = _buckets(len(steps))
    centres = [float(steps[bucket].mean()) for bucket in buckets]
    lows, highs = [values[bucket].min() for bucket in buckets], [values[bucket].max() for bucket in buckets]
    axes.fill_between(centres, lows, highs, color=color, alpha=0.18, linewidth=0)
    axes.plot(centres, [float(values[bucket].mean()) for bucket in buckets], color=color, **style)


def _buckets(count: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), min(count, BUCKETS)) if count else []


def _steps_axis(axes: Axes, history: History) -> None:
    """Whole steps, and a dotted line where another attempt of the run took over."""
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
    axes.grid(visible=False, axis="x")
    for before, after in zip(history, history[1:], strict=False):
        if after.get(ATTEMPT, 0) > before.get(ATTEMPT, 0):
            axes.axvline(after[STEP], color=MUTED, linewidth=0.9, linestyle=LINE_STYLES[2])


def _unit_axis(axes: Axes, name: str) -> None:
    """Shares and rates start at zero, or noise would look like news; shares are written as percent."""
    metric = lookup(name)
    unit = metric.unit if metric else ""
    if unit in ("frac", "pct") or unit.endswith("/s"):
        axes.set_ylim(bottom=0)
    if unit in ("frac", "pct"):
        whole = 1.0 if unit == "frac" else 100.0
        axes.yaxis.set_major_formatter(PercentFormatter(whole))
        if axes.get_ylim()[1] > 0.5 * whole:
            axes.set_ylim(top=1.02 * whole)


def _legend(axes: Axes) -> None:
    """Above the drawing, in one row or two; a single curve needs none, its caption names it."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        characters = sum(len(label) for label in labels) + 6 * len(labels)
        columns = -(-len(labels) * min(characters, ROW_CHARACTERS) // characters)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=columns, borderaxespad=0, columnspacing=1.4)


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that hold a finite number under `name`."""
    points = [(row[STEP], row[name]) for row in history if np.isfinite(row.get(name, np.nan))]
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def draw(plot: Callable[[Axes], None], height_in: Number = HEIGHT_IN) -> str:
    """Run `plot` on fresh axes in the report's style; the SVG, with the page's colours and nothing to fetch."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts that matplotlib lacks
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        plot(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """Strip what HTML does not need (prologue, metadata, namespaces: all the addresses), exchange the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\s(width|height)="[0-9.]+pt"', "", svg, count=2)
    referenced = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found.group() if found.group(1) in referenced else "", svg)
    return re.sub(r"#0[1-9]0[1-9]0[1-9]", lambda found: f"var({_THEME[found.group()]})", svg)
