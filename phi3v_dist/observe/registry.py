"""The registry: every number a run may log, declared once. Everything that shows a number is made from this table.

What comes in: nothing. What goes out: `REGISTRY`, from which come the gather over ranks, the console line, W&B's
definitions, the dashboard, the report, `docs/metrics.md` and the tests. To add a metric: one line here, and its value
into the row that is logged.

Surprise: names of the data's fields are not known here, so some entries are patterns: `eval/<field>_mae` stands for
`eval/price_mae`. And an evaluation metric exists once for each side: plain, under `eval/blind/` for the control in
which the pictures were exchanged among the questions, under `eval/base/` for the model before it was tuned, under
`eval/minus_…/` for the difference to either; each with the ends of its 95 % interval as `/low` and `/high`. A number
that every rank measures for itself is declared once, and once for each statistic of it: `time/data_s` with min and max
gives `time/data_s/min` and `time/data_s/max`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

STEP = "train/step"  # the x axis everywhere; never a sink's own row counter
ATTEMPT = "run/attempt"
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)+")  # what W&B can sort, filter and section by
FIELD = "<field>"
PLACEHOLDER = re.compile("<([a-z]+)>")  # in names: `<field>` of the answers, `<axis>` of `eval.by`, `<part>` of that

Reduction = Literal["run", "sum", "min", "mean", "p50", "p99", "max"]
Cadence = Literal["step", "window", "checkpoint", "evaluation"]
Needs = Literal[
    "",
    "gpu",
    "nvml",
    "peak",
    "ranks",
    "sources",
    "validation",
    "numbers",
    "kinds",
    "parts",
    "reference",
    "wandb",
    "checkpoint",
    "base",
    "intervals",
]


@dataclass(frozen=True)
class Metric:
    """One line of the registry.

    name: `group/name_unit[/statistic]`; may hold `<field>`, which any field name of the data fills, and the like.
    unit: as a person reads it; "frac" is 0 to 1, "field" is whatever the field itself is measured in.
    better: the direction that is good, None where neither is.
    panel: title of the chart that draws it (`layout.PANELS`); metrics that name the same panel share it. None: not
        drawn.
    cadence: when it is logged: at each step, every `observe.log_every_steps`, at each checkpoint, at each evaluation.
    reduction: how the ranks' numbers become one; "run": it is one number by nature, the same wherever it is counted.
    needs: what a run must have for it to be logged at all: a GPU ("nvml": and nvidia-ml-py), a known peak, several
        ranks or sources, validation data ("numbers": answers in which one was read; "kinds": fuzzy or relaxed fields;
        "parts": `eval.by`; "reference": `eval.reference`, shown in the summary; "wandb": tables that only W&B holds;
        "base": `eval.base`; "intervals": at least 20 samples), a checkpoint that was committed.
    """

    name: str
    unit: str
    better: Literal["up", "down"] | None
    help: str
    panel: str | None
    cadence: Cadence = "step"
    reduction: Reduction = "run"
    needs: Needs = ""

    @property
    def base(self) -> str:
        """The name of what each rank measures: without the statistic."""
        return self.name if self.reduction == "run" else self.name.rpartition("/")[0]


SAID: dict[Reduction, str] = {
    "sum": "sum over ranks", "min": "least of all ranks", "mean": "mean over ranks", "p50": "median rank",
    "p99": "99th percentile of ranks", "max": "most of all ranks",
}  # fmt: skip


def _of_ranks(
    name: str, unit: str, better: Literal["up", "down"] | None, meaning: str, panel: str | None,
    *reductions: Reduction, needs: Needs = "",
) -> Iterator[Metric]:  # fmt: skip
    """What each rank measures over a window of steps, one entry for each statistic over the ranks."""
    for reduction in reductions:
        said = f"{meaning}; {SAID[reduction]}"
        yield Metric(f"{name}/{reduction}", unit, better, said, panel, "window", reduction, needs)


_TRAINING = (
    Metric(STEP, "steps", None, "optimizer steps done", None),
    Metric("train/tokens", "tokens", "up", "tokens trained on so far, filling left out", "Tokens"),
    Metric("train/samples", "samples", "up", "samples trained on so far", None),
    Metric("train/epoch", "epochs", None, "passes over the training data so far", None),
    Metric("train/loss", "nats", "down", "mean loss of the label tokens of the step, over all ranks", "Loss"),
    *_of_ranks("train/rank_loss", "nats", "down", "mean loss of a rank's own label tokens", "Loss of ranks",
               "min", "max"),
    Metric("train/grad_norm", "norm", None, "norm of the gradient before clipping", "Gradient norm"),
    Metric("train/clip_frac", "frac", "down", "share of the window's steps whose gradient was clipped", "Clipping",
           "window"),
    Metric("train/lr/text", "1/step", None, "learning rate of the language model", "Learning rate"),
    Metric("train/lr/vision", "1/step", None, "learning rate of the vision tower", "Learning rate"),
    Metric("train/lr/projector", "1/step", None, "learning rate of the image projector", "Learning rate"),
    Metric("train/skipped_steps", "steps", "down", "steps so far that made no update", "Skipped steps"),
    Metric("train/spike", "flag", "down", "1 where the loss is far above its last steps", "Skipped steps"),
    Metric("train/label_token_frac", "frac", None, "share of tokens that carry a label", "Label tokens"),
)  # fmt: skip

_SPEED = (
    Metric("perf/tokens_per_s_per_gpu", "tokens/s", "up", "tokens trained per second, per process", "Throughput"),
    Metric("perf/images_per_s_per_gpu", "images/s", "up", "pictures trained per second, per process", "Images"),
    Metric("perf/mfu", "frac", "up", "useful work over the peak of the hardware, attention counted in full", "MFU",
           "window", needs="peak"),
    Metric("perf/mfu_causal", "frac", "up", "the same, of attention only the half that a causal mask leaves; the parts "
           "below add up to it", "MFU", "window", needs="peak"),
    Metric("perf/tflops_text", "TFLOP/s", None, "work of the language model's matrices, per process", "FLOPs by part",
           "window"),
    Metric("perf/tflops_attn", "TFLOP/s", None, "work of attention between tokens, the causal half, per process",
           "FLOPs by part", "window"),
    Metric("perf/tflops_vision", "TFLOP/s", None, "work of vision tower and projector, per process", "FLOPs by part",
           "window"),
    Metric("perf/attn_flops_frac", "frac", None, "share of attention between tokens in all work", "Attention's share",
           "window"),
    Metric("time/step_s", "s", "down", "wall time of one optimizer step, rank 0", "Step time"),
    Metric("time/data_s", "s", "down", "waiting for the loader, rank 0", None),
    Metric("time/fwd_s", "s", "down", "forward passes of the step, rank 0", None),
    Metric("time/bwd_s", "s", "down", "backward passes of the step, rank 0", None),
    Metric("time/opt_s", "s", "down", "optimizer update, rank 0", None),
    *_of_ranks("time/step_s", "s", "down", "wall time of a step, from its end to the next one's, evaluations left out",
               "Step time", "min", "mean", "p50", "p99", "max"),
    *_of_ranks("time/data_s", "s", "down", "of it, waiting for the loader", "Parts of a step", "mean"),
    *_of_ranks("time/fwd_s", "s", "down", "of it, forward passes", "Parts of a step", "mean"),
    *_of_ranks("time/bwd_s", "s", "down", "of it, backward passes", "Parts of a step", "mean"),
    *_of_ranks("time/opt_s", "s", "down", "of it, the optimizer's update", "Parts of a step", "mean"),
    *_of_ranks("time/ckpt_s", "s", "down", "of it, held up by a checkpoint", "Parts of a step", "mean"),
    *_of_ranks("time/log_s", "s", "down", "of it, bookkeeping between steps, this measuring included",
               "Parts of a step", "mean"),
    Metric("time/eval_s", "s", "down", "training held up by an evaluation", "Evaluation time", "evaluation",
           needs="validation"),
)  # fmt: skip

_CLUSTER = (
    Metric("health/straggler_ratio", "ratio", "down", "slowest rank's own time a step over the median rank's",
           "Slowest rank", "window", needs="ranks"),
    Metric("health/straggler_score_min", "ratio", "up", "median rank's own time over the slowest rank's; 1 is best",
           "Straggler score", "window", needs="ranks"),
    Metric("health/slowest_rank", "rank", None, "the rank with the most own time", "Guilty rank", "window",
           needs="ranks"),
    Metric("health/slow_ranks", "ranks", "down", "ranks with a score below 0.85", "Slow ranks", "window",
           needs="ranks"),
    *_of_ranks("health/data_s", "s", "down", "own time of a step in the loader, which no other rank's pace hides",
               "Own time, data", "p50", "max"),
    *_of_ranks("health/compute_s", "s", "down", "own time of a step in computing, waits for other ranks left out",
               "Own time, computing", "min", "p50", "max"),
    *_of_ranks("health/gemm_probe_tflops", "TFLOP/s", "up", "a fixed small matrix product, timed alone", "Probe",
               "min", "p50"),
    Metric("node/<host>/own_s", "s", "down", "own time of a step of <host>'s slowest rank; at most 64 nodes",
           "Own time of nodes", "window", needs="ranks"),
    *_of_ranks("comm/wait_s", "s", "down", "of a step, waiting in collectives; the slowest rank waits least", "Waiting",
               "min", "mean", "max", needs="ranks"),
    *_of_ranks("mem/alloc_peak_gib", "GiB", "down", "most that tensors took on the GPU so far", "GPU memory",
               "min", "max", needs="gpu"),
    *_of_ranks("mem/reserved_peak_gib", "GiB", "down", "most that the allocator held on the GPU so far", "GPU memory",
               "max", needs="gpu"),
    *_of_ranks("mem/alloc_retries", "retries", "down", "times the allocator had to empty its cache so far",
               "Allocator retries", "sum", needs="gpu"),
    *_of_ranks("mem/host_rss_gib", "GiB", "down", "resident memory of the process now", "Host memory", "max"),
    *_of_ranks("gpu/util_pct", "pct", "up", "share of time in which the GPU computed", "GPU use", "min", "mean",
               needs="nvml"),
    *_of_ranks("gpu/temp_c", "°C", "down", "temperature of the GPU", "GPU temperature", "max", needs="nvml"),
    *_of_ranks("gpu/power_w", "W", None, "power that the GPU draws", "GPU power", "mean", needs="nvml"),
)  # fmt: skip

_DATA = (
    Metric("data/stall_pct", "pct", "down", "share of the step spent waiting for data, mean over ranks", "Data wait"),
    Metric("data/pack_efficiency", "frac", "up", "share of row positions that hold a token of a sample", "Packing"),
    Metric("data/quarantined", "samples", "down", "bad samples left out so far", "Quarantine"),
    *_of_ranks("data/queue_depth", "rows", "up", "decoded rows that wait for training, at a step's end", "Queue",
               "min", "mean"),
    *_of_ranks("data/decode_s", "s", "down", "decoding one sample, the slowest of the window", "Decoding", "p50",
               "max"),
    Metric("data/images_per_sample", "images", None, "pictures of a sample, mean of the window", "Pictures", "window"),
    Metric("data/image_tokens_frac", "frac", None, "share of tokens that stand for pictures", "Picture tokens",
           "window"),
    Metric("data/mix/<source>", "frac", None, "share of samples of <source> in the window", "Mix", "window",
           needs="sources"),
    Metric("data/mix_drift/<source>", "frac", None, "that share since the attempt began minus the one asked for",
           "Mix drift", "window", needs="sources"),
    Metric("seq/len_p50", "tokens", None, "median length of the window's documents", "Document length", "window"),
    Metric("seq/len_p99", "tokens", None, "99th percentile of them", "Document length", "window"),
    Metric("seq/len_max", "tokens", None, "the longest of them", "Document length", "window"),
)  # fmt: skip

_SURVIVAL = (
    Metric("ckpt/save_s", "s", "down", "one checkpoint, from its copy to its commit", "Save time", "checkpoint",
           needs="checkpoint"),
    Metric("ckpt/blocked_s", "s", "down", "training held up by it", "Save time", "checkpoint", needs="checkpoint"),
    Metric("ckpt/gib", "GiB", "down", "bytes of one checkpoint, over all ranks", "Save size", "checkpoint",
           needs="checkpoint"),
    Metric("ckpt/gib_per_s", "GiB/s", "up", "its bytes over the time its writing took", "Save speed", "checkpoint",
           needs="checkpoint"),
    Metric("ckpt/age_steps", "steps", "down", "steps that a failure now would cost", "Steps at risk", "window"),
    Metric("goodput/productive_pct", "pct", "up", "wall time of the run, all attempts, spent in steps that count",
           "Goodput", "window"),
    Metric("goodput/restarts", "restarts", "down", "starts of the run after the first", "Restarts", "window"),
    *(
        Metric(f"goodput/lost_{part}_s", "s", "down", f"wall time lost so far: {what}", "Lost time", "window")
        for part, what in (
            ("init", "from a launch to the loading of the state: imports, meeting, engine"),
            ("restore", "loading the state and its data position"),
            ("data", "waiting for the loader in steps that count"),
            ("ckpt", "held up by checkpoints"),
            ("eval", "held up by evaluations"),
            ("replay", "steps that a failure took back"),
            ("down", "between the end of an attempt and the next launch"),
            ("other", "the loop's own work, and steps cut short"),
        )
    ),
    Metric(ATTEMPT, "attempts", None, "which start of the run logged this row, from 1", "Attempt"),
    Metric("run/wall_s", "s", "down", "wall time of the run so far, all attempts", None),
    Metric("run/world_size", "processes", None, "processes that train together", "World size"),
)  # fmt: skip

_EVALUATION = tuple(
    replace(metric, cadence="evaluation", needs=metric.needs or "validation")
    for metric in (
        Metric("loss", "nats", "down", "mean loss of the label tokens of the validation samples", "Loss"),
        Metric(
            "<field>_mae",
            "field",
            "down",
            "mean absolute error of <field>, over parsed answers",
            "Field error",
            needs="numbers",
        ),
        Metric(
            "<field>_median_ape_pct",
            "pct",
            "down",
            "median percentage error of <field>",
            "Field error, %",
            needs="numbers",
        ),
        Metric(
            "<field>_within_10pct",
            "frac",
            "up",
            "share of parsed answers whose <field> is within 10 %",
            "Within 10 %",
            needs="numbers",
        ),
        Metric("field_em/<field>", "frac", "up", "share of samples whose <field> is exactly right", "Exact match"),
        Metric(
            "anls/<field>", "frac", "up", "how alike <field> and its truth are, 0 below a half", "Alike", needs="kinds"
        ),
        Metric(
            "relaxed_accuracy/<field>",
            "frac",
            "up",
            "share of samples whose <field> is right within 5 %",
            "Alike",
            needs="kinds",
        ),
        Metric("parse_fail_pct", "pct", "down", "answers from which the fields cannot be read", "Answer form"),
        Metric("stop_pct", "pct", "up", "answers that end by themselves", "Answer form"),
        Metric("samples", "samples", None, "validation samples answered", None),
        Metric("skipped", "samples", "down", "validation samples left out because they could not be read", None),
        Metric("gen_tokens/mean", "tokens", None, "mean length of the generated answers", "Answer length"),
    )
)

PLAIN_ONLY = ("loss", "skipped")  # the control is asked for answers alone, of the same samples
COUNTS = ("samples", "skipped")  # have no interval, and no difference is of interest

_OF_PARTS = tuple(  # `eval.by`: each part is a bin of a field of the samples, or one of its values
    replace(metric, name=f"by_<axis>/<part>/{metric.name}", help=f"{metric.help}; where <axis> is <part>", panel=panel,
            needs="parts")
    for metric in _EVALUATION
    for name, panel in (
        ("loss", "Loss by part"), ("field_em/<field>", "Right by part"), ("samples", None), ("<field>_mae", None)
    )
    if metric.name == name
)  # fmt: skip

_REFERENCE = tuple(
    replace(metric, cadence="evaluation", needs="reference")
    for metric in (
        Metric("eval/best_<field>_mae", "field", "down", "lowest error of <field> that the data's noise allows", None),
        Metric("eval/best_<field>_median_ape_pct", "pct", "down", "the same as median percentage error", None),
        Metric("eval/best_<field>_within_10pct", "frac", "up", "the same as share within 10 %", None),
        Metric("eval/chance_<field>", "frac", None, "share whose <field> a guess would get right", None),
    )
)

_TABLES = tuple(
    replace(metric, cadence="evaluation", needs="wandb")
    for metric in (
        Metric("eval/predictions", "table", None, "questions, answers and truth of one evaluation (W&B only)",
               "Answers"),
        Metric("eval/images", "images", None, "the pictures of that table (W&B only)", "Pictures of answers"),
    )
)  # fmt: skip


def _sides() -> Iterator[Metric]:
    """Every evaluation metric: of the model, of its two controls, and how much higher the model is than each."""
    for metric in (*_EVALUATION, *_OF_PARTS):
        yield replace(metric, name=f"eval/{metric.name}")
    for metric in (*_EVALUATION, *_OF_PARTS):
        if not metric.name.endswith(PLAIN_ONLY):
            yield replace(metric, name=f"eval/blind/{metric.name}", help=f"{metric.help}; blind control")
    for metric in _EVALUATION:
        if metric.name == "skipped":
            continue
        needs: Needs = metric.needs if metric.needs in ("numbers", "kinds") else "base"
        off = replace(metric, panel=None, needs=needs)
        yield replace(off, name=f"eval/base/{off.name}", help=f"{off.help}; the model before it was tuned")
        if metric.name == "samples":
            continue
        said, than = f"{off.help}; how much higher", "over the samples that have it on both sides"
        yield replace(off, name=f"eval/minus_base/{off.name}", help=f"{said} than before tuning, {than}")
        if metric.name != "loss":
            name, text = f"eval/minus_blind/{off.name}", f"{said} than blind, {than}"
            yield replace(off, name=name, help=text, needs=metric.needs)


def _ends_of_intervals(metrics: Iterable[Metric]) -> Iterator[Metric]:
    for metric in metrics:
        if not metric.name.endswith(COUNTS) and "<part>" not in metric.name:
            for end, said in (("low", "lower"), ("high", "upper")):
                text = f"{metric.help}; {said} end of its 95 % interval"
                yield replace(metric, name=f"{metric.name}/{end}", help=text, panel=None, needs="intervals")


REGISTRY: tuple[Metric, ...] = (
    *_TRAINING,
    *_SPEED,
    *_CLUSTER,
    *_DATA,
    *_SURVIVAL,
    *_REFERENCE,
    *_TABLES,
    *_sides(),
    *_ends_of_intervals(_sides()),
)
