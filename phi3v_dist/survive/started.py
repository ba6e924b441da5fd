"""What the last start of a run went on from ↔ `checkpoints/started.json`.

In: a start's number and the checkpoint it has loaded. Out: which copies on the nodes' own disks are still of this
run's past. Surprise: a newer copy may be a wrong one. When a node is away, the run goes on from an older checkpoint;
once that node is back, it still has what became of the run the first time, while the books were written anew.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.errors import CheckpointError
from phi3v_dist.survive.fence import Fence

STARTED_NAME = "started.json"


@dataclass(frozen=True)
class Started:
    """attempt: the last one that trained. step: which it went on from, 0 without a checkpoint; saved_by: attempt that
    had saved that step."""

    attempt: int
    step: int
    saved_by: int

    def goes_through(self, manifest: dict[str, Any]) -> bool:
        """Whether a checkpoint is the one this attempt went on from, or one of its own."""
        return manifest["attempt"] == self.attempt or (manifest["attempt"], manifest["step"]) == (
            self.saved_by, self.step,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"attempt {self.attempt} went on from step {self.step}"


def read_started(checkpoints: Path) -> Started | None:
    """None when there is none, or none that can be read: then no copy on a node counts."""
    try:
        return Started(**json.loads((checkpoints / STARTED_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_started(fence: Fence, started: Started) -> None:
    """Raises CheckpointError, also when a newer attempt has taken our folder away."""
    try:
        fence.publish(STARTED_NAME, json.dumps(asdict(started)) + "\n")
    except OSError as error:
        fence.require_newest()
        raise CheckpointError(f"cannot write {fence.checkpoints / STARTED_NAME}: {error}") from error
