"""The registry and the layout of panels → docs/metrics.md: every number that a run may log.

    make metrics

Surprise: controls, differences, intervals and parts of `eval.by` have no lines of their own. They are the plain metrics
under other names, and would be nine tenths of the page.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from phi3v_dist.observe.layout import SECTIONS
from phi3v_dist.observe.registry import REGISTRY, Metric

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
LEFT_OUT = re.compile(r"eval/(blind|base|minus_blind|minus_base|by_<axis>)/.*|eval/.*/(low|high)")
NEEDS = {
    "": "", "gpu": "GPU", "nvml": "GPU and nvidia-ml-py", "peak": "a known peak", "ranks": "several ranks",
    "sources": "several sources", "validation": "validation data", "numbers": "readable numbers",
    "kinds": "fuzzy or relaxed fields", "parts": "`eval.by`",
    "reference": "`eval.reference`", "wandb": "W&B", "checkpoint": "a checkpoint",
    "base": "`eval.base`", "intervals": "20 samples",
}  # fmt: skip
HEAD = """# Metrics

Every number that a run may log, by the section of dashboard and report that draws it. Written by `make metrics` from
`phi3v_dist/observe/registry.py`; do not edit.

`RUN/metrics.jsonl` has them all, a JSON object a line; `train/step` is the x axis everywhere. **step**: in the row of
each step. **window**: every `observe.log_every_steps`, in a row that comes a few steps late. What every rank measures
is gathered beside training and reduced (`/min`, `/mean`, `/p50`, `/p99`, `/max` over the ranks); each rank's own value
is in `RUN/ranks/HOST.jsonl`. ↑ more is better, ↓ less is better.

- **Parts of a step** are laps: each begins where the one before ended, so data, forward, backward, optimizer,
  checkpoint and logging add up to `time/step_s/mean`. Evaluations are left out.
- **MFU** counts 6 operations a weight and token (head included, whatever carries a label), attention between tokens
  by the lengths of documents, and the vision tower, projector and adapters as they are trained; recomputing is not
  counted. The time is wall time from a step's end to the next one's. The peak is that of the GPU where it is known, or
  `observe.peak_tflops`.
- **Own time** (`health/`) is a step's time without waiting for other ranks. A rank's score is the median rank's own
  time over its own; below 0.85 for three windows in a row, or below 0.7 once, it is named in the log.
- `eval/blind/…` repeats every evaluation metric for the control that saw exchanged pictures, `eval/base/…` for the
  model before it was tuned, and `eval/by_<axis>/<part>/…` repeats loss, exact match, samples and errors for parts of
  the samples (`eval.by`). `eval/minus_blind/…` and `eval/minus_base/…` are how much higher the model is than each, over
  the samples that have the number on both sides. All but those of parts have the ends of a 95 % interval beside them,
  `…/low` and `…/high`, where at least 20 samples have the number: bootstrap over samples, in pairs for a difference.
"""


def page() -> str:
    """docs/metrics.md as it should be."""
    shown = [metric for metric in REGISTRY if not LEFT_OUT.fullmatch(metric.name)]
    lines = [HEAD]
    for section in SECTIONS:
        titles = {panel.title for panel in section.panels}
        lines += [f"## {section.title}", "", section.intro, "", *_table(m for m in shown if m.panel in titles), ""]
    lines += ["## Without a panel", "", *_table(m for m in shown if m.panel is None), ""]
    return "\n".join(lines)


def _table(metrics: Iterable[Metric]) -> list[str]:
    arrows = {"up": "↑", "down": "↓", None: ""}
    lines = ["| metric | unit | | what it is | panel | logged | needs |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for metric in metrics:
        cells = (f"`{metric.name}`", metric.unit, arrows[metric.better], metric.help, metric.panel or "",
                 metric.cadence, NEEDS[metric.needs])  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
