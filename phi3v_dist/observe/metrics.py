"""The registry: every number a run may log, declared once with its unit, its good direction and its meaning.

What comes in: a row `{metric name: number}` about to be logged. What goes out: the same row, or an error that names the
stranger. Surprise: names of the data's fields are not known here, so some entries are patterns: `eval/<field>_mae`
stands for `eval/price_mae`, and every evaluation metric exists twice, plain and under `eval/blind/` for the control
in which the pictures were exchanged among the questions.
"""

import difflib
import math
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import phi3v_dist.train.step  # named in a string below: it loads torch, and a report needs the names alone

Number = int | float  # JSON has both; spelled out because beartype, unlike mypy, does not count an int as a float

STEP = "train/step"  # the x axis everywhere; never a sink's own row counter
ATTEMPT = "run/attempt"
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)+")  # what W&B can sort, filter and section by
FIELD = "<field>"
PLACEHOLDER = re.compile("<([a-z]+)>")  # in names: `<field>` of the answers, `<axis>` of `eval.by`, `<part>` of that


@dataclass(frozen=True)
class Metric:
    """One line of the registry.

    name: `group/name_unit`; may hold `<field>`, which any field name of the data fills, and the like.
    unit: as a person reads it; "frac" is 0 to 1, "field" is whatever the field itself is measured in.
    better: the direction that is good, None where neither is.
    panel: title of the chart that draws it; metrics that name the same panel share it. None: not drawn.
    """

    name: str
    unit: str
    better: Literal["up", "down"] | None
    help: str
    panel: str | None


_TRAINING = (
    Metric(STEP, "steps", None, "optimizer steps done", None),
    Metric("train/tokens", "tokens", "up", "tokens trained on so far, filling left out", None),
    Metric("train/samples", "samples", "up", "samples trained on so far", None),
    Metric("train/epoch", "epochs", None, "passes over the training data so far", None),
    Metric("train/loss", "nats", "down", "mean loss of the label tokens of the step, over all ranks", "Loss"),
    Metric("train/grad_norm", "norm", None, "norm of the gradient before clipping", "Gradient norm"),
    Metric("train/lr/text", "1/step", None, "learning rate of the language model", "Learning rate"),
    Metric("train/lr/vision", "1/step", None, "learning rate of the vision tower", "Learning rate"),
    Metric("train/lr/projector", "1/step", None, "learning rate of the image projector", "Learning rate"),
    Metric("train/skipped", "steps", "down", "steps so far that made no update", None),
    Metric("train/spike", "flag", "down", "1 where the loss is far above its last steps", None),
    Metric("train/label_token_frac", "frac", None, "share of tokens that carry a label", "Label tokens"),
    Metric("perf/tokens_per_s_per_gpu", "tokens/s", "up", "tokens trained per second, per process", "Throughput"),
    Metric("perf/images_per_s_per_gpu", "images/s", "up", "pictures trained per second, per process", "Images"),
    Metric(
        "perf/straggler_ratio", "ratio", "down", "slowest rank's own time a step over the median rank's", "Slowest rank"
    ),
    Metric("time/step_s", "s", "down", "wall time of one optimizer step", "Step time"),
    Metric("time/data_s", "s", "down", "waiting for the loader", "Step time"),
    Metric("time/fwd_s", "s", "down", "forward passes of the step", "Step time"),
    Metric("time/bwd_s", "s", "down", "backward passes of the step", "Step time"),
    Metric("time/opt_s", "s", "down", "optimizer update", "Step time"),
    Metric("time/ckpt_s", "s", "down", "training held up by a checkpoint", None),
    Metric("time/eval_s", "s", "down", "training held up by an evaluation", None),
    Metric("data/stall_pct", "pct", "down", "share of the step spent waiting for data, mean over ranks", "Data wait"),
    Metric("data/pack_efficiency", "frac", "up", "share of row positions that hold a token of a sample", "Packing"),
    Metric("data/quarantined", "samples", "down", "bad samples left out so far", None),
    Metric("mem/host_rss_gib", "GiB", "down", "resident memory of the process", None),
    Metric("mem/alloc_peak_gib", "GiB", "down", "most that tensors took on rank 0's GPU so far", None),
    Metric("ckpt/save_s", "s", "down", "one checkpoint, from its copy to its commit", None),
    Metric("ckpt/size_gib", "GiB", "down", "bytes of one checkpoint, over all ranks", None),
    Metric(ATTEMPT, "attempts", None, "which start of the run logged this row, from 1", None),
    Metric("run/wall_s", "s", "down", "wall time of the run so far, all attempts", None),
    Metric("run/world_size", "processes", None, "processes that train together", None),
)

