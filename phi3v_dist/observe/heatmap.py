"""What every rank measured → maps of step × rank, and the ranks that hold the others up, by name.

What comes in: a `RankRecord`. What goes out: three panels and a table of guilty ranks. Surprise: ten thousand windows
of a thousand ranks are drawn as at most `COLUMNS` × `ROWS` cells, and each cell shows the worst that is in it, not the
mean: a single slow rank among hundreds keeps its line. In the map of waiting the worst is the *least*, since all others
wait for a slow rank.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phi3v_dist.observe import drawing
from phi3v_dist.observe.drawing import INK, TINTS
from phi3v_dist.observe.rank_record import COMPUTE, WAIT, RankRecord
from phi3v_dist.observe.sections import Panel
from phi3v_dist.observe.stragglers import EXCESS_OF_STEP, EXCESS_S, PATIENCE, SLOW, VERY_SLOW

COLUMNS, ROWS = 90, 64
ROW_IN, FEWEST_IN = 0.055, 1.9  # inches: of one row of cells, of the whole figure
SLOWER = (1.05, 1.0 / SLOW, 1.0 / VERY_SLOW, 2.0)  # times the median rank
SHARES = (0.02, 0.05, 0.1, 0.25)  # of a step; a loader that takes a tenth of it is worth a warning
WAITS = (0.05, 0.15, 0.3, 0.5)
NAMED = 8


@dataclass(frozen=True)
class Guilty:
    """A rank that others waited for. windows_frac: share of windows in which it was slow; ratio: its own time over the
    median rank's in those, and the worst; excess_in: where most of the difference was."""

    rank: int
    host: str
    windows_frac: float
    ratio: float
    worst: float
    excess_in: str
    first_step: int
    last_step: int


def rank_panels(record: RankRecord) -> Iterator[Panel]:
    """Own time, data time and waiting; a map that nobody measured is left out."""
    maps = (
        ("Own time: step × rank", relative_own(record), SLOWER, "×", np.nanmax,
         "Own time, data and computing without waits, as a multiple of the median rank's in the same window."),
        ("Time in the loader: step × rank", record.data_s / record.step_s, SHARES, "%", np.nanmax,
         "Share of a step in which a rank waited for its own loader."),
        ("Waiting: step × rank", record.of(WAIT) / record.step_s, WAITS, "%", np.nanmin,
         "Share of a step spent waiting in collectives. A pale line among dark ones is the rank they wait for."),
    )  # fmt: skip
    for title, table, limits, unit, worst, caption in maps:
        if np.isfinite(table).any():
            cells, steps = downsampled(table, record.steps, worst)
            yield Panel(title, f"{caption} {_said(table, cells)}", Markup(_draw(cells, steps, record, limits, unit)))


