"""Several nodes on one machine: each is a process of its own with a name of its own, and what is wrong with it.

They are forked, so that torch is imported once; a node's name is given as the launch script gives it.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from phi3v_dist import config
from phi3v_dist.cluster import preflight
from phi3v_dist.cluster.checking import Place
from phi3v_dist.cluster.findings import Findings, summarize
from phi3v_dist.cluster.network import Patience
from phi3v_dist.cluster.report import read_reports
from phi3v_dist.config import Settings

TOKEN = "7.0.1"
PATIENCE = Patience(come=3.0, turn=2.0, join=4.0, edge=4.0, reduce=5.0, whole=40.0)
LONGEST_S = 60.0

Wrong = Callable[[], None]


def load(tree: dict) -> Settings:
    return Settings.model_validate(tree)


def preflight_of(
    settings: Settings, folder: Path, wrong: dict[str, Wrong | None], absent: int = 0, token: str = TOKEN,
    patience: Patience = PATIENCE,
) -> Findings:  # fmt: skip
    """Run a preflight with one process per node.

    wrong: node → what is done in its process before it examines itself; absent: nodes that never start.
    """
    context = multiprocessing.get_context("fork")
    num_nodes = len(wrong) + absent
    processes = []
    for host, make_wrong in wrong.items():
        place = Place(settings, host, num_nodes, None, folder)
        processes.append(context.Process(target=_node, args=(place, token, make_wrong, patience)))
        processes[-1].start()
    end_s = time.monotonic() + LONGEST_S
    for process in processes:
        process.join(max(end_s - time.monotonic(), 0.1))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    hosts = [*wrong, *(f"absent{number}" for number in range(absent))]
    findings = summarize(read_reports(folder, hosts), hosts, token)
    print("\n".join(findings.lines()))
    return findings


def _node(place: Place, token: str, make_wrong: Wrong | None, patience: Patience) -> None:
    if make_wrong:
        make_wrong()
    preflight.probe(preflight.examine(place, token), place, patience)
    os._exit(0)


__all__ = ["config", "load", "preflight_of"]
