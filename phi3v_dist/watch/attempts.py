"""A run folder's attempts, read back: who began them, how far they came, and how each ended.

What comes in: `RUN/attempts/`, metrics.jsonl and the markers of the end. What goes out: a `PastAttempt` each. Surprise:
nothing is required. An attempt may have been killed before its first word, a node may have been lost with its report,
and folders of older runs have no attempts at all, only rows in metrics.jsonl.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.attempt.attempt import ENDED_NAME, STOPPED_NAME, SUMMARY_NAME, folders
from phi3v_dist.attempt.owner import OWNER_NAME
from phi3v_dist.errors import CheckpointError
from phi3v_dist.observe.metrics import ATTEMPT, STEP
from phi3v_dist.observe.tracker import RECORD_NAME
from phi3v_dist.watch import processes
from phi3v_dist.watch.node_report import (
    CRASHED,
    DIED,
    FAILED,
    HANG,
    RUNNING,
    SUSPECT,
    NodeReport,
    read_reports,
    tells_why,
)

FINISHED, STOPPED, RUNS, LOST, UNKNOWN = "finished", "stopped", "running", "lost", "unknown"
KINDS = (HANG, DIED, FAILED, LOST, STOPPED, FINISHED, RUNS, UNKNOWN)


@dataclass(frozen=True)
class PastAttempt:
    """One start of a run.

    ending: one of KINDS. owner: what `owner.json` says, empty if there is none. silent: hosts without a last word.
    first_step, last_step: that it logged, None if it came to none.
    """

    number: int
    folder: Path
    ending: str
    owner: dict[str, Any]
    reports: list[NodeReport]
    silent: list[str]
    first_step: int | None
    last_step: int | None

    @property
    def verdict(self) -> NodeReport | None:
        """The report that says why: of a hang first, since that makes others die."""
        judged = [report for report in self.reports if report.verdict]
        return min(judged, key=lambda report: KINDS.index(report.status), default=None)

    @property
    def exit_code(self) -> int:
        """Of the rank that failed by itself rather than for want of another one; 0 if none did. See errors.py."""
        codes = [rank.exit_code for report in self.reports for rank in report.ranks]
        return max(codes, key=lambda code: (tells_why(code), code == CRASHED, code), default=0)

    @property
    def refused_checkpoints(self) -> bool:
        """Whether it ended because none of the run's checkpoints could be used: the same command ends so again."""
        ranks = [rank for report in self.reports for rank in report.ranks]
        return any(
            rank.exit_code == CheckpointError.exit_code and rank.where.partition(",")[0] == "load" for rank in ranks
        )

    @property
    def hosts(self) -> list[str]:
        return list(self.owner.get("hosts", [])) or [report.host for report in self.reports]

    @property
    def num_ranks(self) -> int | None:
        return self.owner.get("world_size") or sum(len(report.ranks) for report in self.reports) or None


def read_attempts(run: Path) -> list[PastAttempt]:
    """Oldest first; also those of which only the record knows."""
    steps = _steps(run)
    by_number = {int(folder.name): folder for folder in folders(run)}
    numbers = sorted(by_number.keys() | steps.keys())
    return [
        _read(run, number, by_number.get(number, run / "attempts" / f"{number:04d}"), steps.get(number), numbers[-1])
        for number in numbers
    ]


def best_step(run: Path) -> int:
    """The furthest step that any attempt has come to; 0 before the first."""
    return max((last for _, last in _steps(run).values()), default=0)


def _read(run: Path, number: int, folder: Path, steps: tuple[int, int] | None, newest: int) -> PastAttempt:
    owner, reports = read_json(folder / OWNER_NAME), read_reports(folder)
    silent = [host for host in owner.get("hosts", []) if host not in {report.host for report in reports}]
    if reports and any(report.verdict for report in reports):
        silent += [report.host for report in reports if report.status in (RUNNING, SUSPECT)]
    attempt = PastAttempt(number, folder, UNKNOWN, owner, reports, silent, *(steps or (None, None)))
    ending = _ending(run, attempt, is_newest=number == newest)
    return PastAttempt(**attempt.__dict__ | {"ending": ending})


def _ending(run: Path, attempt: PastAttempt, is_newest: bool) -> str:
    if attempt.verdict:
        return LOST if attempt.silent and attempt.verdict.status == FAILED else attempt.verdict.status
    outcomes = {rank.outcome for report in attempt.reports for rank in report.ranks}
    if is_newest and _is_alive(attempt.owner):
        return RUNS
    if is_newest and (run / SUMMARY_NAME).is_file():
        return FINISHED
    if STOPPED in outcomes or (is_newest and (run / STOPPED_NAME).is_file()):
        return STOPPED
    if outcomes == {"done"} and not attempt.silent:
        return FINISHED
    if attempt.silent and attempt.reports:
        return LOST
    return UNKNOWN


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether its first process runs on this machine; of another one we do not know."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if owner["machine"] != f"{boot}/{processes.namespace()}":
            return False
        return processes.is_alive(int(owner["pid"]), int(owner["start_ticks"]))
    except (KeyError, ValueError, TypeError, OSError):
        return False


def said_that_it_ended(attempt: PastAttempt) -> bool:
    return (attempt.folder / ENDED_NAME).is_file()


def _steps(run: Path) -> dict[int, tuple[int, int]]:
    """First and last step that each attempt logged."""
    steps = defaultdict(list)
    path = run / RECORD_NAME
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            steps[int(row[ATTEMPT])].append(int(row[STEP]))
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill left unfinished
    return {number: (min(found), max(found)) for number, found in steps.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Empty when there is no such file, or it is damaged: it is then worth less than the rest."""
    try:
        tree = json.loads(path.read_text())
        return tree if isinstance(tree, dict) else {}
    except (OSError, ValueError):
        return {}
