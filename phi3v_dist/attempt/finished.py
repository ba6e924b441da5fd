"""Whether there is anything left to do in a run folder.

What comes in: the settings of now. What goes out: yes or no. Surprise: a finished run goes on when more steps or epochs
are asked for, and is not finished then until a new summary is written.
"""

import json

import yaml

from phi3v_dist.attempt.attempt import SUMMARY_NAME
from phi3v_dist.config import Settings


def is_finished(settings: Settings) -> bool:
    """Whether this run's summary is written and nobody asks for more steps or epochs since."""
    folder, train = settings.run.folder, settings.train
    if not (folder / SUMMARY_NAME).is_file():
        return False
    if train.steps is not None:
        return bool(json.loads((folder / SUMMARY_NAME).read_text())["train/step"] >= train.steps)
    config_path = folder / "config.yaml"
    recorded = yaml.safe_load(config_path.read_text()) if config_path.is_file() else {}
    return bool((recorded.get("train", {}).get("epochs") or 0) >= (train.epochs or 0))
