"""Several nodes on one machine: each is a process of its own with a name of its own, and what is wrong with it.

They are forked, so that torch is imported once; a node's name is given as the launch script gives it.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from phi3v_dist.cluster import preflight
from phi3v_dist.cluster.checking import Place
from phi3v_dist.cluster.findings import Findings, summarize
from phi3v_dist.cluster.report import read_reports
from phi3v_dist.cluster.talk import Patience
from phi3v_dist.config import Settings

TOKEN = "7.0.1"
PATIENCE = Patience(pause=2.0, come=20.0, turn=1.0, join=3.0, edge=2.0, reduce=4.0, whole=40.0)
LONGEST_S = 60.0

Wrong = Callable[[], object]


def place_of(settings: Settings, host: str, folder: Path, num_nodes: int = 1, ranks: int | None = None) -> Place:
    return Place(settings, host, num_nodes, ranks, folder)


def preflight_of(
    settings: Settings, folder: Path, wrong: dict[str, Wrong | None], absent: int = 0, stopped: Collection[str] = (),
    token: str = TOKEN,
) -> Findings:  # fmt: skip
    """Run a preflight with one process per node.

    Args:
        wrong: node → what is done in its process before it examines itself.
        absent: nodes that never start.
        stopped: nodes that are not waited for, since they will not end.
    """
    context = multiprocessing.get_context("fork")
    processes = {}
    for host, make_wrong in wrong.items():
        place = place_of(settings, host, folder, len(wrong) + absent)
        processes[host] = context.Process(target=_node, args=(place, token, make_wrong))
        processes[host].start()
    end_s = time.monotonic() + LONGEST_S
    for host, process in processes.items():
        if host not in stopped:
            process.join(max(end_s - time.monotonic(), 0.1))
    stuck = [host for host, process in processes.items() if process.is_alive()]
    for host in stuck:
        os.kill(processes[host].pid, signal.SIGKILL)
        processes[host].join()
    assert set(stuck) == set(stopped), f"these nodes did not end: {stuck}"
    hosts = [*wrong, *(f"absent{number}" for number in range(absent))]
    findings = summarize(read_reports(folder, hosts), hosts, token)
    print("\n".join(findings.lines()))
    return findings


def _node(place: Place, token: str, make_wrong: Wrong | None) -> None:
    if make_wrong:
        make_wrong()
    preflight.probe(preflight.examine(place, token), place, PATIENCE)
    os._exit(0)
