"""Helpers for tests that watch real processes: start ranks, wait for them, read what was found."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY, environment
from launching import free_port

from phi3v_dist.watch.beat_file import folder_of, is_watched
from phi3v_dist.watch.node_report import NodeReport, read_report, report_path

TIMEOUT_S = 300  # however busy the machine is
RANKS = REPOSITORY / "tests" / "watch" / "watched_ranks.py"


@dataclass
class Loop:
    """Ranks of a small gloo loop (watched_ranks.py), on one or more pretended nodes of one machine."""

    attempt_folder: Path
    nodes: list[str]
    processes: list[subprocess.Popen]

    @classmethod
    def start(cls, run: Path, nodes: list[str], per_node: int, steps: int = 8, hang_s: float = 2, **env: str) -> "Loop":
        attempt_folder = run / "attempts" / "0001"
        attempt_folder.mkdir(parents=True)
        port, world_size, processes = str(free_port()), len(nodes) * per_node, []
        for rank in range(world_size):
            host = nodes[rank // per_node]
            words = [folder_of(attempt_folder, host), attempt_folder, host, rank, world_size, port, steps, hang_s]
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(RANKS), *map(str, words), str(rank % per_node), str(per_node)],
                    env=environment(**env),
                    stderr=(run / f"rank-{rank}.err").open("w"),
                    cwd=REPOSITORY,
                )  # fmt: skip
            )
        return cls(attempt_folder, nodes, processes)

    def wait(self) -> list[int]:
        """Exit codes by rank, once the watchers are gone too."""
        deadline_s = time.monotonic() + TIMEOUT_S
        try:
            codes = [process.wait(max(1, deadline_s - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        while any(is_watched(self.attempt_folder, node) for node in self.nodes):
            assert time.monotonic() < deadline_s, "the watcher has not ended"
            time.sleep(0.1)
        return codes

    def wait_until_said(self, words: str) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while words not in self.said():
            assert time.monotonic() < deadline_s, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.1)

    def report(self, node: str) -> NodeReport:
        report = read_report(report_path(self.attempt_folder, node))
        assert report is not None
        return report

    def said(self) -> str:
        """Everything on the ranks' stderr, which the watchers share."""
        return "".join(path.read_text() for path in sorted(self.attempt_folder.parents[1].glob("rank-*.err")))


def end_group(process: subprocess.Popen) -> None:
    """A launcher and whatever it started in its own group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