_EVALUATION = (
    Metric("loss", "nats", "down", "mean loss of the label tokens of the validation samples", "Loss"),
    Metric("<field>_mae", "field", "down", "mean absolute error of <field>, over parsed answers", "<field> error"),
    Metric("<field>_median_ape_pct", "pct", "down", "median absolute percentage error of <field>", None),
    Metric("<field>_within_10pct", "frac", "up", "share of parsed answers whose <field> is within 10 %", None),
    Metric("field_em/<field>", "frac", "up", "share of samples whose <field> is exactly right", "Exact match"),
    Metric("parse_fail_pct", "pct", "down", "answers from which the fields cannot be read", "Answer form"),
    Metric("stop_pct", "pct", "up", "answers that end by themselves", "Answer form"),
    Metric("samples", "samples", None, "validation samples answered", None),
    Metric("skipped", "samples", "down", "validation samples left out because they could not be read", None),
    Metric("gen_tokens/mean", "tokens", None, "mean length of the generated answers", None),
)

_OF_PARTS = tuple(  # `eval.by`: each part is a bin of a field of the samples, or one of its values
    replace(metric, name=f"by_<axis>/<part>/{metric.name}", help=f"{metric.help}; where <axis> is <part>", panel=None)
    for metric in _EVALUATION
    if metric.name in ("loss", "samples", "field_em/<field>", "<field>_mae")
)

REGISTRY: tuple[Metric, ...] = (
    *_TRAINING,
    Metric("eval/best_<field>_mae", "field", "down", "lowest error of <field> that the data's noise allows", None),
    Metric("eval/best_<field>_median_ape_pct", "pct", "down", "the same as median percentage error", None),
    Metric("eval/best_<field>_within_10pct", "frac", "up", "the same as share within 10 %", None),
    Metric("eval/chance_<field>", "frac", None, "share whose <field> a guess would get right", None),
    Metric("eval/predictions", "table", None, "questions, answers and truth of one evaluation (W&B only)", None),
    Metric("eval/images", "images", None, "the pictures of that table (W&B only)", None),
    *(replace(metric, name=f"eval/{metric.name}") for metric in (*_EVALUATION, *_OF_PARTS)),
    *(
        replace(metric, name=f"eval/blind/{metric.name}", help=f"{metric.help}; blind control")
        for metric in (*_EVALUATION, *_OF_PARTS)
    ),
)

_EXACT = {metric.name: metric for metric in REGISTRY if not PLACEHOLDER.search(metric.name)}
_PATTERNS = [
    (re.compile(PLACEHOLDER.sub(r"(?P<\1>[a-z][a-z0-9_]*)", metric.name)), metric)
    for metric in REGISTRY
    if PLACEHOLDER.search(metric.name)
]


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


def panel_metrics(panel: str) -> list[Metric]:
    """The metrics without a field in their name that share one chart, in the registry's order."""
    return [metric for metric in REGISTRY if metric.panel == panel and not PLACEHOLDER.search(metric.name)]


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
    import torch  # a report needs the names alone

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
        "mem/host_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **({"mem/alloc_peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}),
    }
