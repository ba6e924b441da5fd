"""What an export says about where it came from: `origin.json` beside the weights.

What comes in: a model folder. What goes out: the facts that a later reader needs and that config.json, kept in the
official form, has no place for. Surprise: a folder without the file is no mistake, it is a published model.
"""

import json
from pathlib import Path
from typing import Any, get_args

from phi3v_dist.config import LongRopeRule
from phi3v_dist.errors import CheckpointError

ORIGIN_NAME = "origin.json"
LONGROPE_KEY = "longrope"  # the rule a model was trained under


def read_origin(folder: Path) -> dict[str, Any]:
    """The facts recorded in a folder; none when it has no such file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    path = Path(folder) / ORIGIN_NAME
    if not path.is_file():
        return {}
    try:
        origin = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}; export the model again") from error
    if not isinstance(origin, dict):
        raise CheckpointError(f"{path}: holds {type(origin).__name__}, not an object; export the model again")
    return origin


def recorded_longrope(folder: Path) -> str:
    """The LongRoPE rule that a folder's model was trained under; `document` where none is recorded.

    Raises:
        CheckpointError: a rule is recorded that does not exist here.
    """
    rule = read_origin(folder).get(LONGROPE_KEY, "document")
    if rule not in get_args(LongRopeRule):
        path, names = Path(folder) / ORIGIN_NAME, ", ".join(get_args(LongRopeRule))
        raise CheckpointError(f"{path}: `{LONGROPE_KEY}` is {rule!r}, which is no LongRoPE rule: it is one of {names}")
    return rule
