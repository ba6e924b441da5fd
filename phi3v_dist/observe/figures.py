"""Series of a run → the report's figures of any metric: lines, stacks, points.

What comes in: `Line`s. What goes out: SVG text. Surprise: a history of any length is drawn as at most `BUCKETS` points
per line, each the mean of its bucket over a shade from its least to its largest value, so that nothing is hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from phi3v_dist.observe import drawing
from phi3v_dist.observe.drawing import INK, KINDS, LINE_STYLES, MUTED, TINTS
from phi3v_dist.observe.metrics import Number

BUCKETS = 140  # points per curve
FEW = 40  # values that can be told apart as dots


class Series(NamedTuple):
    """steps, values [points]: finite numbers in the order of steps."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    sparse: logged seldom, so its points are shown. blind: of the control that cannot see: grey.
    """

    label: str
    series: Series
    sparse: bool = False
    blind: bool = False


def lines(
    drawn: Sequence[Line], unit: str, takeovers: Sequence[Number] = (), log_y: bool = False,
    reachable: Number | None = None,
) -> str:  # fmt: skip
    """Curves over steps. reachable: the best that can be had, as a dashed line."""
    above_zero = all((line.series.values > 0).all() for line in drawn)

    def plot(axes: Axes) -> None:
        seeing = [line for line in drawn if not line.blind]
        num_dense = sum(not line.sparse for line in seeing)
        for place, line in enumerate(seeing):
            colours = KINDS if len(seeing) > 3 else TINTS
            after_dense = line.sparse and num_dense
            colour = INK if after_dense else colours[place % len(KINDS) if len(seeing) > 3 else min(place, 2)]
            _line(axes, line, colour, line.label, LINE_STYLES[place % len(LINE_STYLES)])
        for place, line in enumerate(line for line in drawn if line.blind):
            label = "blind control" if place == 0 else None  # the grey lines share one legend entry
            _line(axes, line, MUTED, label, LINE_STYLES[place % len(LINE_STYLES)])
        if reachable is not None:
            axes.axhline(reachable, color=INK, linestyle=LINE_STYLES[1], linewidth=1, label="best reachable")
        if unit == "field":
            axes.set_ylim(bottom=0)
        drawing.steps_axis(axes, takeovers)
        drawing.unit_axis(axes, unit, log_y and above_zero)
        drawing.legend(axes)

    return drawing.draw(plot, drawing.height_with([line.label for line in drawn]))


def stack(drawn: Sequence[Line], unit: str, takeovers: Sequence[Number] = (), share: bool = False) -> str:
    """Parts of a whole over steps; `share`: of 100 %. Between its points a line is taken to be straight."""
    steps = np.unique(np.concatenate([line.series.steps for line in drawn]))
    heights = np.array([np.interp(steps, *line.series) for line in drawn])  # [lines, steps]
    if share:
        heights = heights / np.maximum(heights.sum(axis=0), 1e-12)
    places = drawing.buckets(len(steps), BUCKETS)
    centres = [float(steps[bucket].mean()) for bucket in places]
    means = np.array([[float(row[bucket].mean()) for bucket in places] for row in heights])
    if len(centres) == 1:  # a single point has no area
        centres, means = [centres[0] - 0.5, centres[0] + 0.5], np.repeat(means, 2, axis=1)

    def plot(axes: Axes) -> None:
        colours = [KINDS[place % len(KINDS)] for place in range(len(drawn))]
        axes.stackplot(centres, means, labels=[line.label for line in drawn], colors=colours, lw=0)
        drawing.steps_axis(axes, takeovers)
        drawing.unit_axis(axes, "frac" if share else unit)
        axes.set_ylim(bottom=0)
        drawing.legend(axes)

    return drawing.draw(plot, drawing.height_with([line.label for line in drawn]))


def _line(axes: Axes, line: Line, colour: str, label: str | None, dashes: Any) -> None:
    steps, values = line.series
    if line.sparse and len(steps) <= BUCKETS:
        dots: dict[str, Any] = {"marker": "o", "markersize": 4 if len(steps) <= FEW else 2, "linewidth": 1.2}
        axes.plot(steps, values, color=colour, linestyle=dashes, label=label, **dots)
        return
    places = drawing.buckets(len(steps), BUCKETS)
    centres = [float(steps[bucket].mean()) for bucket in places]
    lows, highs = [values[bucket].min() for bucket in places], [values[bucket].max() for bucket in places]
    if len(steps) > BUCKETS:
        axes.fill_between(centres, lows, highs, color=colour, alpha=0.18, linewidth=0)
    means = [float(values[bucket].mean()) for bucket in places]
    axes.plot(centres, means, color=colour, linestyle=dashes, label=label, marker="o" if len(means) == 1 else None)
