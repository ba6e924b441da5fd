"""Which charts there are, in which sections, in which order: one layout for the W&B dashboard and the report.

What comes in: titles of panels, as the registry names them. What goes out: `SECTIONS`. Surprise: a panel lists no
metrics. Those that name it in the registry are drawn in it, so that adding a metric to a chart is one word there.
"""

from dataclasses import dataclass
from typing import Literal

from phi3v_dist.observe.registry import REGISTRY, Metric

Kind = Literal["line", "area", "share", "points", "media"]


@dataclass(frozen=True)
class Panel:
    """One chart.

    kind: lines; lines stacked to a sum ("area") or to 100 % ("share"); "points" for what is logged seldom; "media" for
        tables and pictures, which only W&B shows so.
    tile: name of the metric whose last value opens the section as a large figure, if this chart has one.
    """

    title: str
    kind: Kind = "line"
    tile: str | None = None
    log_y: bool = False


@dataclass(frozen=True)
class Section:
    """id: in addresses, lower case. intro: one sentence on how to read it."""

    id: str
    title: str
    intro: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "training", "Training", "Is it learning?",
        (
            Panel("Loss", tile="train/loss"), Panel("Gradient norm", tile="train/grad_norm", log_y=True),
            Panel("Learning rate"), Panel("Tokens", tile="train/tokens"), Panel("Loss of ranks"), Panel("Clipping"),
            Panel("Label tokens"), Panel("Skipped steps"),
        ),
    ),
    Section(
        "throughput", "Throughput and MFU", "How much of the hardware does it use, and where does a step's time go?",
        (
            Panel("Throughput", tile="perf/tokens_per_s_per_gpu"), Panel("MFU", tile="perf/mfu"),
            Panel("Step time", tile="time/step_s"), Panel("Parts of a step", "area"), Panel("Images"),
            Panel("FLOPs by part", "area"), Panel("Attention's share"), Panel("Evaluation time", "points"),
        ),
    ),
    Section(
        "cluster", "Cluster health", "Does any rank, GPU or node hold the others up?",
        (
            Panel("Straggler score", tile="health/straggler_score_min"), Panel("Slow ranks", tile="health/slow_ranks"),
            Panel("Guilty rank", "points", tile="health/slowest_rank"), Panel("Slowest rank"),
            Panel("Own time, data"), Panel("Own time, computing"), Panel("Own time of nodes"), Panel("Waiting"),
            Panel("Probe"), Panel("GPU memory"), Panel("Allocator retries"), Panel("Host memory"), Panel("GPU use"),
            Panel("GPU temperature"), Panel("GPU power"),
        ),
    ),
    Section(
        "data", "Data pipeline", "Does the data come fast enough, and is it the data that was asked for?",
        (
            Panel("Data wait", tile="data/stall_pct"), Panel("Packing", tile="data/pack_efficiency"),
            Panel("Quarantine", tile="data/quarantined"), Panel("Queue"), Panel("Decoding"), Panel("Pictures"),
            Panel("Picture tokens"), Panel("Document length"), Panel("Mix", "share"), Panel("Mix drift"),
        ),
    ),
    Section(
        "survival", "Checkpoints and goodput", "What would a failure cost, and what have failures cost so far?",
        (
            Panel("Goodput", tile="goodput/productive_pct"), Panel("Restarts", tile="goodput/restarts"),
            Panel("Lost time", "area"), Panel("Steps at risk", tile="ckpt/age_steps"), Panel("Save time", "points"),
            Panel("Save size", "points"), Panel("Save speed", "points"), Panel("Attempt"), Panel("World size"),
        ),
    ),
    Section(
        "evaluation", "Evaluation", "Are the answers right, against the blind control that cannot see?",
        (
            Panel("Exact match", "points"), Panel("Alike", "points"), Panel("Field error", "points"),
            Panel("Field error, %", "points"),
            Panel("Within 10 %", "points"), Panel("Answer form", "points"), Panel("Answer length", "points"),
            Panel("Answers", "media"), Panel("Pictures of answers", "media"),
        ),
    ),
    Section(
        "long", "Long context", "Is it as good far into a document as at its beginning?",
        (Panel("Loss by part", "points"), Panel("Right by part", "points")),
    ),
)  # fmt: skip


def metrics_of(panel: Panel) -> list[Metric]:
    """What a panel draws, in the registry's order."""
    return [metric for metric in REGISTRY if metric.panel == panel.title]
