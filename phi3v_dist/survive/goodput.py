"""A run's record, or a list of moments at which things fail → goodput, and where the rest of the time went.

What comes in: a run folder (`measured`), or failure times and costs (`simulate`). What goes out: `Goodput`. Goodput is
the time spent in optimizer steps that the final weights contain, divided by wall time since the first launch.

Surprise: a checkpoint written in the background counts only when its write is done, and until then a failure costs the
interval before it too. So a slow writer costs work at each failure although no step ever waits for it.
"""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.invocation import as_typed
from phi3v_dist.observe.metrics import ATTEMPT, STEP, Number
from phi3v_dist.observe.tracker import read_metrics, read_rows
from phi3v_dist.survive.timeline import BLOCKED_S, EVAL_S, SAVE_S, STEP_S, Span, parts, timeline

__all__ = ["Costs", "Goodput", "Span", "costs_of", "measured", "parts", "poisson", "simulate", "timeline"]

ROUNDING = 1e-9  # of a count of steps: 0.3 s are three steps of 0.1 s


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went; all in seconds.

    wall_s: since the first launch. useful_s: in steps that the final weights contain.
    lost_s: in whole steps that a failure took back. blocked_s: training held up by saves. evaluate_s: by evaluations.
    restart_s: from each launch to its first step, the first launch included. import_s: the part of that in which Python
        imports, as far as it is known. The rest is steps cut short, waiting for a launch, and the loop's own work.
    """

    wall_s: float
    useful_s: float
    lost_s: float
    blocked_s: float
    restart_s: float
    num_launches: int
    num_lost_steps: int
    evaluate_s: float = 0.0
    import_s: float = 0.0

    @property
    def frac(self) -> float:
        """0 to 1."""
        return self.useful_s / self.wall_s if self.wall_s else 0.0

    @property
    def frac_without_imports(self) -> float:
        """The same, of the wall time in which Python did not import."""
        rest_s = self.wall_s - self.import_s
        return self.useful_s / rest_s if rest_s > 0 else 0.0

    @property
    def lost_min_per_day(self) -> float:
        return (1 - self.frac) * 24 * 60


@dataclass(frozen=True)
class Costs:
    """What a run's steps, saves and restarts take, in seconds.

    blocked_s: training stands still for a save. write_s: it then takes in the background.
    restart_s: from a failure, or the first launch, to the step that follows.
    between_s: from one step to the next, without saves: the loop's own work.
    """

    step_s: float
    blocked_s: float
    write_s: float
    restart_s: float
    between_s: float = 0.0


def poisson(mean_between_failures_s: float, total_s: float, seed: int) -> list[float]:
    """Moments in [0, total_s) at which something fails, independent of each other."""
    draw, moment_s, moments = random.Random(seed), 0.0, []
    while (moment_s := moment_s + draw.expovariate(1 / mean_between_failures_s)) < total_s:
        moments.append(moment_s)
    return moments


def simulate(
    failure_times_s: Sequence[float], costs: Costs, total_s: float, interval_s: float, every_steps: int | None = None,
    restarts_s: Sequence[float] = (),
) -> Goodput:  # fmt: skip
    """A run of `total_s` seconds of wall time that is launched at 0 and again after each failure.

    Args:
        failure_times_s: since the first launch, in order; one may come while the run restarts from the one before.
        interval_s: from the beginning of one save to that of the next, rounded up to whole steps and to the end of the
            write before. every_steps: given, this is the interval.
        restarts_s: of the first launches, where each is known; `costs.restart_s` of the others.
    """
    period_s = costs.step_s + costs.between_s
    wanted = math.ceil((interval_s - costs.blocked_s) / period_s - ROUNDING) if every_steps is None else every_steps
    num_steps = max(1, wanted, math.ceil(costs.write_s / period_s - ROUNDING))  # from save to save
    cycle_s = num_steps * period_s + costs.blocked_s
    borders_s = [0.0, *(moment_s for moment_s in failure_times_s if 0 < moment_s < total_s), total_s]
    kept = num_lost = 0
    blocked_s = restart_s = 0.0
    for number, (begin_s, end_s) in enumerate(zip(borders_s, borders_s[1:], strict=False)):
        starting_s = min(restarts_s[number] if number < len(restarts_s) else costs.restart_s, end_s - begin_s)
        restart_s += starting_s
        running_s = end_s - begin_s - starting_s
        num_cycles = math.floor(running_s / cycle_s + ROUNDING)
        rest_s = max(0.0, running_s - num_cycles * cycle_s)
        done = num_cycles * num_steps + min(num_steps, math.floor(rest_s / period_s + ROUNDING))
        blocked_s += num_cycles * costs.blocked_s + max(0.0, rest_s - num_steps * period_s)
        is_end = number == len(borders_s) - 2
        safe = done if is_end else num_steps * max(0, math.floor((running_s - costs.write_s) / cycle_s + ROUNDING))
        kept, num_lost = kept + safe, num_lost + done - safe
    return Goodput(
        wall_s=total_s, useful_s=kept * costs.step_s, lost_s=num_lost * costs.step_s, blocked_s=blocked_s,
        restart_s=restart_s, num_launches=len(borders_s) - 1, num_lost_steps=num_lost,
    )  # fmt: skip


def measured(run_folder: Path, import_s: float | None = None) -> Goodput:
    """The goodput of a run up to its last sign of life, from its timeline; all that it then held counts as kept.

    import_s: seconds in which Python imported, if they were measured outside; default: what attempts wrote down.

    Raises:
        ConfigError: not a run folder, or no step of it is done.
        DataError: an attempt's file cannot be read.
    """
    steps, owners = _steps(run_folder), _owners(run_folder)
    kept = [row for row in read_metrics(run_folder) if STEP_S in row]
    spans = timeline(run_folder)
    seconds = parts(spans)
    if import_s is None:
        import_s = math.fsum(owner.get("import_s", 0.0) for owner in owners.values())
    return Goodput(
        wall_s=math.fsum(seconds.values()),
        useful_s=seconds["productive"] + seconds["data"],
        lost_s=seconds["replay"],
        blocked_s=seconds["ckpt"],
        evaluate_s=seconds["eval"],
        restart_s=seconds["init"] + seconds["restore"],
        num_launches=len(_starts(steps).keys() | owners.keys()),
        num_lost_steps=len(steps) - len(kept),
        import_s=import_s,
    )


def costs_of(run_folder: Path) -> Costs:
    """What a run's steps, saves and restarts took: means of steps and saves, the median restart.

    Raises:
        ConfigError: not a run folder, or no step of it is done.
        DataError: an attempt's file cannot be read.
    """
    rows, steps, owners = _rows(run_folder), _steps(run_folder), _owners(run_folder)
    saves = [row for row in rows if BLOCKED_S in row]
    pauses = (BLOCKED_S, EVAL_S)  # after steps with one of them came a save or an evaluation
    paused = {row[STEP] for row in rows if any(name in row for name in pauses)}
    between = [
        after["time"] - after[STEP_S] - before["time"]
        for before, after in itertools.pairwise(steps)
        if before[ATTEMPT] == after[ATTEMPT] and before[STEP] not in paused
    ]
    restarts = [
        start_s - owners[number]["pid_started"] for number, start_s in _starts(steps).items() if number in owners
    ]
    return Costs(
        step_s=mean(row[STEP_S] for row in steps),
        blocked_s=mean(row[BLOCKED_S] for row in saves) if saves else 0.0,
        write_s=mean(row[SAVE_S] - row[BLOCKED_S] for row in saves) if saves else 0.0,
        restart_s=median(restarts) if restarts else 0.0,
        between_s=max(0.0, mean(between)) if between else 0.0,
    )


def _rows(run_folder: Path) -> list[dict[str, Number]]:
    rows = read_rows(run_folder)
    if not any(STEP_S in row for row in rows):
        found = "no step in it is done" if rows else "it has no metrics.jsonl"
        raise ConfigError(
            f"{run_folder} cannot say what a run costs: {found}. Name a folder that {as_typed('launch/train.py')} made"
        )
    return rows


def _steps(run_folder: Path) -> list[dict[str, Number]]:
    """The rows of steps, also of those that a failure took back."""
    return [row for row in _rows(run_folder) if STEP_S in row]


def _starts(steps: list[dict[str, Number]]) -> dict[int, float]:
    """Attempt → when its first step began, unix seconds; without attempts that finished none."""
    return {int(row[ATTEMPT]): row["time"] - row[STEP_S] for row in reversed(steps)}


def _owners(run_folder: Path) -> dict[int, dict[str, Any]]:
    """Attempt → what it said of itself; `pid_started` is its launch in unix seconds."""
    owners = {}
    for path in sorted(run_folder.glob("attempts/*/owner.json")):
        try:
            owner = json.loads(path.read_text())
            owners[int(path.parent.name)] = owner | {"pid_started": float(owner["pid_started"])}
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{path} is damaged ({error!r}): move it away to leave this attempt out") from error
    return owners
