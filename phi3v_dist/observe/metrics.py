"""Names of metrics → what the registry says of them, and rows of numbers checked against it.

What comes in: a row `{metric name: number}` about to be logged. What goes out: the same row, or an error that names the
stranger; and numbers as a person reads them.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from phi3v_dist.observe.registry import ATTEMPT, FIELD, NAME_PATTERN, PLACEHOLDER, REGISTRY, STEP, Metric, Needs

if TYPE_CHECKING:
    import phi3v_dist.train.step  # named in a string below: it loads torch, and a report needs the names alone

__all__ = ["ATTEMPT", "FIELD", "NAME_PATTERN", "PLACEHOLDER", "REGISTRY", "STEP", "Metric"]

Number = int | float  # JSON has both; spelled out because beartype, unlike mypy, does not count an int as a float

_EXACT = {metric.name: metric for metric in REGISTRY if not PLACEHOLDER.search(metric.name)}
_PATTERNS = [
    (re.compile(PLACEHOLDER.sub(r"(?P<\1>[a-z0-9][a-z0-9_]*)", metric.name)), metric)
    for metric in REGISTRY
    if PLACEHOLDER.search(metric.name)
]

_BESIDE = re.compile(r"eval/((blind|base|minus_blind|minus_base)/|by_|best_|chance_|.*/(low|high)$)")


@cache
def lookup(name: str) -> Metric | None:
    """The entry that `name` falls under, with the field's name filled in; None for a stranger.

    Where two patterns fit (`eval/best_price_mae`), the one higher in the registry wins.
    """
    if name in _EXACT:
        return _EXACT[name]
    for pattern, metric in _PATTERNS:
        if found := pattern.fullmatch(name):
            helped, panel = (
                text and PLACEHOLDER.sub(lambda word: found[word[1]], text) for text in (metric.help, metric.panel)
            )
            return replace(metric, name=name, help=helped or "", panel=panel)
    return None


def check(row: Mapping[str, object]) -> None:
    """Refuse a row with a name that is not registered or a value that is not a plain number.

    A tensor is refused because turning it into a number would make the training thread wait for the device.
    """
    for name, value in row.items():
        if lookup(name) is None:
            near = difflib.get_close_matches(name, _EXACT, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AssertionError(f"metric {name!r} is not in the registry (phi3v_dist/observe/metrics.py){hint}")
        if not isinstance(value, int | float):
            raise AssertionError(f"metric {name!r} must be a plain number, got {type(value).__name__}: {value!r}")


def is_own_score(name: str) -> bool:
    """Whether it is of an evaluation, of the model itself and of all samples: no control, difference, end of an
    interval, part or reference."""
    return name.startswith("eval/") and not _BESIDE.match(name)


def entry_name(name: str) -> str | None:
    """As the registry has it, `<field>` and the like unfilled; None for a stranger."""
    if name in _EXACT:
        return name
    return next((metric.name for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def expected_names(*needs: Needs) -> set[str]:
    """Entries of the registry that a run logs which has what is named here; `entry_name` of what it logged."""
    return {metric.name for metric in REGISTRY if not metric.needs or metric.needs in needs}


def format_value(name: str, value: Number) -> str:
    """A registered number as a person reads it: seconds as a duration, fractions as percent."""
    metric = lookup(name)
    unit = metric.unit if metric else ""
    if not math.isfinite(value):
        return "not finite"
    if unit == "s":
        return format_seconds(value)
    if unit in ("frac", "pct"):
        return f"{100 * value if unit == 'frac' else value:.1f} %"
    return format_number(value)


def format_number(value: Number) -> str:
    """Four digits are enough to compare two runs by eye."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def format_seconds(seconds: Number) -> str:
    """`0.81 s`, `7 min 12 s`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def step_row(result: "phi3v_dist.train.step.StepResult", row_length_tokens: int, world_size: int) -> dict[str, Number]:
    """The registered numbers of one optimizer step."""
    step_s = sum(result.seconds.values())
    return {
        STEP: result.step,
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        **{f"train/lr/{part}": rate for part, rate in result.learning_rates.items()},
        "train/label_token_frac": result.label_tokens / result.tokens,
        "perf/tokens_per_s_per_gpu": result.tokens / step_s / world_size,
        "perf/images_per_s_per_gpu": result.images / step_s / world_size,
        "time/step_s": step_s,
        **{f"time/{part}_s": seconds for part, seconds in result.seconds.items()},
        "data/stall_pct": min(100.0, 100 * result.data_wait_s / step_s),
        "data/pack_efficiency": result.tokens / (result.rows * row_length_tokens),
    }
