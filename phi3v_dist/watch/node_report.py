"""What the watcher of one node knows about one attempt ↔ `RUN/attempts/NNNN/node-HOST.json`.

What comes in: ranks with their last whereabouts, and a verdict once there is one. What goes out: a file that other
nodes' watchers, `phi3v-diagnose` and `phi3v-supervise` read. Surprise: it is the only way in which nodes talk about a
hang. Their network may be what hangs.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phi3v_dist.errors import LostRankError
from phi3v_dist.survive.durable import write_durably
from phi3v_dist.watch.blame import Actor

FORMAT = "phi3v-node-1"
RUNNING, SUSPECT, ENDED = "running", "suspect", "ended"  # what a node says about itself
HANG, DIED, FAILED = "hang", "died", "failed"  # and when it has ended its ranks for a reason
CRASHED, LOST_RANK = 1, LostRankError.exit_code  # exit codes that follow from another rank's end, or may


@dataclass(frozen=True)
class RankReport:
    """One rank. outcome: done, stopped, failed, died, or `ended` by the watcher; empty while it runs.

    where: phase and step; peak_bytes: the most memory it held.
    """

    rank: int
    pid: int
    started: int
    outcome: str = ""
    exit_code: int = 0
    message: str = ""
    where: str = ""
    what: str = ""
    peak_bytes: int = 0


@dataclass(frozen=True)
class Verdict:
    """Why the ranks of a job were ended. kind: hang, died or failed; lines: for people. of_memory: the kernel has
    killed for want of memory meanwhile."""

    kind: str
    lines: list[str]
    blamed: list[Actor]
    of_memory: bool = False


@dataclass(frozen=True)
class NodeReport:
    """round: counts this node's suspicions; seen: the last round of each other node that `actors` answer."""

    host: str
    status: str
    ranks: list[RankReport]
    actors: list[Actor] = field(default_factory=list)
    verdict: Verdict | None = None
    round: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def write(self, attempt_folder: Path) -> None:
        """Raises OSError."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        write_durably(report_path(attempt_folder, self.host), text + "\n")


def tells_why(exit_code: int) -> bool:
    """Whether a rank that failed with this code had a reason of its own, as far as the code tells."""
    return exit_code not in (0, CRASHED, LOST_RANK)


def left_early(outcome: str, where: str) -> bool:
    """Whether a rank was asked to stop before the first step, and did so alone; later all agree on the step."""
    return outcome == "stopped" and where.partition(",")[0] in ("start", "load")  # a load may name a checkpoint


def report_path(attempt_folder: Path, host: str) -> Path:
    return attempt_folder / f"node-{host}.json"


def stacks_text_path(attempt_folder: Path, host: str) -> Path:
    return attempt_folder / f"stacks-{host}.txt"


def read_report(path: Path) -> NodeReport | None:
    """None when the file is damaged, or of another format."""
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            return None
        verdict = tree.pop("verdict")
        return NodeReport(
            **tree
            | {
                "ranks": [RankReport(**rank) for rank in tree["ranks"]],
                "actors": [_actor(actor) for actor in tree["actors"]],
                "verdict": verdict and Verdict(**verdict | {"blamed": [_actor(one) for one in verdict["blamed"]]}),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def read_reports(attempt_folder: Path) -> list[NodeReport]:
    """Of all nodes, by name."""
    found = [read_report(path) for path in sorted(attempt_folder.glob("node-*.json"))]
    return [report for report in found if report is not None]


def _actor(tree: dict[str, Any]) -> Actor:
    return Actor(**tree | {"position": tuple(tree["position"])})
