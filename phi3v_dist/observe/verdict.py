"""Final numbers of a run → what they mean: headline tiles, and a sentence that a person outside the field can read.

Surprise: every claim is made against the blind control (the same questions with the pictures exchanged), since a model
that has learnt the words of a catalogue scores well above zero without looking at anything.
"""

import math
import statistics
from dataclasses import dataclass

from phi3v_dist.observe.metrics import Number, format_number, format_seconds, format_value, lookup
from phi3v_dist.observe.run_folder import Run, is_number

THROUGHPUT = "perf/tokens_per_s_per_gpu"


@dataclass(frozen=True)
class Bar:
    """One of the figures compared in a tile; `share` of the longest bar, 0 to 1."""

    label: str
    value: str
    share: Number


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str
    bars: tuple[Bar, ...] = ()


def tiles(run: Run) -> list[Tile]:
    """The headline, best news first; only what was measured."""
    numbers = run.final
    found: list[Tile | None] = []
    if label := run.label_field():
        found.append(_compared(run, f"{label} right", f"field_em/{label}", _interval_note(run, label)))
    for field in run.fields("number"):
        found.append(_compared(run, f"{field} error", f"{field}_mae", "mean absolute error; shorter is better"))
    found.append(_compared(run, "Unreadable answers", "parse_fail_pct", "counted apart, never as an error of a field"))
    if "eval/stop_pct" in numbers:
        note = "end by themselves, within the length allowed"
        found.append(Tile("Finished answers", format_value("eval/stop_pct", numbers["eval/stop_pct"]), note))
    if speeds := run.series[THROUGHPUT].values.tolist() if THROUGHPUT in run.series else []:
        note = "per process, median over the steps"
        found.append(Tile("Speed", f"{format_number(statistics.median(speeds))} tokens/s", note))
    if run.history:
        attempts = "in one go" if run.attempts == 1 else f"in {run.attempts} attempts"
        found.append(Tile("Time", format_seconds(wall_seconds(run)), f"for {run.last_step:,} steps, {attempts}"))
    return [tile for tile in found if tile]


def sentence(run: Run) -> str:
    """The run in a few plain words: what it can do, against what, and whether that says that it looks."""
    if not run.history and not run.evaluations:
        return "Nothing has been logged yet, so there is nothing to see."
    numbers, parts = run.final, []
    label, who = run.label_field(), "the model"
    if label and f"eval/field_em/{label}" in numbers:
        right = format_value("eval/field_em/x", numbers[f"eval/field_em/{label}"])
        samples = f"{numbers['eval/samples']:,.0f} " if "eval/samples" in numbers else ""
        parts.append(f"Of {samples}validation samples the model gets the {label} of {right} right{_blind(run, label)}.")
        who = "it"
    for field in run.fields("number"):
        if f"eval/{field}_mae" in numbers:
            parts.append(f"On {field}, {who} is off by {_error(run, field)}.")
    if not parts:
        loss = run.last.get("train/loss", math.nan)
        scored = "No field of the answers was scored." if run.evaluations else "No evaluation yet."
        return f"{scored} After {run.last_step:,} steps the training loss is {format_number(loss)}."
    return " ".join([*parts, _conclusion(run, label)]).strip()


def wall_seconds(run: Run) -> Number:
    """Wall time as the run states it; else the time from first to last row of each attempt."""
    if "run/wall_s" in run.summary:
        return run.summary["run/wall_s"]
    if is_number(run.history[-1].get("run/wall_s")):
        return run.history[-1]["run/wall_s"]
    times: dict[Number, list[Number]] = {}
    for row in run.history:
        times.setdefault(row["run/attempt"], []).append(row["time"])
    return sum(max(span) - min(span) for span in times.values())


def _compared(run: Run, label: str, metric: str, note: str) -> Tile | None:
    """A tile whose bars set the model beside the blind control and, where known, the best reachable."""
    named = {
        "model": f"eval/{metric}",
        "untuned": f"eval/base/{metric}",
        "blind": f"eval/blind/{metric}",
        "best reachable": f"eval/best_{metric}",
    }
    values = {who: run.final[name] for who, name in named.items() if name in run.final}
    if "model" not in values:
        return None
    registered = lookup(named["model"])
    unit = registered.unit if registered else ""
    longest = max({"frac": 1.0, "pct": 100.0}.get(unit, 1e-9), *values.values())  # a share's bar is of the whole
    bars = tuple(Bar(who, format_value(named[who], value), value / longest) for who, value in values.items())
    return Tile(f"{label[:1].upper()}{label[1:]}", bars[0].value, note, bars)


def _ahead_of_blind(run: Run, field: str) -> tuple[float, float, float] | None:
    """(share right minus share right when blind, low, high), sample by sample; None where there is no interval."""
    name = f"eval/minus_blind/field_em/{field}"
    found = [run.final.get(part) for part in (name, f"{name}/low", f"{name}/high")]
    mean, low, high = found
    return None if mean is None or low is None or high is None else (mean, low, high)


def _interval_note(run: Run, field: str) -> str:
    if not (difference := _ahead_of_blind(run, field)):
        return "exact match"
    mean, low, high = (100 * value for value in difference)
    return f"exact match; {mean:+.0f} points on blind (95 % interval {low:+.0f} to {high:+.0f})"


def _blind(run: Run, label: str) -> str:
    blind = f"eval/blind/field_em/{label}"
    return f", and {format_value(blind, run.final[blind])} with the pictures exchanged" if blind in run.final else ""


def _error(run: Run, field: str) -> str:
    blind, best = (run.final.get(f"eval/{kind}{field}_mae") for kind in ("blind/", "best_"))
    against = [f"{format_number(blind)} with the pictures exchanged"] if blind is not None else []
    against += [f"{format_number(best)} at the very best"] if best is not None else []
    average = f"{format_number(run.final[f'eval/{field}_mae'])} on average"
    return average + (f", against {' and '.join(against)}" if against else "")


def _conclusion(run: Run, label: str | None) -> str:
    difference = _ahead_of_blind(run, label) if label else None
    if not difference:
        return ""
    if difference[1] > 0:
        return "The gap is wider than chance explains: the answers are read from the pictures."
    return "That is no better than chance explains: nothing shows yet that the pictures are read."
