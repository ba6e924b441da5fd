"""A run folder that is being written → what a person watches in a terminal, over ssh, from the files alone.

What comes in: `metrics.jsonl`, `ranks/`, the markers of the end. What goes out: one block of text, again and again on a
terminal, once on a pipe. Surprise: only what was appended since the last look is read, so that watching a run of a
million rows costs what its newest rows cost; and the run never notices, for nothing is written.
"""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from phi3v_dist.attempt.attempt import ATTEMPTS_NAME, STOPPED_NAME, SUMMARY_NAME
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe.metrics import (
    ATTEMPT,
    STEP,
    Number,
    format_number,
    format_seconds,
    format_value,
    is_own_score,
    lookup,
)
from phi3v_dist.observe.run_folder import CONFIG_NAME, require_run_folder
from phi3v_dist.observe.tracker import RECORD_NAME, parse_row
from phi3v_dist.printable import printable

LOSS, STEP_S = "train/loss", "time/step_s"
PARTS = ("data", "fwd", "bwd", "opt", "ckpt", "log")
BARS = "▁▂▃▄▅▆▇█"
SPARKS, BAR_WIDTH = 56, 16
KEPT_ROWS = 4000  # losses in the sparkline
RECENT = 50  # steps from which the pace is taken
WARNINGS = 4
SILENT_S, SILENT_STEPS = 60.0, 20  # a run without a new row for both is worth a look
TAIL_BYTES = 65_536

# What in a row is worth a warning: (metric, whether its value is, what to say).
WORRIES: tuple[tuple[str, Callable[[Number], bool], str], ...] = (
    ("train/spike", lambda value: value > 0, "loss far above its last steps"),
    ("health/straggler_score_min", lambda value: value < 0.85, "slowest rank at {} of the median's pace"),
    ("data/stall_pct", lambda value: value > 10, "{} of the step spent waiting for data"),
    ("mem/alloc_retries/sum", lambda value: value > 0, "{} times the allocator emptied its cache: memory is short"),
    ("gpu/temp_c/max", lambda value: value >= 87, "hottest GPU at {} °C"),
    (LOSS, math.isnan, "loss is not finite"),
)


@dataclass
class Record:
    """What is known of `metrics.jsonl` so far; `read` takes in what was appended since.

    latest: the last value of every metric. losses: (step, loss) that survive. paces: (step, time) of the last steps.
    """

    path: Path
    latest: dict[str, Number] = field(default_factory=dict)
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT_ROWS))
    paces: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    scores: dict[str, Number] = field(default_factory=dict)
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=WARNINGS))
    _offset: int = 0
    _quarantined: Number = 0
    _skipped: Number = 0
    _worried: set[str] = field(default_factory=set)

    def read(self) -> None:
        """Raises nothing: a file that is not there yet, or is torn, has no more rows."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:  # cut by a new attempt, or made anew
                self.__init__(self.path)  # type: ignore[misc]
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(size - self._offset)
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.split(b"\n")[:-1]:
            try:
                self._take(parse_row(line))
            except (ValueError, RecursionError):
                continue  # the report names damaged lines

    def _take(self, row: dict[str, Number]) -> None:
        step = int(row[STEP])
        if row[ATTEMPT] > self.latest.get(ATTEMPT, 0):
            self.losses = deque((one for one in self.losses if one[0] < step), maxlen=KEPT_ROWS)
            self.paces.clear()
        self._worry(step, row)
        self.latest |= {name: value for name, value in row.items() if not math.isnan(value) or name == LOSS}
        if LOSS in row:
            self.losses.append((step, row[LOSS]))
        if STEP_S in row:
            self.paces.append((step, row["time"]))
        scores = {name: value for name, value in row.items() if name.startswith("eval/") and not math.isnan(value)}
        if scores:
            self.scores = {STEP: step, **scores}

    def _worry(self, step: int, row: dict[str, Number]) -> None:
        """Say each thing when it begins, and again only after it was well in between."""
        for name, is_bad, said in WORRIES:
            if name in row:
                if is_bad(row[name]) and name not in self._worried and step > 1:
                    value = row[name] if math.isnan(row[name]) else format_value(name, row[name])
                    self.warnings.append(f"step {step:,}: {said.format(value)}")
                (self._worried.add if is_bad(row[name]) else self._worried.discard)(name)
        for name, what in (("data/quarantined", "bad samples left out"), ("train/skipped_steps", "steps skipped")):
            if row.get(name, 0) > self.latest.get(name, 0):
                self.warnings.append(f"step {step:,}: {row[name]:,.0f} {what} so far")


def watch(run: Path, console: Console, every_s: float) -> None:
    """Show a run until it is finished or stopped, or until Ctrl-C; on a pipe once.

    Raises:
        ConfigError: not a run folder.
    """
    require_run_folder(run)
    record = Record(run / RECORD_NAME)
    record.read()
    if not console.is_terminal:
        console.print(block(run, record, time.time()))
        return
    try:
        with Live(block(run, record, time.time()), console=console, auto_refresh=False) as live:
            while not _has_ended(run):
                time.sleep(every_s)
                record.read()
                live.update(block(run, record, time.time()), refresh=True)
    except KeyboardInterrupt:
        return


def block(run: Path, record: Record, now_s: float) -> RenderableType:
    """Everything that is known, a line or two for each thing; 80 columns are enough."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in _lines(run, record, now_s):
        table.add_row(name, said if isinstance(said, Text) else Text(said))
    head = Text(f"{printable(run.resolve().name)} · {_state(run, record, now_s)}", style="bold")
    return Group(head, table)