def relative_own(record: RankRecord) -> np.ndarray:
    """[windows, ranks]: own time over the median rank's; of an even number the lower one, so that of two ranks the
    slower has 1.3 when it takes 30 % longer."""
    own_s = record.own_s
    middle = np.sort(own_s, axis=1)[np.arange(len(own_s)), (np.isfinite(own_s).sum(axis=1) - 1) // 2]  # NaN sorts last
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(middle[:, None] > 0, own_s / middle[:, None], np.nan)


def guilty_ranks(record: RankRecord) -> list[Guilty]:
    """Those that were slow for some windows in a row, worst first."""
    ratio = relative_own(record)
    if ratio.shape[1] < 2:
        return []
    with np.errstate(invalid="ignore"):
        above_s = record.own_s * (1 - 1 / ratio)  # [windows, ranks]
        slow = (ratio > 1.0 / SLOW) & (above_s > np.fmax(EXCESS_S, EXCESS_OF_STEP * record.step_s))
    slow[0] = False  # in the first window ranks set up what later steps use
    needed = min(PATIENCE, len(slow))
    runs = np.lib.stride_tricks.sliding_window_view(slow, needed, axis=0).all(axis=-1).any(axis=0)  # [ranks]
    parts = {"loader": record.data_s, "computing": record.of(COMPUTE)}
    found = []
    for place in np.flatnonzero(runs):
        own = slow[:, place]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part that nobody measured has no median
            excess = {what: float(np.nanmean(table[own, place] - np.nanmedian(table[own], axis=1)))
                      for what, table in parts.items()}  # fmt: skip
        rank, steps = int(record.ranks[place]), record.steps[own]
        found.append(
            Guilty(
                rank, record.hosts.get(rank, ""), float(own.mean()), float(ratio[own, place].mean()),
                float(ratio[own, place].max()), max(excess, key=lambda what: np.nan_to_num(excess[what], nan=-1.0)),
                int(steps[0]), int(steps[-1]),
            )
        )  # fmt: skip
    return sorted(found, key=lambda guilty: -guilty.windows_frac * guilty.ratio)


def downsampled(table: np.ndarray, steps: np.ndarray, worst: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    """[windows, ranks] → ([ranks, windows] of at most ROWS × COLUMNS cells, their first steps)."""
    rows, columns = drawing.buckets(table.shape[1], ROWS), drawing.buckets(table.shape[0], COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell in which nothing was measured
        over_steps = np.array([worst(table[column], axis=0) for column in columns])  # [columns, ranks]
        cells = np.array([worst(over_steps[:, row], axis=1) for row in rows])
    return cells, np.array([steps[column[0]] for column in columns])


def _said(table: np.ndarray, cells: np.ndarray) -> str:
    windows, ranks = table.shape
    steps_each, ranks_each = -(-windows // cells.shape[1]), -(-ranks // cells.shape[0])
    if steps_each == ranks_each == 1:
        return ""
    return f"Each cell is the worst of {ranks_each} ranks × {steps_each} windows."


def _draw(
    cells: np.ndarray, steps: np.ndarray, record: RankRecord, limits: Sequence[float], unit: str
) -> str:  # fmt: skip
    """Cells of one shade are one path, runs of them one rectangle: a map is some kilobytes."""
    rows, columns = cells.shape
    levels = np.where(np.isfinite(cells), np.digitize(np.nan_to_num(cells), limits), -1)
    colours = TINTS[::-1]

    def plot(axes: Axes) -> None:
        for level, colour in enumerate(colours):
            if boxes := list(_runs(levels == level)):
                axes.add_patch(PathPatch(Outline.make_compound_path(*boxes), facecolor=colour, linewidth=0))
        axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="step", ylabel="rank")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: _at(steps, place)))
        firsts = np.array([record.ranks[row[0]] for row in drawing.buckets(len(record.ranks), rows)])
        axes.yaxis.set_major_locator(MaxNLocator(min(8, rows), integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda place, _: _at(firsts, place)))
        axes.grid(visible=False)
        axes.tick_params(colors=INK)
        handles = [
            Patch(color=colour, label=label) for colour, label in zip(colours, _ranges(limits, unit), strict=True)
        ]
        axes.legend(handles=handles, ncols=len(handles), **drawing.LEGEND | {"columnspacing": 0.8}, handlelength=0.9,
                    fontsize=8.5)  # fmt: skip

    return drawing.draw(plot, max(FEWEST_IN, 0.9 + ROW_IN * rows))


def _runs(mask: np.ndarray) -> Iterator[Outline]:
    """Rectangles, each a run of marked cells in one row, a little overlapping so that no seam shows."""
    for row, marked in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(int), [0]])))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            corners = [(begin, row), (end, row), (end, row + 1.02), (begin, row + 1.02), (begin, row)]
            yield Outline(corners, closed=True)


def _at(numbers: np.ndarray, place: float) -> str:
    return f"{int(numbers[int(place)]):,}" if place == int(place) and 0 <= place < len(numbers) else ""


def _ranges(limits: Sequence[float], unit: str) -> list[str]:
    scale = 100 if unit == "%" else 1
    said = [f"{scale * limit:.3g}" for limit in limits]
    between = [f"{low}–{high}" for low, high in zip(said, said[1:], strict=False)]
    return [f"<{said[0]}", *between, f"≥{said[-1]} {unit}"]
