"""`checkpoints/best.json` → which checkpoint of a run is the best by the metric that `checkpoint.best` named.

What comes in: a run's folder of checkpoints. What goes out: the step, the metric, its value. Surprise: whoever finds
the file finds the checkpoint too. It is written after the checkpoint was committed, and removed before that may go.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from phi3v_dist.survive.durable import no_links

BEST_NAME = "best.json"


@dataclass(frozen=True)
class Best:
    """value: over the validation samples on which the step was compared with the best one before."""

    step: int
    metric: str
    value: float


def read_best(checkpoints: Path) -> Best | None:
    """None when there is none, or none that can be read."""
    try:
        with open(checkpoints / BEST_NAME, encoding="utf-8", opener=no_links) as file:
            found = json.load(file)
        return Best(int(found["step"]), str(found["metric"]), float(found["value"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The folder that the file names; None where it names none, or one that is not there."""
    best = read_best(checkpoints)
    if best is None:
        return None
    folder = checkpoints / f"step-{best.step:08d}"
    places = (folder, folder.with_name(f"{folder.name}.replaced"))  # the latter while that step is saved again
    return next((place for place in places if place.is_dir()), None)
