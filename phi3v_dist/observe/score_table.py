"""Final numbers of an evaluation → one table: the model, itself untuned and blind, and how far it is from both.

What comes in: `{metric name: number}`, as `scores.json` or `summary.json` has it. What goes out: rows of words.
Surprise: two columns of intervals that overlap say nothing about a difference; the columns of differences do, since
they compare sample by sample (`evaluate/intervals.py`). One that holds 0 is within what chance explains.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from rich.console import Console
from rich.table import Table

from phi3v_dist.observe.metrics import Number, format_number, format_value, is_own_score, lookup

COLUMNS = ("", "model", "untuned", "blind", "− untuned", "− blind", "best reachable")
LEFT_OUT = ("eval/samples", "eval/skipped")
WIDTH = 140  # characters, where there is no terminal that says how wide it is


@dataclass(frozen=True)
class ScoreRow:
    """One metric; empty where there is no such number. Intervals are of 95 %."""

    metric: str
    model: str
    untuned: str
    blind: str
    minus_untuned: str
    minus_blind: str
    best: str


def score_rows(numbers: Mapping[str, Number]) -> list[ScoreRow]:
    """Rows in the registry's names, those of parts (`eval.by`) left out."""
    plain = [name for name in numbers if is_own_score(name) and name not in LEFT_OUT]
    return [
        ScoreRow(
            name.removeprefix("eval/"),
            _figure(numbers, name, ""),
            _figure(numbers, name, "base/"),
            _figure(numbers, name, "blind/"),
            _difference(numbers, name, "minus_base/"),
            _difference(numbers, name, "minus_blind/"),
            format_value(name, numbers[best]) if (best := name.replace("eval/", "eval/best_", 1)) in numbers else "",
        )  # fmt: skip
        for name in sorted(plain)
    ]


def printed(numbers: Mapping[str, Number]) -> Table | None:
    """The same for a terminal, without columns in which nothing stands; None without scores."""
    rows = [astuple(row) for row in score_rows(numbers)]
    used = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    if not rows:
        return None
    counts = [f"{numbers['eval/samples']:,.0f} samples"] if "eval/samples" in numbers else []
    has_intervals = any("(" in cell for row in rows for cell in row)
    table = Table(title=" · ".join(["scores, in brackets 95 % intervals" if has_intervals else "scores", *counts]))
    for place in used:
        table.add_column(COLUMNS[place], justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[place].replace(" (", "\n(") for place in used))
    return table


def widened(console: Console) -> Console:
    """The same console; into a file or a pipe, wide enough for the table."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def is_of_scores(name: str) -> bool:
    """Whether a number stands in the table, or would be one too many beside it."""
    return name.startswith("eval/") and name not in LEFT_OUT and not name.startswith("eval/chance_")


def _figure(numbers: Mapping[str, Number], name: str, side: str) -> str:
    name = name.replace("eval/", f"eval/{side}", 1)
    if name not in numbers:
        return ""
    low, high = (numbers.get(f"{name}/{end}") for end in ("low", "high"))
    value = format_value(name, numbers[name])
    if low is None or high is None:
        return value
    ends = (format_value(name, end).removesuffix(" %") for end in (low, high))
    return f"{value} ({' to '.join(ends)})"


def _difference(numbers: Mapping[str, Number], name: str, side: str) -> str:
    """As `+83.3 points (+78.1 to +88.0)`: of percent, points."""
    name = name.replace("eval/", f"eval/{side}", 1)
    if name not in numbers:
        return ""
    metric = lookup(name)
    unit = metric.unit if metric else ""
    scale = 100 if unit == "frac" else 1
    values = [numbers[name], *(numbers[end] for end in (f"{name}/low", f"{name}/high") if end in numbers)]
    one, *ends = (_signed(scale * value, is_share=unit in ("frac", "pct")) for value in values)
    said = f"{one} points" if unit in ("frac", "pct") else one
    return f"{said} ({' to '.join(ends)})" if ends else said


def _signed(value: Number, is_share: bool) -> str:
    plain = f"{abs(value):.1f}" if is_share else format_number(abs(value))
    return f"{'−' if value < 0 else '+'}{plain}"
