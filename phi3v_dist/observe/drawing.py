"""Axes drawn by matplotlib → SVG text in the page's style.

What comes in: a function that draws on axes. What goes out: one `<svg>`. Surprise: the colours drawn here are
placeholders. They are exchanged for CSS variables at the end, so that the page, not the picture, decides how light and
dark look; text stays text and can be searched.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from phi3v_dist.observe.metrics import Number, format_number

WIDTH_IN, HEIGHT_IN = 4.8, 2.75  # so that 10 points are about 10 pixels on a phone
ROW_CHARACTERS = 58  # of a legend, six per entry for its handle
LABEL_CHARACTERS = 30  # of one entry
ROW_IN = 0.18  # inches

INK, MUTED, GRID, PAGE, ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
TINTS = [ACCENT, "#060606", "#070707", "#080808", "#090909"]  # of the one accent, strong to faint
KINDS = [ACCENT, *(f"#0b000{place}" for place in range(1, 9))]  # unlike each other, for parts of a whole
_THEME = {
    **{INK: "--ink", MUTED: "--muted", GRID: "--grid", PAGE: "--card", ACCENT: "--accent"},
    **{tint: f"--tint-{place}" for place, tint in enumerate(TINTS) if place > 0},
    **{kind: f"--kind-{place}" for place, kind in enumerate(KINDS) if place > 0},
}
_STYLE: dict[Any, Any] = {
    **{"font.size": 10.5, "svg.fonttype": "none", "svg.hashsalt": "phi3v", "text.parse_math": False},
    **{"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"axes.edgecolor": GRID, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0},
    **{"lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 10, "legend.borderpad": 0},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "axes.xmargin": 0.01},
    **{"legend.handlelength": 1.5, "legend.handletextpad": 0.5},
}
COUNTED = ("rank", "ranks", "restarts", "attempts", "processes", "flag", "steps", "retries", "samples")  # whole numbers
LINE_STYLES: list[Any] = ["-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5))]
LEGEND: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.01), "borderaxespad": 0, "columnspacing": 1.2}


def draw(plot: Callable[[Axes], None], height_in: Number = HEIGHT_IN) -> str:
    """Run `plot` on fresh axes in the report's style; the SVG, with the page's colours and nothing to fetch."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts that matplotlib lacks
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        plot(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_page(text.getvalue())


def steps_axis(axes: Axes, takeovers: Sequence[Number] = ()) -> None:
    """Whole steps, and a dotted line where another attempt of the run took over."""
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(visible=False, axis="x")
    for step in takeovers:
        axes.axvline(step, color=MUTED, linewidth=0.9, linestyle=LINE_STYLES[2])


def unit_axis(axes: Axes, unit: str, log_y: bool = False) -> None:
    """Shares and rates start at zero, or noise would look like news; shares are written as percent."""
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    if unit in ("frac", "pct"):
        whole = 1.0 if unit == "frac" else 100.0
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value / whole:.4g} %"))
        if axes.get_ylim()[0] >= 0:  # a difference of shares may be below
            axes.set_ylim(bottom=0, top=1.02 * whole if 0.5 * whole < axes.get_ylim()[1] <= 1.1 * whole else None)
    elif unit.endswith("/s"):
        axes.set_ylim(bottom=0)
    elif unit in COUNTED:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def legend(axes: Axes) -> None:
    """Above the drawing, in as few rows as the words need; a single curve needs none, its caption names it."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        words = [shortened(label) for label in labels]
        axes.legend(handles, words, ncols=legend_columns(words), **LEGEND)


def legend_columns(labels: Sequence[str]) -> int:
    """As many as there is room for."""
    return max(1, min(len(labels), ROW_CHARACTERS // (max(map(len, labels), default=0) + 6)))


def height_with(labels: Sequence[str]) -> float:
    """Inches of a figure whose legend has these entries, so that many rows leave room for the drawing."""
    words = [shortened(label) for label in labels]
    return HEIGHT_IN + ROW_IN * max(0, -(-len(words) // legend_columns(words)) - 1 if words else 0)


def shortened(label: str) -> str:
    """Names of data and hosts may be of any length."""
    return label if len(label) <= LABEL_CHARACTERS else f"{label[: LABEL_CHARACTERS - 1]}…"


def short(value: Number) -> str:
    """`12k`, `3.5M`: a tick's number in as little room as it can have."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:.4g}{letter}"
    return format_number(value)


def _for_page(svg: str) -> str:
    """Strip what HTML does not need (prologue, metadata, namespaces: all the addresses), exchange the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\s(width|height)="[0-9.]+pt"', "", svg, count=2)
    referenced = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found.group() if found.group(1) in referenced else "", svg)
    svg = re.sub(r'\sd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)  # finer than sight
    return re.sub("|".join(_THEME), lambda found: f"var({_THEME[found.group()]})", svg)


def buckets(count: int, most: int) -> list[np.ndarray]:
    """Places 0 to `count`, in at most `most` parts of equal size."""
    return np.array_split(np.arange(count), min(count, most)) if count else []