def _lines(run: Path, record: Record, now_s: float) -> Iterator[tuple[str, str | Text]]:
    latest = record.latest
    planned = _planned_steps(run)
    if not latest:
        yield "step", f"none yet{f' of {planned:,}' if planned else ''}"
        return
    yield "step", _progress(record, planned)
    if record.losses:
        yield "loss", f"{_sparkline([loss for _, loss in record.losses])} {format_number(record.losses[-1][1])}"
    if speed := latest.get("perf/tokens_per_s_per_gpu"):
        mfu = f", MFU {format_value('perf/mfu', latest['perf/mfu'])}" if "perf/mfu" in latest else ""
        ranks = f" on {latest['run/world_size']:,.0f} ranks" if "run/world_size" in latest else ""
        yield "speed", f"{format_number(speed)} tokens/s per process{ranks}{mfu}"
    if parts := _parts(latest):
        yield "a step", parts
    if slowest := _slowest(run, latest):
        yield "slowest", slowest
    if goodput := _goodput(latest):
        yield "goodput", goodput
    if record.scores:
        yield "evaluation", _scores(record.scores)
    for place, warning in enumerate(record.warnings):
        yield "warnings" if place == 0 else "", Text(warning, style="yellow")


def _state(run: Path, record: Record, now_s: float) -> str:
    """From the files alone, so that it works on a login node."""
    if (run / SUMMARY_NAME).is_file():
        return "finished"
    if (run / STOPPED_NAME).is_file():
        return "stopped; the same command goes on"
    attempt = f"attempt {record.latest[ATTEMPT]:.0f}, " if ATTEMPT in record.latest else ""
    if "time" not in record.latest:
        began = any((run / ATTEMPTS_NAME).glob("*")) if (run / ATTEMPTS_NAME).is_dir() else False
        return "starting: no step is done yet" if began else "has not begun"
    age_s = max(0.0, now_s - record.latest["time"])
    limit_s = max(SILENT_S, SILENT_STEPS * record.latest.get(STEP_S, 0.0))
    seen = f"{attempt}last row {format_seconds(round(age_s))} ago"
    return f"running, {seen}" if age_s < limit_s else f"silent: {seen}; see {as_typed('launch/diagnose.py')} {run}"


def _has_ended(run: Path) -> bool:
    return (run / SUMMARY_NAME).is_file() or (run / STOPPED_NAME).is_file()


