"""RUN/plan.json: what the planner said at the start of a run, for its next attempt and for the report.

What comes in: a run folder. What goes out: the plan as plain data. Surprise: one that cannot be read is as good as
none, for it can be made again; a damaged file stops neither a run nor a report.
"""

import json
from pathlib import Path
from typing import Any

from phi3v_dist.survive.durable import write_durably

PLAN_NAME = "plan.json"


def read_plan(run_folder: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        tree = json.loads((run_folder / PLAN_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def keep_plan(run_folder: Path, plan: dict[str, Any]) -> None:
    """Raises OSError."""
    write_durably(run_folder / PLAN_NAME, json.dumps(plan) + "\n")
