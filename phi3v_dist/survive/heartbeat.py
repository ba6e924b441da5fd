"""Where this process is: phase, step and what it works on, for whoever watches from outside.

What comes in: `enter("forward", step)` from every place where a run can be slow, die or hang. What goes out: a few
bytes in shared memory. Surprise: like logging it is a property of the process, so these are functions of a module and
nothing has to be passed through; before `open` they do nothing but ask for injected faults.

Two lanes, since a checkpoint is written while training goes on: `TRAIN` is the main thread, `SAVE` the writer.
"""

from phi3v_dist.survive import faults

TRAIN, SAVE = "train", "save"  # lanes
PHASES = ("start", "load", "data", "forward", "backward", "optimizer", "snapshot", "evaluate", "export", "finish")
SAVE_PHASES = ("write", "commit", "prune", "idle")


def enter(phase: str, step: int | None = None, what: str = "", lane: str = TRAIN) -> str | None:
    """This process begins `phase` now. `what`: shard and key, file, or whatever a person would ask for.

    Returns the action of an injected fault that the caller carries out, else None.
    """
    return faults.fire(phase, step)


def beat(what: str = "", lane: str = TRAIN) -> None:
    """Still in the same phase, and not stuck: call it once for each part of a long one."""


def close(outcome: str, message: str = "") -> None:
    """This process ends by itself: done, stopped or failed."""
