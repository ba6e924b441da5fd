"""The nodes that have reported → how fast each pair of neighbours talks, and who did not answer.

What comes in: a folder that all nodes see. What goes out: a `Talk`: MB/s to each neighbour on a ring, and notes.
Surprise: a node that comes late is as good as any. It meets nobody here, says so, and trains with the others.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from phi3v_dist.cluster import meeting as meetings
from phi3v_dist.cluster.meeting import SECOND, announce, invitation, meet
from phi3v_dist.cluster.ring import edge, ring, sum_over_all
from phi3v_dist.cluster.talk import Patience, Talk, first_words, wait_for, within
from phi3v_dist.errors import LaunchError
from phi3v_dist.watch import faults


def take_part(folder: Path, token: str, host: str, num_nodes: int, patience: Patience, result: Talk) -> None:
    """The whole probe. Where the first node of a meeting turns out to be out of reach, the others hold one without it.

    Raises whatever a broken network, driver or file server makes of a second meeting.
    """
    try:
        talk(announce(folder, token, host), token, host, num_nodes, patience, result)
    except (LaunchError, RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        result.broke_off(first_words(error))
        if not result.first or len(result.edges) > 1 or num_nodes == 2:
            return
        second = f"{token}{SECOND}"
        result.first, result.at = "", "waiting for the other nodes"
        brief = replace(patience, come=2 * patience.turn)
        talk(announce(folder, second, host), second, host, num_nodes - 1, brief, result)


def talk(meeting: Path, token: str, host: str, num_nodes: int, patience: Patience, result: Talk) -> None:
    """Take part in the probe of a start; fills `result` as it goes.

    Raises:
        LaunchError: there was no meeting that could be reached.
    """
    opened = meet(meeting, token, host, num_nodes, patience)
    meetings.forget_older(meeting, token)
    faults.fire("network", 0)
    come = invitation(meeting).come
    if host in come:
        begun = within(2 * patience.join, lambda: _begin(meeting, token, host, opened, patience, result))
        store, come = begun
    if host not in come:
        result.first = ""
        result.notes.warn(f"came too late for the network probe: {len(come)} nodes had begun without it")
        return
    began_s = time.monotonic()
    rounds = ring(come)
    for number, pairs in enumerate(rounds, start=1):
        faults.fire("network", number)
        for pair in (pair for pair in pairs if host in pair):
            edge(store, pair, host, began_s + number * patience.edge, result)
    store.set(f"ready/{host}", "")
    result.at = "waiting for the nodes that are left"
    left_s = began_s + len(rounds) * patience.edge - time.monotonic()
    left = meetings.members(store, "left", "ready", come if opened else None, max(left_s, 0) + 1)
    if host in left and len(left) > 1:
        sum_over_all(store, left, host, patience.reduce, result)
    store.set(f"done/{host}", "")
    if opened is not None:
        wait_for(lambda: all(opened.check([f"done/{other}"]) for other in left), patience.reduce)


def _begin(
    meeting: Path, token: str, host: str, opened: dist.TCPStore | None, patience: Patience, result: Talk
) -> tuple[dist.TCPStore, list[str]]:
    """The store, and the nodes that take part."""
    result.at = "joining the other nodes"
    invited = invitation(meeting)
    if opened is None:
        result.first = invited.addresses[0]
    store = opened or meetings.join(invited, token, patience.join)
    store.set(f"here/{host}", "")
    return store, meetings.members(store, "members", "here", invited.come if opened else None, patience.join)
