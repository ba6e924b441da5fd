"""The watchers of a job's nodes ask each other where their ranks are, through files in the attempt's folder alone.

What comes in: `node-HOST.json` of the other nodes. What goes out: their verdicts, their questions, and their answers to
ours. Surprise: no answer proves nothing. A network file system may show a new file a minute late, and the node that has
not been heard may be the one that works while all others wait for it; so the asking node is patient.
"""

import contextlib
import json
import os
from fnmatch import fnmatch
from pathlib import Path

from phi3v_dist.attempt.owner import OWNER_NAME
from phi3v_dist.watch.blame import Actor
from phi3v_dist.watch.node_report import RUNNING, SUSPECT, NodeReport, left_early, read_report, report_path

RELIST_S = 5.0  # clocks of file systems are coarse: two changes may bear one time
Version = tuple[int, int, int]


class Neighbours:
    """round: number of our last question; seen: by host, the last question of theirs that we have answered."""

    def __init__(self, attempt_folder: Path, host: str):
        self.attempt_folder, self.host = attempt_folder, host
        self.round, self.seen = 0, dict[str, int]()
        self.reports: list[NodeReport] = []
        self._read: dict[str, tuple[Version, NodeReport]] = {}
        self._changed_ns, self._listed_s = -1, float("-inf")

    def look(self, now_s: float) -> None:
        """Read the files that are new. Where none is, it costs one call: the folder says when it was changed."""
        with contextlib.suppress(OSError):  # a folder that cannot be read has no news
            folder = os.open(self.attempt_folder, os.O_RDONLY | os.O_DIRECTORY)  # NFS asks its server at each `open`
            try:
                changed_ns = os.fstat(folder).st_mtime_ns
                if changed_ns == self._changed_ns and now_s - self._listed_s < RELIST_S:
                    return
                self._read_new(folder)
                self._changed_ns, self._listed_s = changed_ns, now_s
            finally:
                os.close(folder)

    def _read_new(self, folder: int) -> None:
        ours = report_path(self.attempt_folder, self.host).name
        for name in os.listdir(folder):
            if name == ours or not fnmatch(name, "node-*.json"):
                continue
            found = os.stat(name, dir_fd=folder)
            version = found.st_ino, found.st_mtime_ns, found.st_size
            if name in self._read and self._read[name][0] == version:
                continue
            report = read_report(self.attempt_folder / name)
            if report:
                self._read[name] = version, report
        self.reports = [report for _, (_, report) in sorted(self._read.items())]

    def judged(self) -> NodeReport | None:
        """One that has a verdict."""
        return next((report for report in self.reports if report.verdict), None)

    def left_early(self) -> bool:
        """Whether a rank of another node was stopped before the first step."""
        return any(left_early(rank.outcome, rank.where) for report in self.reports for rank in report.ranks)

    def questions(self) -> dict[str, int]:
        """By host, the questions that we have not answered."""
        asked = {report.host: report.round for report in self.reports if report.status == SUSPECT}
        return {host: number for host, number in asked.items() if self.seen.get(host) != number}

    def ask(self) -> None:
        """Our next report is a new question to all."""
        self.round += 1

    def answers(self) -> list[Actor]:
        """Where the ranks of the nodes are that have answered our question."""
        return [actor for report in self.reports if self._answers(report) for actor in report.actors]

    def missing(self) -> list[str]:
        """Nodes that have ranks and have not answered our question, also those that were never heard of."""
        silent = [one.host for one in self.reports if one.status in (RUNNING, SUSPECT) and not self._answers(one)]
        heard = {self.host, *(report.host for report in self.reports)}
        return silent + sorted(self._hosts() - heard)

    def _answers(self, report: NodeReport) -> bool:
        return report.seen.get(self.host) == self.round

    def _hosts(self) -> set[str]:
        """Of the whole job, as far as its attempt says."""
        try:
            return set(json.loads((self.attempt_folder / OWNER_NAME).read_text())["hosts"])
        except (OSError, ValueError, KeyError, TypeError):
            return set()
