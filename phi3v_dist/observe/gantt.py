"""Spans of time → bars on one line per rank or per attempt.

What comes in: the laps of one step on every rank, or the timeline of a run's attempts. What goes out: a panel each.
Surprise: of hundreds of ranks the slowest are drawn and some typical ones, and a line of thousands of spans is drawn
as at most `CELLS`, each in the colour of what filled most of it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phi3v_dist.observe import drawing
from phi3v_dist.observe.drawing import GRID, INK, KINDS, MUTED
from phi3v_dist.observe.metrics import format_seconds
from phi3v_dist.observe.rank_record import RankRecord
from phi3v_dist.observe.rank_record import Span as Lap
from phi3v_dist.observe.sections import WORDS, Panel
from phi3v_dist.survive.timeline import Span

MOST_RANKS, SLOWEST = 32, 16
MOST_ATTEMPTS = 24
CELLS = 400
LINE_IN, FRAME_IN = 0.2, 0.75  # inches: a line, and axis and legend around them
ORDER = ("productive", "data", "fwd", "bwd", "opt", "ckpt", "eval", "replay", "log", "init", "restore", "down", "other")
COLOURS = dict(
    productive=KINDS[0], data=KINDS[2], fwd=KINDS[0], bwd=KINDS[1], opt=KINDS[3], ckpt=KINDS[4], log=KINDS[5],
    init=KINDS[6], restore=KINDS[7], replay=KINDS[3], down=MUTED, other=GRID,
)  # fmt: skip
COLOURS["eval"] = KINDS[8]


def step_panel(record: RankRecord) -> Panel | None:
    """One step on every rank, or on the slowest and some typical ones; None where no laps were kept."""
    if not record.spans:
        return None
    began_s = min(begin for laps in record.spans.values() for _, begin, _ in laps)
    shown = _chosen(record)
    lines = {
        f"{rank}": [(what, begin - began_s, end - began_s) for what, begin, end in record.spans[rank]] for rank in shown
    }
    many = len(record.spans) > len(shown)
    caption = f"The last step that was looked at, {record.span_step:,}, lap by lap, on {len(shown)} ranks"
    caption += f" of {len(record.spans)}: the slowest and some typical ones." if many else "."
    if len({record.hosts.get(rank) for rank in shown}) > 1:
        caption += " Clocks of different nodes may differ by milliseconds."
    return Panel("One step, rank by rank", caption, Markup(_draw(lines, "rank", "seconds since its beginning", 1.0)))


def attempts_panel(spans: Sequence[Span]) -> Panel | None:
    """Where the wall time of the run went, a line for each attempt; None without spans."""
    if not spans:
        return None
    began_s, ended_s = min(span.begin_s for span in spans), max(span.end_s for span in spans)
    totals_s: dict[str, float] = defaultdict(float)
    lines: dict[str, list[Lap]] = {}
    newest = sorted({span.attempt for span in spans})[-MOST_ATTEMPTS:]
    for span in spans:
        totals_s[span.what] += span.end_s - span.begin_s
        if span.attempt in newest:
            laps = lines.setdefault(f"{span.attempt}", [])
            laps.append((span.what, span.begin_s - began_s, span.end_s - began_s))
    wall_s = max(ended_s - began_s, 1e-9)
    width_s = wall_s / CELLS
    lines = {name: _coarse(laps, width_s) for name, laps in lines.items()}
    scale, unit = next(((s, u) for s, u in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if wall_s > 2 * s),
                       (1.0, "seconds"))  # fmt: skip
    shares = {what: f"{WORDS.get(what, what)} {100 * total_s / wall_s:.3g} %" for what, total_s in totals_s.items()}
    caption = f"Wall time since the first launch, {format_seconds(wall_s)} in all, a line for each attempt"
    caption += f"; the newest {MOST_ATTEMPTS}." if len({span.attempt for span in spans}) > MOST_ATTEMPTS else "."
    svg = _draw(lines, "attempt", f"{unit} since the first launch", scale, shares)
    return Panel("Where the time went", caption, Markup(svg))


def _chosen(record: RankRecord) -> list[int]:
    """At most `MOST_RANKS` of those with laps: the slowest, and of the others those nearest to the median."""
    ranks = sorted(record.spans)
    if len(ranks) <= MOST_RANKS:
        return ranks
    row = np.nan_to_num(record.own_s[np.searchsorted(record.steps, record.span_step)], nan=0.0)
    own = dict(zip(record.ranks.tolist(), row.tolist(), strict=True))
    slowest = sorted(ranks, key=lambda rank: -own[rank])[:SLOWEST]
    middle = float(np.median([own[rank] for rank in ranks]))
    rest = sorted(set(ranks) - set(slowest), key=lambda rank: (abs(own[rank] - middle), rank))
    return sorted([*slowest, *rest[: MOST_RANKS - SLOWEST]])


def _coarse(laps: Iterable[Lap], width_s: float) -> list[Lap]:
    """The same line in cells, each what filled most of it; neighbours alike are one."""
    filled: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for what, begin, end in laps:
        for cell in range(int(begin / width_s), int(end / width_s) + 1):
            inside = min(end, (cell + 1) * width_s) - max(begin, cell * width_s)
            if inside > 0:
                filled[cell][what] += inside
    merged: list[Lap] = []
    for cell in sorted(filled):
        what, begin, end = max(filled[cell], key=filled[cell].__getitem__), cell * width_s, (cell + 1) * width_s
        if merged and merged[-1][0] == what and abs(merged[-1][2] - begin) < width_s / 2:
            merged[-1] = (what, merged[-1][1], end)
        else:
            merged.append((what, begin, end))
    return merged


def _draw(
    lines: Mapping[str, Sequence[Lap]], ylabel: str, xlabel: str, scale: float, labels: Mapping[str, str] | None = None
) -> str:
    kinds = {what for laps in lines.values() for what, _, _ in laps} | set(labels or {})
    known = [what for what in ORDER if what in kinds] + sorted(kinds - set(ORDER))
    spare = [kind for kind in KINDS if kind not in {COLOURS.get(what) for what in known}] or KINDS
    strangers = {what: spare[place % len(spare)] for place, what in enumerate(sorted(kinds - set(ORDER)))}
    colours = COLOURS | strangers

    def plot(axes: Axes) -> None:
        for place, laps in enumerate(lines.values()):
            for what in known:
                bars = [(begin / scale, (end - begin) / scale) for kind, begin, end in laps if kind == what]
                axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=colours[what], linewidth=0)
        every = -(-len(lines) // 16)
        axes.set_yticks(range(0, len(lines), every), list(lines)[::every])
        axes.set(ylim=(len(lines) - 0.4, -0.6), xlabel=xlabel, ylabel=ylabel, xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.short(value)))
        axes.grid(visible=False, axis="y")
        axes.tick_params(colors=INK)
        handles = [Patch(color=colours[what]) for what in known]
        axes.legend(handles, names, ncols=drawing.legend_columns(names), **drawing.LEGEND)

    names = [drawing.shortened((labels or {}).get(what, WORDS.get(what, what))) for what in known]
    legend_in = drawing.ROW_IN * -(-len(names) // drawing.legend_columns(names))
    return drawing.draw(plot, FRAME_IN + legend_in + LINE_IN * len(lines))
