"""What can go wrong, for the person who reads it at 3 a.m.

Every class here is raised with a message that says what was attempted, on what, what was found and what to change.
`assert` is for our own invariants; these are for people. Each carries the exit code a batch script can tell apart
(a clean stop exits 0).
"""

from collections.abc import Sequence

from phi3v_dist.printable import printable


class Phi3VError(Exception):
    """Base of all errors for people. `problems` holds one message each, so that several can be shown at once."""

    exit_code = 1
    kind = "error"

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def report(self) -> str:
        """The text a launch script prints: a count and one bullet per problem."""
        count = len(self.problems)
        head = f"{self.kind}: {count} problem{'s' if count != 1 else ''}"
        shown = (printable(problem, keep="\n").replace("\n", "\n    ") for problem in self.problems)
        return "\n".join([head, *(f"  - {problem}" for problem in shown)])


class ConfigError(Phi3VError):
    """A setting is unknown, has the wrong type or range, or contradicts another one."""

    exit_code = 2
    kind = "configuration"


class DataError(Phi3VError):
    """A shard, an index or a sample cannot be used, or too many samples were bad."""

    exit_code = 3
    kind = "data"


class OutOfStepError(Phi3VError):
    """The ranks no longer do the same; what made it so may be gone at the next start."""

    exit_code = 12
    kind = "ranks out of step"


class CheckpointError(Phi3VError):
    """A checkpoint or a model folder is missing, damaged, or belongs to another model."""

    exit_code = 4
    kind = "checkpoint"


class LaunchError(Phi3VError):
    """Ranks, nodes or ports do not fit together."""

    exit_code = 5
    kind = "launch"


class InUseError(LaunchError):
    """Another attempt trains in the run folder; it lives, so starting again does not help."""

    exit_code = 13
    kind = "run folder in use"


class DivergedError(Phi3VError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = 6
    kind = "diverged"


class StuckError(Phi3VError):
    """A rank made no progress for longer than its phase ever takes."""

    exit_code = 7
    kind = "hang"


class CrashLoopError(Phi3VError):
    """Several attempts in a row ended without a new step."""

    exit_code = 8
    kind = "crash loop"


class OutOfMemoryError(Phi3VError):
    """The accelerator's memory does not hold a step."""

    exit_code = 9
    kind = "memory"


class CorruptedError(Phi3VError):
    """Numbers in memory changed by themselves."""

    exit_code = 10
    kind = "silent corruption"


class LostRankError(Phi3VError):
    """Another rank is gone: a crash of that one, from which another start recovers."""

    exit_code = 11
    kind = "lost rank"
