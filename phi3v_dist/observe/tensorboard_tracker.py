"""Rows of numbers → TensorBoard's event files in `RUN/tensorboard`, where `observe.tensorboard` asks for them.

Surprise: the package is optional, and looked for before a job is queued. The x axis is `train/step`; steps that a
failure took back are hidden by TensorBoard once a later attempt trains them again.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Row, Tracker

FOLDER_NAME = "tensorboard"
FLUSH_S = 10


def why_not() -> str | None:
    """What this environment lacks for it; None when nothing."""
    if importlib.util.find_spec("tensorboard") is None:
        return (
            "the package tensorboard is not installed: `python -m pip install tensorboard`, or leave the setting away "
            "(metrics.jsonl, report.html and W&B do without it)"
        )
    return None


class TensorBoardTracker(Tracker):
    """Put it behind `AllOf`: writing may raise."""

    def __init__(self, run_folder: Path):
        self.folder = run_folder / FOLDER_NAME
        self._writer: Any = None

    def log(self, row: Row) -> None:
        step = int(row[STEP])
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=FLUSH_S)
        for name, value in row.items():
            if name != STEP and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
