"""Test names in, pytest's workers (-n 2, as `make test` asks for) out: which tests share a process, and in which order.

Surprise: the longest begin first, or else one worker ends alone with them. A file run by hand knows none of this.
"""

from collections.abc import Callable

from xdist.scheduler import LoadScopeScheduling

# Folders by how long their longest file takes; all others are short.
LONGEST_FIRST = ("tests/slurm", "tests/train", "tests/survive", "tests/watch", "tests/parallel", "tests/cluster")
# Tests that share what is made once in a session: a cluster, and runs launched under `reference`.
TOGETHER = {
    "tests/slurm/": "the cluster",
    "tests/train/test_launch.py": "the reference",
    "tests/train/test_profiled_run.py": "the reference",
    "tests/train/test_recovery.py": "the reference",
    "tests/train/test_stopping.py": "the reference",
    "tests/train/test_wandb_record.py": "the reference",
}


def scope(nodeid: str) -> str:
    """Tests of the same scope run in the same process, one after the other: those of a file, and what is TOGETHER."""
    file = nodeid.split("::", 1)[0]
    return next((shared for prefix, shared in TOGETHER.items() if file.startswith(prefix)), file)


def turn(nodeid: str) -> int:
    """Sorts tests: those that take long come first."""
    return next((n for n, folder in enumerate(LONGEST_FIRST) if nodeid.startswith(folder + "/")), len(LONGEST_FIRST))


class Scopes(LoadScopeScheduling):
    """Hands whole scopes to workers, in the order in which they were collected."""

    def __init__(self, config, log: Callable):
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)