def _progress(record: Record, planned: int | None) -> str:
    step = int(record.latest[STEP])
    if not planned:
        return f"{step:,}"
    filled = min(BAR_WIDTH, round(BAR_WIDTH * step / planned))
    said = f"{step:,} of {planned:,} {'█' * filled}{'░' * (BAR_WIDTH - filled)} {100 * step / planned:.0f} %"
    if len(record.paces) < 2 or step >= planned:
        return said
    (first, began_s), (last, ended_s) = record.paces[0], record.paces[-1]
    if last <= first or ended_s <= began_s:
        return said
    left_s = (ended_s - began_s) / (last - first) * (planned - step)
    ends = datetime.fromtimestamp(record.latest["time"] + left_s)
    return f"{said}, {format_seconds(round(left_s))} left (until {ends:%a %H:%M})"


def _sparkline(values: list[float]) -> str:
    """Means of equal stretches; a gap where nothing was finite."""
    size = max(1, -(-len(values) // SPARKS))
    stretches = [[v for v in values[at : at + size] if math.isfinite(v)] for at in range(0, len(values), size)]
    means = [statistics.fmean(stretch) if stretch else math.nan for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "×" * len(means)
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / ((high - low) or 1.0)
    return "".join(BARS[round((mean - low) * scale)] if math.isfinite(mean) else "×" for mean in means)


def _parts(latest: dict[str, Number]) -> str:
    """The window's means over ranks where they are logged, else rank 0's last step."""
    names = {part: f"time/{part}_s/mean" for part in PARTS}
    if not any(name in latest for name in names.values()):
        names = {part: f"time/{part}_s" for part in PARTS}
    seconds = {part: latest[name] for part, name in names.items() if name in latest}
    total_s = sum(seconds.values()) or latest.get(STEP_S, 0.0)
    shares = ", ".join(f"{part} {100 * s / total_s:.0f} %" for part, s in seconds.items()) if total_s > 0 else ""
    return f"{format_seconds(total_s)}{f': {shares}' if shares else ''}" if total_s else ""


def _slowest(run: Path, latest: dict[str, Number]) -> str:
    if "health/slowest_rank" not in latest:
        return ""
    rank = int(latest["health/slowest_rank"])
    host = _host_of(run, rank)
    ratio = latest.get("health/straggler_ratio")
    slow = latest.get("health/slow_ranks", 0)
    said = f"rank {rank}{f' on {printable(host)}' if host else ''}"
    said += f", {ratio:.2f} times the median's own time" if ratio is not None else ""
    return said + (f"; {slow:.0f} slow ranks" if slow else "")


def _host_of(run: Path, rank: int) -> str:
    """The node whose newest line has this rank; empty where no node wrote one."""
    found = (0.0, "")
    for path in (run / "ranks").glob("*.jsonl"):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                line = json.loads(file.read().split(b"\n")[-2])
            if rank in line["ranks"]:
                found = max(found, (float(line["time"]), str(line["host"])))
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
            continue  # being written, or longer than what was read
    return found[1]


def _goodput(latest: dict[str, Number]) -> str:
    if "goodput/productive_pct" not in latest:
        return ""
    lost = {name: value for name, value in latest.items() if name.startswith("goodput/lost_") and value > 0}
    worst = sorted(lost, key=lambda name: -lost[name])[:3]
    names = [name.removeprefix("goodput/lost_").removesuffix("_s") for name in worst]
    said = ", ".join(f"{name} {format_seconds(lost[full])}" for name, full in zip(names, worst, strict=True))
    productive = format_value("goodput/productive_pct", latest["goodput/productive_pct"])
    return f"{productive} of the wall time{f'; lost: {said}' if said else ''}"


def _scores(scores: dict[str, Number]) -> str:
    spoken = [name for name in scores if is_own_score(name) and (metric := lookup(name)) and metric.panel]
    pairs = [f"{name.removeprefix('eval/')} {format_value(name, scores[name])}" for name in spoken]
    return f"step {scores[STEP]:,.0f}: {', '.join(pairs)}"


def _planned_steps(run: Path) -> int | None:
    try:
        steps = yaml.safe_load((run / CONFIG_NAME).read_text())["train"]["steps"]
        return steps if isinstance(steps, int) and steps > 0 else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
