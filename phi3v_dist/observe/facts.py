"""A run's settings, plan and lists → the report's tables: evaluations, plan against measured, quarantine, facts."""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from phi3v_dist.observe.metrics import Number, format_number, format_seconds, format_value, is_own_score, lookup
from phi3v_dist.observe.run_folder import Run, is_number, read_lines
from phi3v_dist.planner.record import read_plan
from phi3v_dist.printable import printable
from phi3v_dist.survive.best_file import read_best

RAN_WITH = re.compile(r"(^|\.)(versions\.\w+|commit)$")  # settings that say what the run ran with
COUNTS = ("train/samples", "train/tokens", "train/epoch", "run/world_size", "run/attempt", "data/quarantined")
QUARANTINE_NAME = "quarantine.jsonl"
MOST_LISTED, MOST_REASONS, REASON_CHARACTERS = 200_000, 12, 100
GIB = 2**30


class Planned(NamedTuple):
    """A quantity that was planned, measured, or both."""

    what: str
    planned: str
    measured: str
    difference: str


@dataclass(frozen=True)
class Reason:
    """Why samples were left out, and one of them."""

    reason: str
    stage: str
    count: int
    example: str


def evaluation_table(run: Run) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """(column names, rows of (value, the blind control's value)); the first column is the step."""
    names = list(dict.fromkeys(name for step in run.evaluations for name in step.scores))
    names = [name for name in names if is_own_score(name)]
    rows = []
    for step in run.evaluations:
        cells = [(f"{step.step:,}", "")]
        for name in names:
            blind = f"eval/blind/{name.removeprefix('eval/')}"
            value, control = (
                format_value(key, step.scores[key]) if key in step.scores else "" for key in (name, blind)
            )
            cells.append((value, control))
        rows.append(cells)
    return ["step", *(name.removeprefix("eval/") for name in names)], rows


def planned_and_measured(run: Run) -> list[Planned]:
    """What the planner said, as `RUN/plan.json` keeps it, beside what the run measured; empty without a plan.

    A plan of a run on CPUs says no more than memory; one that `launch/check.py --json` made has times too.
    """
    plan = read_plan(run.folder)
    found = []
    for what, paths, metric, size, unit in (
        ("memory of a rank's tensors at their peak", ("traced_bytes", "memory.traced"), "mem/alloc_peak_gib/max", GIB,
         "GiB"),
        ("memory of a rank, all that the allocator holds", ("peak_bytes", "memory.total"), "mem/reserved_peak_gib/max",
         GIB, "GiB"),
        ("a step", ("cost.step_s",), "time/step_s", 1.0, "s"),
        ("tokens a second, all ranks", ("cost.tokens_per_s",), "perf/tokens_per_s_per_gpu", 1.0, "tokens/s"),
    ):  # fmt: skip
        planned = next((value / size for path in paths if (value := _at(plan, path)) is not None), None)
        measured = _measured(run, metric)
        if plan and (planned is not None or measured is not None):
            found.append(_compared(what, planned, measured, unit, needs_gpu=metric.startswith("mem/")))
    return found


def quarantine_reasons(run: Run) -> list[Reason]:
    """Why samples could not be used, the most frequent first; words of the data with what does not show spelled out."""
    listed = read_lines(run.folder / QUARANTINE_NAME, _is_entry, run.notes, MOST_LISTED)
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for entry in listed:
        kind = (printable(entry["reason"])[:REASON_CHARACTERS], printable(str(entry.get("stage", ""))))
        counts[kind] += 1
        examples.setdefault(kind, printable(f"{entry.get('shard', '')}:{entry.get('key', '')}")[:REASON_CHARACTERS])
    if len(listed) == MOST_LISTED:
        run.notes.append(f"{run.folder / QUARANTINE_NAME}: only the first {MOST_LISTED:,} samples are counted")
    found = [Reason(*kind, count, examples[kind]) for kind, count in counts.most_common(MOST_REASONS)]
    if rest := len(counts) - len(found):
        others = sum(counts.values()) - sum(reason.count for reason in found)
        found.append(Reason(f"{rest} other reasons", "", others, ""))
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """What someone asks first about a run that is not theirs."""
    found = []
    for what, ends in (("first step logged", run.history[:1]), ("last step logged", run.history[-1:])):
        found += [(what, said) for row in ends if (said := _moment(row["time"]))]
    for metric in filter(None, map(lookup, COUNTS)):
        if metric.name in run.last:
            found.append((metric.help, format_value(metric.name, run.last[metric.name])))
    flat = dict(flatten(run.config))
    found += [(name.rpartition(".")[2], value) for name, value in flat.items() if RAN_WITH.search(name)]
    found += [(name, value) for name, value in flat.items() if name.startswith("data.") and "shard" in name]
    if best := read_best(run.folder / "checkpoints"):
        found.append(("best checkpoint", f"step {best.step:,}: {best.metric} {format_value(best.metric, best.value)}"))
    if (run.folder / "wandb-id").is_file():
        found.append(("W&B", f"wandb leet {run.folder}/wandb (in a terminal), or `wandb sync` to upload"))
    return found


def settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, its flat settings), the settings that stand alone first."""
    alone = [(str(name), _text(value)) for name, value in config.items() if not isinstance(value, Mapping)]
    sections = [(str(name), list(flatten(value))) for name, value in config.items() if isinstance(value, Mapping)]
    return [("general", alone), *sections] if alone else sections


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(`data.train.0.name`, its value as text) of a tree of settings."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from flatten(inner, f"{path}.{place}")
    else:
        yield path, _text(value)


def _at(tree: Any, path: str) -> float | None:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return float(tree) if is_number(tree) else None


def _measured(run: Run, metric: str) -> float | None:
    """The median step and speed, since the first steps are slow; of memory the most."""
    if metric not in run.series:
        return None
    values = run.series[metric].values
    if metric.startswith("mem/"):
        return float(values.max())
    ranks = run.last.get("run/world_size", 1) if metric.endswith("_per_gpu") else 1
    return statistics.median(values.tolist()) * ranks


def _compared(what: str, planned: float | None, measured: float | None, unit: str, needs_gpu: bool) -> Planned:
    def said(value: float | None, otherwise: str) -> str:
        if value is None:
            return otherwise
        return format_seconds(value) if unit == "s" else f"{format_number(value)} {unit}"

    both = planned is not None and measured is not None and planned > 0
    difference = f"{measured / planned - 1:+.0%}" if both and measured is not None and planned is not None else ""
    missing = "not measured (no GPU)" if needs_gpu else "not measured"
    return Planned(what, said(planned, "not planned"), said(measured, missing), difference)


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("reason"), str)


def _moment(unix_s: Number) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # a clock that was set to nothing
        return ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)
