"""A run folder → the checkpoint from which the same command goes on, and a sentence that says so.

What comes in: names of folders. What goes out: the newest one, or that there is none. Surprise: no byte is read.
Whether it is sound is seen at resume, which goes on to an older one if it is not.
"""

from pathlib import Path


def newest_checkpoint(run: Path) -> str | None:
    found = [path.name for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return max(found, key=lambda name: int(name[5:]), default=None)


def goes_on(checkpoint: str | None) -> str:
    """What another start of the run does."""
    if checkpoint is None:
        return "no checkpoint was written yet: the same command begins at the first step"
    return f"the same command goes on from the last checkpoint, {checkpoint}"
