"""A folder that all nodes see → one store at which those that have come meet.

What comes in: the folder, the name of the start. What goes out: the store, and who takes part. Surprise: there is no
first node that all depend on. The first name among those that came opens the meeting; if it is silent the next does.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from phi3v_dist.cluster.talk import Patience, wait_for
from phi3v_dist.errors import LaunchError
from phi3v_dist.survive.durable import no_links

SECOND = "~"  # after the name of a start: its second meeting
PREFIX = ".meeting-"  # of a start's folder; empty files in it say who came
ADDRESS_NAME = "address.json"
CONNECT_S = 3.0


@dataclass(frozen=True)
class Invitation:
    """Where the store is: on which host, its port and the addresses of that host. come: the nodes that it waits for."""

    port: int
    addresses: list[str]
    come: list[str]


def announce(folder: Path, token: str, host: str) -> Path:
    """Say that this node is there. Returns the folder of this start's meeting. Raises OSError."""
    meeting = folder / f"{PREFIX}{token}"
    meeting.mkdir(parents=True, exist_ok=True)
    (meeting / host).touch()
    return meeting


def meet(meeting: Path, token: str, host: str, num_nodes: int, patience: Patience) -> dist.TCPStore | None:
    """Wait until all have come, or no more do, or as long as is allowed.

    Returns the store if it fell to this node to open it. Raises LaunchError when nobody opens one.
    """
    began_s = news_s = time.monotonic()
    since_s, pause_s, count = None, 0.05, 0
    while True:
        os.utime(meeting)  # a network file system then looks again, instead of showing what it remembers
        if (meeting / ADDRESS_NAME).exists():
            return None
        come = _come(meeting)
        now_s = time.monotonic()
        if len(come) > count:
            news_s, count = now_s, len(come)
        is_over = len(come) >= num_nodes or now_s - news_s > patience.pause or now_s - began_s > patience.come
        if since_s is None and is_over:
            since_s = now_s
        if since_s is not None:
            if now_s - since_s >= come.index(host) * patience.turn:
                return _open(meeting, token, host, come)
            if now_s - since_s > patience.whole / 2:
                raise LaunchError(f"none of {', '.join(come[:3])} opened the meeting for the network probe")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 1.0)


def invitation(meeting: Path) -> Invitation:
    """Raises OSError, ValueError, TypeError where the file is not what `meet` wrote."""
    with open(meeting / ADDRESS_NAME, opener=no_links) as file:
        return Invitation(**json.load(file))


def join(invited: Invitation, token: str, join_s: float) -> dist.TCPStore:
    """The store that another node opened. Raises LaunchError."""
    tried = []
    for address in dict.fromkeys(invited.addresses):
        try:
            socket.create_connection((address, invited.port), CONNECT_S).close()
            store = dist.TCPStore(address, invited.port, timeout=timedelta(seconds=join_s))
            if store.check(["token"]) and store.get("token").decode() == token:
                return store
            tried.append(f"{address} (another job's)")
        except (OSError, dist.DistError) as error:
            tried.append(f"{address} ({getattr(error, 'strerror', None) or type(error).__name__})")
    raise LaunchError(
        f"port {invited.port} of {invited.addresses[0]} cannot be reached: {', '.join(tried)}; is the node up, and "
        "does a firewall let the ports of jobs through?"
    )


def members(store: dist.TCPStore, key: str, sign: str, come: Iterable[str] | None, wait_s: float) -> list[str]:
    """Names of the nodes that gave a sign in time. come: of whom one is expected; only the first node, which decides
    so that all know the same ones, gives it."""
    if come is not None:
        expected = list(come)
        wait_for(lambda: all(store.check([f"{sign}/{name}"]) for name in expected), wait_s)
        store.set(key, json.dumps([name for name in expected if store.check([f"{sign}/{name}"])]))
    store.wait([key], timedelta(seconds=wait_s + 5))
    names: list[str] = json.loads(store.get(key))
    return names


def forget_older(meeting: Path, token: str) -> None:
    """Meetings of earlier starts."""
    start = token.removesuffix(SECOND)
    for folder in meeting.parent.glob(f"{PREFIX}*"):
        if folder.name.removesuffix(SECOND) != f"{PREFIX}{start}":
            shutil.rmtree(folder, ignore_errors=True)


def _come(meeting: Path) -> list[str]:
    return sorted(name for name in os.listdir(meeting) if not name.startswith(".") and name != ADDRESS_NAME)


def _open(meeting: Path, token: str, host: str, come: list[str]) -> dist.TCPStore | None:
    """The store at which all meet; None when another node has just opened one."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    store.set("token", token)
    addresses = [host, *_addresses(), "127.0.0.1"]
    draft = meeting / f".{host}.{os.getpid()}"
    draft.write_text(json.dumps({"port": store.port, "addresses": addresses, "come": come}))
    try:
        os.link(draft, meeting / ADDRESS_NAME)
    except FileExistsError:
        return None
    finally:
        draft.unlink()
    return store


def _addresses() -> list[str]:
    """IPv4 addresses of this machine that others may reach."""
    families = psutil.net_if_addrs().values()
    found = [each.address for interface in families for each in interface if each.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]
