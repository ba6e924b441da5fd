"""Answers of one evaluation → the figures that only answers have: scatter, errors, confusion, scores of parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from phi3v_dist.observe.drawing import (
    ACCENT,
    HEIGHT_IN,
    INK,
    LINE_STYLES,
    MUTED,
    PAGE,
    ROW_CHARACTERS,
    draw,
    legend,
    short,
    shortened,
    unit_axis,
)
from phi3v_dist.observe.metrics import Number, lookup

Pair = tuple[Number, Number]  # (true, predicted)


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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=False, axis="x")
        legend(axes)

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
        legend(axes)

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
        axes.set_xticks(
            np.arange(len(columns)) + 0.5,
            [shortened(name) for name in columns],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks(np.arange(len(labels)) + 0.5, [shortened(name) for name in labels])
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
        axes.set_xticks(list(places.values()), [shortened(label) for label in places], **turned)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        axes.grid(visible=False, axis="x")
        unit_axis(axes, metric.unit if (metric := lookup(name)) else "")
        legend(axes)

    return draw(plot)
