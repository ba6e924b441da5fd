"""Settings of now, beside those that a run folder's checkpoints were trained with → what must not change unsaid.

What comes in: the settings and RUN/config.yaml. What goes out: one message per setting that would change the numbers of
a run half-way, and warnings about the rest. Surprise: most settings may change. How data is fetched, saved, evaluated
and shown, and how long a run is, are the owner's to change at any time; the number of ranks too.
"""

from pathlib import Path
from typing import Any

import yaml

from phi3v_dist.attempt import environment
from phi3v_dist.config import Settings, dump
from phi3v_dist.config_file import flattened, validate
from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import read_rows

CHANGES_NUMBERS = ("run.seed", "model.", "data.", "train.")
HARMLESS = (
    "data.validation", "data.cache.", "data.num_workers", "data.prefetch_rows", "data.max_bad_frac",
    "train.steps", "train.epochs", "train.gradient_accumulation_steps", "model.offload_activations",
)  # fmt: skip
LENGTH = ("train.steps", "train.epochs")
PATHS = ("model.path", "model.init_from", "data.train.")  # the same place may be spelled in two ways
RECORDED = ("torch", "transformers", "deepspeed", "webdataset", "wandb", "phi3v-dist")


def problems(settings: Settings) -> list[str]:
    """One message that lists every change, `key: before → now`; empty when the run may go on."""
    folder = settings.run.folder
    if (lost := _lost_checkpoints(folder)) and not settings.run.allow_changes:
        return [lost]
    changed = [
        line for key, line in _changes(settings).items() if key.startswith(CHANGES_NUMBERS) and not _harmless(key)
    ]
    if not changed or settings.run.allow_changes:
        return []
    return [
        f"{folder} was trained so far with other settings:\n"
        + "\n".join(changed)
        + f"\nSet them back to go on with it, give another `run.name` to begin anew (its weights: "
        f"model.init_from={folder}), or say run.allow_changes=true to go on all the same"
    ]


def warnings(settings: Settings) -> list[str]:
    """What is different and may be, said once at the start."""
    said = []
    changes = _changes(settings)
    if length := [line for key, line in changes.items() if key in LENGTH]:
        said.append(
            "the run has another length than before, so the learning rate follows another curve from here on:\n"
            + "\n".join(length)
        )
    if any(key.startswith("data.validation") for key in changes):
        said.append("`data.validation` is not what it was: scores from here on cannot be compared with earlier ones")
    numbers = [line for key, line in changes.items() if key.startswith(CHANGES_NUMBERS) and not _harmless(key)]
    if numbers and settings.run.allow_changes:
        said.append("going on with changed settings, as `run.allow_changes` says:\n" + "\n".join(numbers))
    before = (_recorded(settings.run.folder) or {}).get("environment") or {}
    now = {"commit": environment.commit()} | environment.versions(RECORDED)
    then = {"commit": before.get("commit", "unknown")} | (before.get("versions") or {})
    if other := [_line(key, then[key], now[key]) for key in now if key in then and then[key] != now[key]]:
        said.append("the checkpoints were made by other code:\n" + "\n".join(other))
    return said if before else []


def _changes(settings: Settings) -> dict[str, str]:
    """Key → `key: before → now` of every setting that is not what it was; empty when there is nothing to go on with.

    What the old file does not name had the default of its time, and is taken for the default of today.
    """
    tree = _recorded(settings.run.folder)
    if tree is None:
        return {}
    tree = {key: value for key, value in tree.items() if key != "environment"}
    recorded, _ = validate(Settings, tree)  # keys that are settings no longer are set aside
    if recorded is None:
        return {}
    before, now = flattened(dump(recorded)), flattened(dump(settings))
    keys = dict.fromkeys([*before, *now])
    return {
        key: _line(key, before.get(key), now.get(key))
        for key in keys
        if before.get(key) != now.get(key) and not _same_place(key, before.get(key), now.get(key))
    }


def _lost_checkpoints(folder: Path) -> str | None:
    """A run that saved, and of which no checkpoint is left, does not begin again at step 0 by itself."""
    if any(folder.glob("checkpoints/*step-*")):
        return None
    saved = [int(row[STEP]) for row in read_rows(folder) if "ckpt/save_s" in row]
    if not saved:
        return None
    return (
        f"{folder} had a checkpoint of step {saved[-1]}, and none is left in {folder / 'checkpoints'}. Bring it back "
        "to go on; to begin again at step 0 remove the run folder, give another `run.name`, or say "
        "run.allow_changes=true"
    )


def _recorded(folder: Path) -> dict[str, Any] | None:
    """RUN/config.yaml, where there are checkpoints to go on from; None: nothing to compare with."""
    path = folder / "config.yaml"
    if not path.is_file() or not any(folder.glob("checkpoints/step-*")):
        return None
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None  # damaged; the checkpoints do not need it, and it is written anew
    return tree if isinstance(tree, dict) else None


def _same_place(key: str, before: Any, now: Any) -> bool:
    if not key.startswith(PATHS) or not isinstance(before, str) or not isinstance(now, str):
        return False
    if key == "model.init_from":  # a run's name means one of its checkpoints, and the one of then was written down
        return Path(now) in Path(before).parents
    if now.startswith(("http://", "https://")):  # signed anew, it is the same object
        return before.partition("?")[0] == now.partition("?")[0]
    return "://" not in now and Path(before).absolute() == Path(now).absolute()


def _harmless(key: str) -> bool:
    return key in HARMLESS or key.startswith(tuple(f"{name.rstrip('.')}." for name in HARMLESS))


def _line(key: str, before: Any, now: Any) -> str:
    return f"  {key}: {_shown(before)} → {_shown(now)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
